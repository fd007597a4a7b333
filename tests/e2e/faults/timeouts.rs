//! Tests requests and publishes that get no answer.

use std::time::Duration;

use async_nats::{
    HeaderMap,
    jetstream::{
        consumer::{DeliverPolicy, pull},
        kv::Operation,
        stream::Config,
    },
};
use futures::{
    FutureExt, StreamExt, TryFutureExt,
    future::{BoxFuture, join_all},
};
use testkit::{MongoProxy, Nats, PATIENCE, Program, Stack, eventually, figure};
use vmwatch_api::{
    Method, Principal, Role, Scope, Service,
    metrics::{Latest, Limit, VmLatest},
    wire::FaultKind,
};
use vmwatch_bus::{
    Context,
    jetstream::{Bucket, Existing, JetStreamError},
    provision::{BucketConfig, ensure_stream},
};
use vmwatch_store::MONGODB_URI;

use super::{
    http::{Connection, address, post},
    size, vm_request,
};
use crate::ingest_support::{metric, resident};

/// Timed-out requests do not increase the gateway's memory. With its own inbox, async-nats 0.51 would keep 333 bytes
/// per timed-out request until the connection ends (measured over 100,000 requests), so `vmwatch-bus` replaces that
/// inbox.
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
        .client_for_tests()
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
    eventually("no request is waiting for a reply", PATIENCE, async || {
        let waiting = metric(&gateway.replica, "vmwatch_bus_replies_awaited").await;
        (waiting == 0.0).then_some(()).ok_or(waiting.to_string())
    })
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
    const DEADLINE: Duration = Duration::from_secs(5);
    const DELAY: Duration = Duration::from_secs(3);
    let stack = Stack::builder()
        .replicas(Program::Gateway, 0)
        .replicas(Program::Auth, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    let proxy = MongoProxy::start(stack.database.uri(), "blocks").await;
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

/// JetStream requests that time out do not increase the memory of the process. With its own inbox, async-nats 0.51
/// would keep 333 bytes per timed-out request until the connection ends.
#[tokio::test]
async fn timed_out_jetstream_requests_leak_no_memory() {
    const AT_ONCE: usize = 100;
    const KINDS: usize = 5;
    let limit = Duration::from_millis(20);
    let rounds = size(40, 200);
    let folder = tempfile::tempdir().unwrap();
    let nats = Nats::start(folder.path()).await;
    let (bus, other) = tokio::join!(nats.connect("publisher"), nats.connect("silent"));
    // These subscribers receive the messages and answer none, like a stream and a bucket that cannot answer.
    let mut reading = Vec::new();
    for subject in [
        "vmwatch.test.silent",
        "$KV.silent.>",
        "$JS.API.DIRECT.GET.KV_silent.>",
    ] {
        let mut silent = other.client_for_tests().subscribe(subject).await.unwrap();
        reading.push(tokio::spawn(
            async move { while silent.next().await.is_some() {} },
        ));
    }
    other.settled().await;
    let bucket = Bucket::new(&bus, "silent", limit);
    let time_out = async |rounds: usize| {
        for _ in 0..rounds {
            let asking = (0..AT_ONCE).map(async |_| {
                let publish = bus.publish_stored("vmwatch.test.silent", HeaderMap::new(), "x".into(), limit);
                let (stored, read, put, updated, deleted) = tokio::join!(
                    publish,
                    bucket.entry("key"),
                    bucket.put("key", "x".into()),
                    bucket.update("key", "x".into(), 1),
                    bucket.delete("key"),
                );
                assert!(matches!(stored, Err(JetStreamError::Timeout)), "{stored:?}");
                assert!(matches!(read, Err(JetStreamError::Timeout)), "{read:?}");
                assert!(matches!(put, Err(JetStreamError::Timeout)), "{put:?}");
                assert!(matches!(updated, Err(JetStreamError::Timeout)), "{updated:?}");
                assert!(matches!(deleted, Err(JetStreamError::Timeout)), "{deleted:?}");
            });
            join_all(asking).await;
        }
    };
    time_out(8).await;
    let before = own_resident_kib();
    time_out(rounds).await;
    let grown = own_resident_kib().saturating_sub(before);
    let requests = rounds * AT_ONCE * KINDS;
    figure("faults_timed_out_jetstream_requests", requests as f64);
    figure("faults_timed_out_jetstream_memory_grown_kib", grown as f64);
    assert!(
        grown < 1024 + requests as u64 / 8,
        "memory grew by {grown} KiB for {requests} timed-out requests"
    );
    reading.iter().for_each(tokio::task::JoinHandle::abort);
}

/// While the server is frozen, each kind of request to JetStream fails at its time limit.
#[tokio::test]
async fn jetstream_requests_to_frozen_server_time_out() {
    let limit = Duration::from_millis(100);
    let folder = tempfile::tempdir().unwrap();
    let nats = Nats::start(folder.path()).await;
    let bus = nats.connect("asking").await;
    let bucket = Bucket::new(&bus, "test", limit);
    let stream = Config {
        name: "TEST".to_owned(),
        ..Config::default()
    };
    let consumer = pull::Config {
        durable_name: Some("test".to_owned()),
        ..pull::Config::default()
    };
    nats.server.pause();
    let requests: [BoxFuture<'_, Result<(), JetStreamError>>; 12] = [
        bus.stream_info("TEST", limit).map_ok(drop).boxed(),
        bus.create_stream(&stream, limit).map_ok(drop).boxed(),
        bus.update_stream(&stream, limit).map_ok(drop).boxed(),
        bus.message("TEST", 1, limit).map_ok(drop).boxed(),
        bus.next_message("TEST", 1, ">", limit).map_ok(drop).boxed(),
        bus.delete_message("TEST", 1, limit).boxed(),
        bus.consumer_info("TEST", "test", limit).map_ok(drop).boxed(),
        bus.create_consumer("TEST", consumer, Existing::Keep, limit)
            .map_ok(drop)
            .boxed(),
        bus.read_stream("TEST", "", DeliverPolicy::All, limit)
            .map_ok(drop)
            .boxed(),
        bucket.entry("key").map_ok(drop).boxed(),
        bucket.create("key", "x".into()).map_ok(drop).boxed(),
        bucket.bytes().map_ok(drop).boxed(),
    ];
    for result in join_all(requests).await {
        assert!(matches!(result, Err(JetStreamError::Timeout)), "{result:?}");
    }
    nats.server.resume();
}

/// A write changes nothing if the key does not have the revision that the write expects.
#[tokio::test]
async fn kv_bucket_refuses_writes_that_expect_a_wrong_revision() {
    let folder = tempfile::tempdir().unwrap();
    let nats = Nats::start(folder.path()).await;
    let bus = nats.connect("writer").await;
    let wanted = BucketConfig {
        name: "test",
        description: "a test",
        max_age: Duration::ZERO,
        max_bytes: 1 << 20,
        replicas: 1,
    };
    ensure_stream(&bus, Service::Auth, &wanted.into()).await.unwrap();
    let bucket = Bucket::new(&bus, "test", Duration::from_secs(2));
    assert!(bucket.entry("key").await.unwrap().is_none());
    let first = bucket.create("key", "1".into()).await.unwrap().unwrap();
    assert_eq!(bucket.create("key", "2".into()).await.unwrap(), None);
    assert_eq!(bucket.update("key", "2".into(), first + 1).await.unwrap(), None);
    assert_eq!(bucket.delete_revision("key", first + 1).await.unwrap(), None);
    let second = bucket.update("key", "2".into(), first).await.unwrap().unwrap();
    let read = bucket.entry("key").await.unwrap().unwrap();
    assert_eq!((read.value.as_ref(), read.revision), (b"2".as_ref(), second));
    // A deletion leaves a marker at the key. A new value replaces the marker.
    bucket.delete_revision("key", second).await.unwrap().unwrap();
    let marker = bucket.entry("key").await.unwrap().unwrap();
    assert_eq!(marker.operation, Operation::Delete);
    bucket.create("key", "3".into()).await.unwrap().unwrap();
    for key in ["", ".key", "key.", "a..b", "*", ">", "a b", "a\nb"] {
        let refused = bucket.put(key, "x".into()).await;
        assert!(matches!(refused, Err(JetStreamError::InvalidKey)), "{key:?}");
    }
}

fn own_resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
