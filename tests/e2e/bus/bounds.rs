//! Tests the checks that the bus layer makes before and around every handler: limits, deadlines, panics, roles and
//! scopes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::HeaderMap;
use futures::{StreamExt, stream::FuturesUnordered};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use vmwatch_api::{
    Method, Principal, Role, Scope, Service,
    history::{Points, TimeRange, VmHistory, VmHistoryQuery, VmSeries},
    lifecycle::{Start, State, Target},
    metrics::{RowPage, Rows, VmLatest},
    time::unix_millis,
    wire::FaultKind,
};
use vmwatch_bus::{
    Context, headers,
    limits::LimitSettings,
    serve::{ServeSettings, Server},
};

use super::{SETTINGS, Served, context, echo, latest, nats, rows_of, running, target, viewer};

fn as_user(user: &str) -> Context {
    Context::new(Duration::from_secs(5)).as_principal(Principal {
        user: user.to_owned(),
        role: Role::Operator,
        scope: Scope::All,
    })
}

fn limited(limits: LimitSettings) -> ServeSettings {
    ServeSettings { limits, ..SETTINGS }
}

/// A service whose permits are all in use refuses further requests at once, and completes the requests that it
/// accepted.
#[tokio::test]
async fn service_at_its_limit_refuses_requests_at_once() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let settings = limited(LimitSettings {
        cheap_reads: 2,
        ..SETTINGS.limits
    });
    let server = Server::new(&bus, Service::Metrics, settings).method(VmLatest, move |_, params| {
        let held = Arc::clone(&held);
        async move {
            held.acquire().await.unwrap().forget();
            Ok(rows_of(&params.instance_id))
        }
    });
    let service = Served::start(&bus, Service::Metrics, server, 1).await;
    let ask = |instance: &'static str| {
        let caller = caller.clone();
        // Each request has its own user, because one user gets at most a quarter of the permits.
        async move {
            caller
                .call::<VmLatest>(&as_user(instance), &latest(instance))
                .await
        }
    };
    let mut asking: FuturesUnordered<_> = ["a", "b", "c"]
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

/// Commands that hang can exhaust only the permits for commands, and one user gets at most a quarter of those. Reads and
/// other users' commands continue.
#[tokio::test]
async fn hanging_commands_do_not_block_reads_or_other_users() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let settings = limited(LimitSettings {
        commands: 8,
        ..SETTINGS.limits
    });
    let server = Server::new(&bus, Service::Lifecycle, settings)
        .method(Start, move |_, params| {
            let held = Arc::clone(&held);
            async move {
                if params.instance_id.as_str() == "hangs" {
                    held.acquire().await.unwrap().forget();
                }
                Ok(running(params.instance_id))
            }
        })
        .method(State, |_, params| async move { Ok(running(params.instance_id)) });
    let service = Served::start(&bus, Service::Lifecycle, server, 1).await;
    let start = |user: &'static str, instance: &'static str| {
        let caller = caller.clone();
        async move { caller.call::<Start>(&as_user(user), &target(instance)).await }
    };
    let mut hanging: FuturesUnordered<_> = (0..10).map(|_| tokio::spawn(start("one", "hangs"))).collect();
    for _ in 0..8 {
        let refused = hanging.next().await.unwrap().unwrap().unwrap_err();
        assert_eq!(refused.kind, FaultKind::Throttled);
        assert!(refused.retry_after.is_some());
    }
    start("other", "works").await.unwrap();
    caller
        .call::<State>(&as_user("one"), &target("hangs"))
        .await
        .unwrap();
    gate.add_permits(2);
    while let Some(answer) = hanging.next().await {
        answer.unwrap().unwrap();
    }
    service.drain().await;
}

/// Expensive reads wait up to a second for a permit. Cheap reads do not wait behind them.
#[tokio::test]
async fn cheap_reads_do_not_wait_for_queued_expensive_reads() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let settings = limited(LimitSettings {
        heavy_reads: 4,
        ..SETTINGS.limits
    });
    let server = Server::new(&bus, Service::Metrics, settings)
        .method(VmHistory, move |_, _| {
            let held = Arc::clone(&held);
            async move {
                held.acquire().await.unwrap().forget();
                Ok(VmSeries::default())
            }
        })
        .method(
            VmLatest,
            |_, params| async move { Ok(rows_of(&params.instance_id)) },
        );
    let service = Served::start(&bus, Service::Metrics, server, 1).await;
    let history = || {
        let caller = caller.clone();
        let query = VmHistoryQuery {
            instance_id: "vm".parse().unwrap(),
            range: TimeRange::new(1, 2).unwrap(),
            points: Points::default(),
            after_ms: None,
        };
        tokio::spawn(async move { caller.call::<VmHistory>(&as_user("one"), &query).await })
    };
    // One request is processed, four are queued, and one is refused because it exceeds the user's quarter of the queue.
    let mut asking: FuturesUnordered<_> = (0..6).map(|_| history()).collect();
    let refused = asking.next().await.unwrap().unwrap().unwrap_err();
    assert_eq!(refused.kind, FaultKind::Throttled);
    caller
        .call::<VmLatest>(&as_user("one"), &latest("vm"))
        .await
        .unwrap();
    gate.add_permits(5);
    while let Some(answer) = asking.next().await {
        answer.unwrap().unwrap();
    }
    service.drain().await;
}

/// A request whose deadline has passed or is missing never reaches a handler. If the deadline passes while the handler
/// runs, the caller gets a timeout at once, and the handler continues.
#[tokio::test]
async fn service_answers_timeout_at_the_deadline_of_a_request() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let (started, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let gate = Arc::new(Semaphore::new(0));
    let (starts, ends, held) = (Arc::clone(&started), Arc::clone(&ended), Arc::clone(&gate));
    let server = Server::new(&bus, Service::Lifecycle, SETTINGS).method(Start, move |_, params| {
        let (starts, ends, held) = (Arc::clone(&starts), Arc::clone(&ends), Arc::clone(&held));
        async move {
            starts.fetch_add(1, Ordering::SeqCst);
            held.acquire().await.unwrap().forget();
            ends.fetch_add(1, Ordering::SeqCst);
            Ok(running(params.instance_id))
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
        let body = serde_json::to_vec(&target::<Target>("vm")).unwrap();
        let reply = caller
            .client_for_tests()
            .request_with_headers(subject.clone(), map, body.into())
            .await
            .unwrap();
        serde_json::from_slice(&reply.payload).unwrap()
    };
    let late = raw(Some(unix_millis() - 1)).await;
    assert_eq!(late["fault"], json!("timeout"));
    let without = raw(None).await;
    assert_eq!(without["fault"], json!("invalid"));
    assert_eq!(started.load(Ordering::SeqCst), 0);

    let while_working = raw(Some(unix_millis() + 3000)).await;
    assert_eq!(while_working["fault"], "timeout");
    assert_eq!(
        (started.load(Ordering::SeqCst), ended.load(Ordering::SeqCst)),
        (1, 0)
    );
    gate.add_permits(1);
    service.drain().await;
    assert_eq!(ended.load(Ordering::SeqCst), 1);
}

/// A caller stops waiting at its deadline if no service answers.
#[tokio::test]
async fn bus_caller_stops_waiting_at_its_deadline() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let server = Server::new(&bus, Service::Metrics, SETTINGS)
        .method(VmLatest, |_, _| async { std::future::pending().await });
    let _service = Served::start(&bus, Service::Metrics, server, 1).await;
    let mut short = viewer();
    short.deadline_ms = unix_millis() + 200;
    let started = Instant::now();
    let fault = caller.call::<VmLatest>(&short, &latest("vm")).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Timeout);
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
}

/// A panic in a handler fails only its own request: the service continues, and the caller gets an answer before the
/// deadline.
#[tokio::test]
async fn panic_in_a_handler_fails_only_its_own_request() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let server = Server::new(&bus, Service::Metrics, SETTINGS).method(VmLatest, |_, params| async move {
        assert_ne!(
            params.instance_id.as_str(),
            "bad",
            "this handler panics for the VM `bad`"
        );
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
        "the answer must not contain the cause: {}",
        fault.message
    );
    caller.call::<VmLatest>(&viewer(), &latest("good")).await.unwrap();
    service.drain().await;
}

/// The service enforces role and scope even if its caller has checked nothing.
#[tokio::test]
async fn service_enforces_roles_and_scopes_itself() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let server = Server::new(&bus, Service::Lifecycle, SETTINGS)
        .method(Start, |_, params| async move { Ok(running(params.instance_id)) });
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
    assert_eq!(
        rows(only("mine")).await.rows.as_json(),
        r#"[{"instance_id":"mine"}]"#
    );
    assert_eq!(rows(only("other")).await.rows.as_json(), "[]");
    service.drain().await;
}

/// If a reply is larger than the NATS payload limit, the caller gets an error at once instead of waiting until its
/// deadline.
#[tokio::test]
async fn reply_above_the_nats_payload_limit_becomes_an_error() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let most = bus.client_for_tests().max_payload();
    let server =
        Server::new(&bus, Service::Metrics, SETTINGS).method(VmLatest, move |_, params| async move {
            let bytes = match params.instance_id.as_str() {
                "above" => most,
                _ => most / 2,
            };
            let rows = Rows::from_json(json!(["x".repeat(bytes)]).to_string()).unwrap();
            Ok(RowPage::whole(rows))
        });
    let service = Served::start(&bus, Service::Metrics, server, 1).await;
    let fault = caller
        .call::<VmLatest>(&viewer(), &latest("above"))
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Internal, "{fault}");
    assert!(fault.message.contains("larger than the message bus"), "{fault}");
    caller
        .call::<VmLatest>(&viewer(), &latest("below"))
        .await
        .unwrap();
    service.drain().await;
}
