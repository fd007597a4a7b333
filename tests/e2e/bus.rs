//! The bus layer of `shared`, over a real NATS server: bounds, deadlines, discovery, drain and reconnection.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::HeaderMap;
use e2e::{Nats, PATIENCE, eventually};
use futures::{StreamExt, future::join_all};
use serde_json::{Value, json};
use shared::{
    api::{
        InstanceId, Method, Principal, Role, Scope, Service,
        lifecycle::{Machine, MachineState, Start, Target},
        metrics::{Latest, Limit, Rows, VmLatest},
    },
    bus::{
        Bus, Context, headers,
        serve::{ServeSettings, Server},
    },
    time::unix_millis,
    wire::FaultKind,
};
use tempfile::TempDir;
use tokio::{sync::Semaphore, task::JoinHandle};
use tokio_util::sync::CancellationToken;

const SETTINGS: ServeSettings = ServeSettings {
    max_in_flight: 256,
    drain_deadline: Duration::from_secs(10),
};

async fn nats() -> (Nats, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    (Nats::start(folder.path()).await, folder)
}

fn context(role: Role, scope: Scope) -> Context {
    Context::new(Duration::from_secs(5)).as_principal(Principal {
        user: "test".into(),
        role,
        scope,
    })
}

fn viewer() -> Context {
    context(Role::Viewer, Scope::All)
}

fn latest(instance: &str) -> Latest {
    Latest {
        instance_id: instance.parse().unwrap(),
        limit: Limit::default(),
    }
}

fn target(instance: &str) -> Target {
    Target {
        instance_id: instance.parse().unwrap(),
    }
}

fn rows_of(instance: &InstanceId) -> Rows {
    Rows::from_json(json!([{ "instance_id": instance }]).to_string()).unwrap()
}

fn running(target: Target) -> Machine {
    Machine {
        instance_id: target.instance_id,
        state: MachineState::Running,
    }
}

/// A service that runs until it is stopped.
struct Served {
    stop: CancellationToken,
    run: JoinHandle<()>,
}

impl Served {
    /// Starts it, and waits until so many replicas are found.
    async fn start(bus: &Bus, service: Service, server: Server, replicas: usize) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let run = tokio::spawn(async move { server.run(stopped).await.unwrap() });
        let subject = format!("$SRV.PING.{}", service.name());
        eventually("the service is found", PATIENCE, async || {
            let found = replies(bus, &subject, replicas, Duration::from_millis(100))
                .await
                .len();
            if found == replicas {
                Ok(())
            } else {
                Err(format!("{found} of {replicas} replicas"))
            }
        })
        .await;
        Self { stop, run }
    }

    async fn drain(self) {
        self.stop.cancel();
        self.run.await.unwrap();
    }
}

async fn echo(bus: &Bus, replicas: usize) -> Served {
    let server = Server::new(bus, Service::Metrics, SETTINGS)
        .method::<VmLatest, _, _>(|_, params| async move { Ok(rows_of(&params.instance_id)) });
    Served::start(bus, Service::Metrics, server, replicas).await
}

async fn answers(bus: &Bus) {
    eventually("the service answers", PATIENCE, async || {
        bus.call::<VmLatest>(&viewer(), &latest("vm"))
            .await
            .map_err(|fault| fault.to_string())
    })
    .await;
}

/// Replicas that leave and come back one after the other, under load, lose no request and mix up no answer.
#[tokio::test]
async fn a_rolling_restart_loses_no_request() {
    let (nats, _folder) = nats().await;
    let (first, second, caller) = tokio::join!(
        nats.connect("first"),
        nats.connect("second"),
        nats.connect("caller")
    );
    let _stays = echo(&first, 1).await;
    answers(&caller).await;
    let over = CancellationToken::new();
    let asked = Arc::new(AtomicU64::new(0));
    let callers = (0..16).map(|worker| {
        let (bus, over, asked) = (caller.clone(), over.clone(), Arc::clone(&asked));
        tokio::spawn(async move {
            let mut turn = 0;
            while !over.is_cancelled() {
                let instance = format!("vm-{worker}-{turn}");
                let rows = bus.call::<VmLatest>(&viewer(), &latest(&instance)).await;
                let rows = rows.unwrap_or_else(|fault| panic!("request {turn} of {worker}: {fault}"));
                assert_eq!(rows.as_json(), json!([{ "instance_id": instance }]).to_string());
                asked.fetch_add(1, Ordering::Relaxed);
                turn += 1;
            }
        })
    });
    let callers: Vec<_> = callers.collect();
    for _ in 0..5 {
        let before = asked.load(Ordering::Relaxed);
        let comes = echo(&second, 2).await;
        eventually("load on both replicas", PATIENCE, async || {
            let done = asked.load(Ordering::Relaxed) - before;
            if done > 500 {
                Ok(())
            } else {
                Err(format!("{done} requests"))
            }
        })
        .await;
        comes.drain().await;
    }
    over.cancel();
    for caller in callers {
        caller.await.unwrap();
    }
}

/// What was begun before a stop is finished, and its answer arrives.
#[tokio::test]
async fn a_drain_finishes_what_was_begun() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let (begun, may_end) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (signal, gate) = (Arc::clone(&begun), Arc::clone(&may_end));
    let server = Server::new(&bus, Service::Metrics, SETTINGS).method::<VmLatest, _, _>(move |_, params| {
        let (signal, gate) = (Arc::clone(&signal), Arc::clone(&gate));
        async move {
            signal.add_permits(1);
            gate.acquire().await.unwrap().forget();
            Ok(rows_of(&params.instance_id))
        }
    });
    let service = Served::start(&bus, Service::Metrics, server, 1).await;
    let asking = tokio::spawn(async move { caller.call::<VmLatest>(&viewer(), &latest("vm")).await });
    begun.acquire().await.unwrap().forget();
    service.stop.cancel();
    may_end.add_permits(1);
    service.run.await.unwrap();
    assert_eq!(
        asking.await.unwrap().unwrap().as_json(),
        r#"[{"instance_id":"vm"}]"#
    );
}

/// A service at its bound says so at once, and loses nothing of what it has taken on.
#[tokio::test]
async fn a_full_service_answers_overloaded_at_once() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let settings = ServeSettings {
        max_in_flight: 2,
        ..SETTINGS
    };
    let server = Server::new(&bus, Service::Metrics, settings).method::<VmLatest, _, _>(move |_, params| {
        let held = Arc::clone(&held);
        async move {
            held.acquire().await.unwrap().forget();
            Ok(rows_of(&params.instance_id))
        }
    });
    let service = Served::start(&bus, Service::Metrics, server, 1).await;
    let ask = |instance: &'static str| {
        let caller = caller.clone();
        async move { caller.call::<VmLatest>(&viewer(), &latest(instance)).await }
    };
    let mut asking: futures::stream::FuturesUnordered<_> = ["a", "b", "c"]
        .map(|id| tokio::spawn(ask(id)))
        .into_iter()
        .collect();
    let refused = asking.next().await.unwrap().unwrap().unwrap_err();
    assert_eq!(refused.kind, FaultKind::Overloaded);
    assert!(refused.retry_after.is_some());
    gate.add_permits(2);
    while let Some(answer) = asking.next().await {
        answer.unwrap().unwrap();
    }
    gate.add_permits(1);
    ask("d").await.unwrap();
    service.drain().await;
}

/// A request that is past its deadline, or has none, never reaches a handler; one that passes it while it is worked
/// on is answered as late, and its handler ends its work.
#[tokio::test]
async fn deadlines_are_kept_by_the_service() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let (started, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let gate = Arc::new(Semaphore::new(0));
    let (starts, ends, held) = (Arc::clone(&started), Arc::clone(&ended), Arc::clone(&gate));
    let server = Server::new(&bus, Service::Lifecycle, SETTINGS).method::<Start, _, _>(move |_, params| {
        let (starts, ends, held) = (Arc::clone(&starts), Arc::clone(&ends), Arc::clone(&held));
        async move {
            starts.fetch_add(1, Ordering::SeqCst);
            held.acquire().await.unwrap().forget();
            ends.fetch_add(1, Ordering::SeqCst);
            Ok(running(params))
        }
    });
    let service = Served::start(&bus, Service::Lifecycle, server, 1).await;
    let subject = Start::INFO.full_subject();
    let raw = async |deadline: Option<u64>| -> Value {
        let mut map = HeaderMap::new();
        if let Some(deadline) = deadline {
            map.insert(headers::DEADLINE, deadline.to_string());
        }
        let principal = Principal {
            user: "test".into(),
            role: Role::Operator,
            scope: Scope::All,
        };
        map.insert(headers::PRINCIPAL, serde_json::to_string(&principal).unwrap());
        let body = serde_json::to_vec(&target("vm")).unwrap();
        let reply = caller
            .client()
            .request_with_headers(subject.clone(), map, body.into())
            .await
            .unwrap();
        serde_json::from_slice(&reply.payload).unwrap()
    };
    let late = raw(Some(unix_millis() - 1)).await;
    assert_eq!(
        (&late["fault"], &late["status_code"]),
        (&json!("timeout"), &json!(4))
    );
    let without = raw(None).await;
    assert_eq!(
        (&without["fault"], &without["status_code"]),
        (&json!("invalid"), &json!(3))
    );
    assert_eq!(started.load(Ordering::SeqCst), 0);

    let while_working = raw(Some(unix_millis() + 300)).await;
    assert_eq!(while_working["fault"], "timeout");
    assert_eq!(
        (started.load(Ordering::SeqCst), ended.load(Ordering::SeqCst)),
        (1, 0)
    );
    gate.add_permits(1);
    service.drain().await;
    assert_eq!(ended.load(Ordering::SeqCst), 1);
}

/// The caller's wait ends with its deadline although nobody answers.
#[tokio::test]
async fn a_caller_waits_no_longer_than_its_deadline() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let server = Server::new(&bus, Service::Metrics, SETTINGS)
        .method::<VmLatest, _, _>(|_, _| async { std::future::pending().await });
    let _service = Served::start(&bus, Service::Metrics, server, 1).await;
    let mut short = viewer();
    short.deadline_ms = unix_millis() + 200;
    let started = Instant::now();
    let fault = caller.call::<VmLatest>(&short, &latest("vm")).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Timeout);
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
}

/// A panic is one failed request, and neither the service's end nor a silence until the deadline.
#[tokio::test]
async fn a_panic_fails_its_own_request_only() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let server =
        Server::new(&bus, Service::Metrics, SETTINGS).method::<VmLatest, _, _>(|_, params| async move {
            assert_ne!(params.instance_id.as_str(), "bad", "a defect");
            Ok(rows_of(&params.instance_id))
        });
    let service = Served::start(&bus, Service::Metrics, server, 1).await;
    let fault = caller
        .call::<VmLatest>(&viewer(), &latest("bad"))
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Internal);
    assert!(
        !fault.message.contains("defect"),
        "the cause stays in the log: {}",
        fault.message
    );
    caller.call::<VmLatest>(&viewer(), &latest("good")).await.unwrap();
    service.drain().await;
}

/// Role and scope are the service's to enforce, whatever a caller checked before.
#[tokio::test]
async fn roles_and_scopes_are_enforced_by_the_service() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let server = Server::new(&bus, Service::Lifecycle, SETTINGS)
        .method::<Start, _, _>(|_, params| async move { Ok(running(params)) });
    let (_other, service) = tokio::join!(echo(&bus, 1), Served::start(&bus, Service::Lifecycle, server, 1));
    let start = async |context: Context| caller.call::<Start>(&context, &target("mine")).await;
    let only = |instance: &str| Scope::Only(vec![instance.parse().unwrap()]);

    assert_eq!(
        start(Context::new(Duration::from_secs(5)))
            .await
            .unwrap_err()
            .kind,
        FaultKind::Forbidden
    );
    assert_eq!(start(viewer()).await.unwrap_err().kind, FaultKind::Forbidden);
    assert!(start(context(Role::Operator, only("mine"))).await.is_ok());
    let hidden = start(context(Role::Operator, only("other"))).await.unwrap_err();
    assert_eq!(
        (hidden.kind, hidden.message.as_str()),
        (FaultKind::NotFound, "there is no VM with this instance_id")
    );

    let rows = async |scope| {
        caller
            .call::<VmLatest>(&context(Role::Viewer, scope), &latest("mine"))
            .await
            .unwrap()
    };
    assert_eq!(rows(only("mine")).await.as_json(), r#"[{"instance_id":"mine"}]"#);
    assert_eq!(rows(only("other")).await.as_json(), "[]");
    service.drain().await;
}

/// `nats micro ls`, `info` and `stats` find every replica, with what it did.
#[tokio::test]
async fn discovery_is_answered_by_every_replica() {
    let (nats, _folder) = nats().await;
    let (first, second, caller) = tokio::join!(
        nats.connect("first"),
        nats.connect("second"),
        nats.connect("caller")
    );
    let replicas = (echo(&first, 1).await, echo(&second, 2).await);
    caller.call::<VmLatest>(&viewer(), &latest("vm")).await.unwrap();
    caller
        .call::<VmLatest>(&Context::new(PATIENCE), &latest("vm"))
        .await
        .unwrap_err();

    let pings = ask_all(&caller, "$SRV.PING", 2).await;
    assert!(
        pings
            .iter()
            .all(|ping| ping["type"] == "io.nats.micro.v1.ping_response")
    );
    assert!(pings.iter().all(|ping| ping["name"] == "vmwatch-metrics"));
    assert_ne!(pings[0]["id"], pings[1]["id"]);
    let infos = ask_all(&caller, "$SRV.INFO.vmwatch-metrics", 2).await;
    assert!(
        infos
            .iter()
            .all(|info| info["endpoints"][0]["subject"] == "vmwatch.v1.metrics.vm.latest")
    );
    let one = format!("$SRV.STATS.vmwatch-metrics.{}", pings[0]["id"].as_str().unwrap());
    assert_eq!(ask_all(&caller, &one, 1).await[0]["id"], pings[0]["id"]);
    let sum = |stats: &[Value], what: &str| -> u64 {
        stats
            .iter()
            .map(|replica| replica["endpoints"][0][what].as_u64().unwrap())
            .sum()
    };
    let stats = ask_all(&caller, "$SRV.STATS", 2).await;
    assert_eq!((sum(&stats, "num_requests"), sum(&stats, "num_errors")), (2, 1));

    tokio::join!(replicas.0.drain(), replicas.1.drain());
    let gone = caller.client().request("$SRV.PING", "".into()).await.unwrap_err();
    assert_eq!(gone.kind(), async_nats::RequestErrorKind::NoResponders);
}

/// The answers to a question that every replica answers.
async fn ask_all(bus: &Bus, subject: &str, count: usize) -> Vec<Value> {
    let found = replies(bus, subject, count, PATIENCE).await;
    assert_eq!(found.len(), count, "{subject}: {found:?}");
    found
}

/// At most so many answers, and those only that come in time.
async fn replies(bus: &Bus, subject: &str, most: usize, limit: Duration) -> Vec<Value> {
    let client = bus.client();
    let inbox = client.new_inbox();
    let messages = client.subscribe(inbox.clone()).await.unwrap();
    client
        .publish_with_reply(subject.to_owned(), inbox, "".into())
        .await
        .unwrap();
    // The server's own word that there is nobody comes with a status.
    let answers = messages.filter(|message| std::future::ready(message.status.is_none()));
    let in_time = answers.take(most).take_until(tokio::time::sleep(limit));
    in_time
        .map(|message| serde_json::from_slice(&message.payload).unwrap_or_default())
        .collect()
        .await
}

/// Without a service, without a server and with a frozen server the answer comes at once, and all is well again by
/// itself when they are back. What was asked meanwhile is never executed.
#[tokio::test]
async fn a_bus_that_is_away_is_told_at_once_and_comes_back_by_itself() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let unavailable = async |what: &str| {
        let started = Instant::now();
        let fault = caller
            .call::<VmLatest>(&viewer(), &latest("vm"))
            .await
            .unwrap_err();
        assert_eq!(fault.kind, FaultKind::Unavailable, "{what}");
        assert!(
            started.elapsed() < Duration::from_secs(1),
            "{what}: {:?}",
            started.elapsed()
        );
    };
    unavailable("no service").await;

    let executed = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&executed);
    let server = Server::new(&bus, Service::Metrics, SETTINGS).method::<VmLatest, _, _>(move |_, params| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { Ok(rows_of(&params.instance_id)) }
    });
    let service = Served::start(&bus, Service::Metrics, server, 1).await;
    answers(&caller).await;

    nats.process.kill9();
    noticed(&caller).await;
    join_all((0..20).map(|_| unavailable("no server"))).await;
    nats.restart().await;
    answers(&caller).await;

    nats.process.pause();
    noticed(&caller).await;
    unavailable("a frozen server").await;
    let before = executed.load(Ordering::SeqCst);
    nats.process.resume();
    answers(&caller).await;
    let tries = executed.load(Ordering::SeqCst) - before;
    assert_eq!(tries, 1, "requests that were refused are not executed later");
    service.drain().await;
}

async fn noticed(bus: &Bus) {
    eventually("the client notices", PATIENCE, async || {
        if bus.is_connected() {
            Err("still connected".to_owned())
        } else {
            Ok(())
        }
    })
    .await;
}
