//! Tests the bus layer (`vmwatch-bus`) over a real NATS server: limits, deadlines, discovery, drain and reconnection.

mod bounds;
mod discovery;
mod drain;
mod outage;

use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::{Nats, PATIENCE, eventually};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    InstanceId, Principal, Role, Scope, Service,
    lifecycle::{Machine, MachineState},
    metrics::{Latest, Limit, RowPage, Rows, VmLatest},
};
use vmwatch_bus::{
    Bus, Context,
    limits::LimitSettings,
    serve::{ServeSettings, Server},
};

/// The limits are far above the number of concurrent requests in a test, and so is the quarter of a limit that a single
/// user may use.
const SETTINGS: ServeSettings = ServeSettings {
    limits: LimitSettings {
        logins: 1024,
        enrollments: 1024,
        account_requests: 1024,
        commands: 1024,
        cheap_reads: 1024,
        heavy_reads: 1024,
    },
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
        before: None,
    }
}

fn target<T: From<InstanceId>>(instance: &str) -> T {
    instance.parse::<InstanceId>().unwrap().into()
}

fn rows_of(instance: &InstanceId) -> RowPage {
    let rows = json!([{ "instance_id": instance }]);
    RowPage::whole(Rows::from_json(rows.to_string()).unwrap())
}

fn running(instance_id: InstanceId) -> Machine {
    Machine {
        instance_id,
        state: MachineState::Running,
        name: None,
        hypervisor: None,
        allowed_actions: Vec::new(),
        refused_actions: [].into(),
    }
}

/// A running service, and the token that stops it.
struct Served {
    stop: CancellationToken,
    run: JoinHandle<()>,
}

impl Served {
    /// Starts a replica of the service and waits until discovery finds this many replicas.
    async fn start(bus: &Bus, service: Service, server: Server, replicas: usize) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let run = tokio::spawn(async move { server.run(stopped, || ()).await.unwrap() });
        let subject = format!("$SRV.PING.{}", service.name());
        eventually("discovery finds all replicas", PATIENCE, async || {
            let found = replies(bus, &subject, replicas, Duration::from_millis(100))
                .await
                .len();
            if found == replicas {
                Ok(())
            } else {
                Err(format!("found {found} of {replicas} replicas"))
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
    let server = Server::new(bus, Service::Metrics, SETTINGS).method(VmLatest, |_, params| async move {
        Ok(rows_of(&params.instance_id))
    });
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

/// Collects the replies to a request that every replica answers. Asks again until all answer, because a replica that has
/// just started may not receive the first request.
pub(crate) async fn ask_all(bus: &Bus, subject: &str, count: usize) -> Vec<Value> {
    eventually("all replicas answer", PATIENCE, async || {
        let found = replies(bus, subject, count, Duration::from_secs(1)).await;
        if found.len() == count {
            Ok(found)
        } else {
            Err(format!("{subject}: {found:?}"))
        }
    })
    .await
}

/// Collects the replies that arrive within the time limit, and stops after `most` replies.
async fn replies(bus: &Bus, subject: &str, most: usize, limit: Duration) -> Vec<Value> {
    let client = bus.client_for_tests();
    let inbox = client.new_inbox();
    let messages = client.subscribe(inbox.clone()).await.unwrap();
    client
        .publish_with_reply(subject.to_owned(), inbox, "".into())
        .await
        .unwrap();
    // Skips the NATS server's own "no responders" reply, which has a status.
    let answers = messages.filter(|message| std::future::ready(message.status.is_none()));
    let in_time = answers.take(most).take_until(tokio::time::sleep(limit));
    in_time
        .map(|message| serde_json::from_slice(&message.payload).unwrap_or_default())
        .collect()
        .await
}
