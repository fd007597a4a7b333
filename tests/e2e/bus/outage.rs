//! Tests requests while no service runs, or while the NATS server is killed or frozen.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use testkit::{PATIENCE, eventually};
use vmwatch_api::{Service, metrics::VmLatest, time::unix_millis, wire::FaultKind};
use vmwatch_bus::{Bus, serve::Server};

use super::{SETTINGS, Served, answers, latest, nats, rows_of, viewer};

/// Requests are refused at once while no service runs, while the NATS server is down, and while it is frozen. They
/// succeed again when service and server are back. Refused requests are never executed.
#[tokio::test]
async fn requests_fail_at_once_while_the_bus_is_unreachable() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let unavailable = async |what: &str| {
        let mut context = viewer();
        context.deadline_ms = unix_millis() + 30_000;
        let started = Instant::now();
        let fault = caller
            .call::<VmLatest>(&context, &latest("vm"))
            .await
            .unwrap_err();
        assert_eq!(fault.kind, FaultKind::Unavailable, "{what}");
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "{what}: {:?}",
            started.elapsed()
        );
    };
    unavailable("no service").await;

    let executed = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&executed);
    let server = Server::new(&bus, Service::Metrics, SETTINGS).method(VmLatest, move |_, params| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { Ok(rows_of(&params.instance_id)) }
    });
    let service = Served::start(&bus, Service::Metrics, server, 1).await;
    answers(&caller).await;

    nats.server.kill9();
    noticed(&caller).await;
    join_all((0..20).map(|_| unavailable("no server"))).await;
    nats.restart().await;
    answers(&caller).await;

    nats.server.pause();
    noticed(&caller).await;
    unavailable("a frozen server").await;
    let before = executed.load(Ordering::SeqCst);
    nats.server.resume();
    answers(&caller).await;
    let tries = executed.load(Ordering::SeqCst) - before;
    assert_eq!(tries, 1, "refused requests must not be executed later");
    service.drain().await;
}

async fn noticed(bus: &Bus) {
    eventually("the NATS client detects the outage", PATIENCE, async || {
        if bus.is_connected() {
            Err("still connected".to_owned())
        } else {
            Ok(())
        }
    })
    .await;
}
