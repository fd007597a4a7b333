//! Tests requests and publishes that get no answer.

use std::time::Duration;

use async_nats::HeaderMap;
use futures::{StreamExt, future::join_all};
use testkit::{MongoProxy, Nats, PATIENCE, Program, Stack, eventually, figure};
use vmwatch_api::{
    Method, Principal, Role, Scope,
    metrics::{Latest, Limit, VmLatest},
    wire::FaultKind,
};
use vmwatch_bus::{Context, stream_requests::JetStreamError};
use vmwatch_store::MONGODB_URI;

use super::{
    http::{Connection, address, post},
    size, vm_request,
};
use crate::ingest_support::{metric, resident};

/// Timed-out requests do not increase the gateway's memory. async-nats 0.51 alone would keep 333 bytes per timed-out
/// request until the connection ends (measured over 100,000 requests).
#[tokio::test]
async fn timed_out_requests_leak_no_memory() {
    const CLIENTS: usize = 200;
    let rounds = size(40, 500);
    let stack = Stack::builder()
        .without_read_limit()
        .replicas(Program::Metrics, 0)
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "20ms")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = stack.session(Role::Viewer, Scope::All).await;
    // This subscriber receives the requests and never answers.
    let silent = stack
        .bus
        .client()
        .subscribe(VmLatest::INFO.full_subject())
        .await
        .unwrap();
    stack.bus.settled().await;
    let (address, request) = (address(gateway), post(&vm_request(&session).to_string()));
    let connections = (0..CLIENTS).map(|_| Connection::open(&address));
    let mut connections: Vec<_> = join_all(connections)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let mut time_out = async |rounds: usize| {
        let asking = connections.iter_mut().map(async |connection| {
            for _ in 0..rounds {
                let answer = connection.ask(&request).await.unwrap();
                assert_eq!((answer.http, answer.status()), (200, 4), "{answer:?}");
            }
        });
        join_all(asking).await;
    };
    time_out(20).await;
    let before = resident(&gateway.replica.process);
    time_out(rounds).await;
    let grown = resident(&gateway.replica.process).saturating_sub(before);
    let requests = rounds * CLIENTS;
    figure("faults_timed_out_requests", requests as f64);
    figure("faults_timed_out_memory_grown_kib", grown as f64);
    eventually(
        "no request is waiting for a reply",
        Duration::from_secs(5),
        async || {
            let waiting = metric(&gateway.replica, "vmwatch_bus_replies_awaited").await;
            (waiting == 0.0).then_some(()).ok_or(waiting.to_string())
        },
    )
    .await;
    assert!(
        grown < 1024 + requests as u64 / 8,
        "memory grew by {grown} KiB for {requests} timed-out requests"
    );
    drop(silent);
}

/// All database queries of one request share the request's deadline. A read of an unknown VM's rows searches several
/// time ranges in turn. With a slow database, later queries get only the remaining time, and none begins after the
/// deadline.
#[tokio::test]
async fn database_queries_of_a_request_share_its_deadline() {
    const DEADLINE: Duration = Duration::from_secs(1);
    const DELAY: Duration = Duration::from_millis(400);
    let stack = Stack::builder()
        .replicas(Program::Gateway, 0)
        .replicas(Program::Auth, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    let proxy = MongoProxy::start(stack.database.uri(), "vm_samples").await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.set(MONGODB_URI.name, proxy.uri());
    metrics.process.kill9();
    metrics.restart().await;
    proxy.delay_queries(DELAY);
    let before = proxy.query_limits().len();

    let context = Context::new(DEADLINE).as_principal(Principal {
        user: "test".to_owned(),
        role: Role::Viewer,
        scope: Scope::All,
    });
    let unknown = Latest {
        instance_id: "unknown".parse().unwrap(),
        limit: Limit::default(),
        before: None,
    };
    let late = stack.bus.call::<VmLatest>(&context, &unknown).await.unwrap_err();
    assert_eq!(late.kind, FaultKind::Timeout, "{late:?}");
    eventually("the handler of the request ends", PATIENCE, async || {
        let under_way = metric(metrics, "vmwatch_requests_in_flight").await;
        (under_way == 0.0).then_some(()).ok_or(under_way.to_string())
    })
    .await;
    let limits = proxy.query_limits().split_off(before);
    let most = i64::try_from(DEADLINE.as_millis()).unwrap();
    let delay = i64::try_from(DELAY.as_millis()).unwrap();
    assert!((1..=3).contains(&limits.len()), "{limits:?}");
    for (index, limit) in (0..).zip(&limits) {
        assert!((1..=most - index * delay).contains(limit), "{limits:?}");
    }
}

/// Publishes that time out do not increase the memory of the process. async-nats 0.51 alone would keep 333 bytes per
/// timed-out publish until the connection ends.
#[tokio::test]
async fn timed_out_publishes_leak_no_memory() {
    const AT_ONCE: usize = 200;
    let rounds = size(100, 500);
    let folder = tempfile::tempdir().unwrap();
    let nats = Nats::start(folder.path()).await;
    let (bus, other) = tokio::join!(nats.connect("publisher"), nats.connect("silent"));
    // This subscriber receives the messages and acknowledges none, like a stream that cannot answer.
    let mut silent = other.client().subscribe("vmwatch.test.silent").await.unwrap();
    other.settled().await;
    let reading = tokio::spawn(async move { while silent.next().await.is_some() {} });
    let time_out = async |rounds: usize| {
        for _ in 0..rounds {
            let publishing = (0..AT_ONCE).map(async |_| {
                let limit = Duration::from_millis(20);
                let stored = bus.publish_stored("vmwatch.test.silent", HeaderMap::new(), "x".into(), limit);
                assert!(matches!(stored.await, Err(JetStreamError::Timeout)));
            });
            join_all(publishing).await;
        }
    };
    time_out(20).await;
    let before = own_resident_kib();
    time_out(rounds).await;
    let grown = own_resident_kib().saturating_sub(before);
    let publishes = rounds * AT_ONCE;
    figure("faults_timed_out_publishes", publishes as f64);
    figure("faults_timed_out_publishes_memory_grown_kib", grown as f64);
    assert!(
        grown < 1024 + publishes as u64 / 8,
        "memory grew by {grown} KiB for {publishes} timed-out publishes"
    );
    reading.abort();
}

fn own_resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
