//! Requests without a service or without a server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use testkit::{PATIENCE, eventually};
use vmwatch_api::{Service, metrics::VmLatest, wire::FaultKind};
use vmwatch_bus::{Bus, serve::Server};

use super::{SETTINGS, Served, answers, latest, nats, rows_of, viewer};

/// Without a service, without a server and with a frozen server, requests are refused at once. Requests succeed again
/// when the service and server are back. Refused requests are never executed.
#[tokio::test]
async fn reports_unreachable_bus_at_once_and_reconnects() {
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
    assert_eq!(tries, 1, "requests that were refused are not executed later");
    service.drain().await;
}

async fn noticed(bus: &Bus) {
    eventually("the client detects the outage", PATIENCE, async || {
        if bus.is_connected() {
            Err("still connected".to_owned())
        } else {
            Ok(())
        }
    })
    .await;
}
