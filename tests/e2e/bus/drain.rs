//! Tests that a replica which stops and leaves its NATS queue group loses no request.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use testkit::{NatsProxy, PATIENCE, eventually};
use tokio::{sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;
use vmwatch_api::{Service, metrics::VmLatest, wire::FaultKind};
use vmwatch_bus::{Bus, BusSettings, NATS_URL, serve::Server};
use vmwatch_service::config::Environment;

use super::{SETTINGS, Served, answers, echo, latest, nats, replies, rows_of, viewer};

/// Sends requests from 16 tasks while `body` runs, and asserts that each gets the right answer. `body` receives the
/// number of requests answered so far.
async fn under_load(caller: &Bus, body: impl AsyncFnOnce(Arc<AtomicU64>)) {
    let over = CancellationToken::new();
    let answered = Arc::new(AtomicU64::new(0));
    let callers: Vec<_> = (0..16)
        .map(|worker| {
            let (bus, over, answered) = (caller.clone(), over.clone(), Arc::clone(&answered));
            tokio::spawn(async move {
                let mut turn = 0;
                while !over.is_cancelled() {
                    let instance = format!("vm-{worker}-{turn}");
                    let rows = bus.call::<VmLatest>(&viewer(), &latest(&instance)).await;
                    let rows = rows.unwrap_or_else(|fault| panic!("request {turn} of {worker}: {fault}"));
                    assert_eq!(
                        rows.rows.as_json(),
                        json!([{ "instance_id": instance }]).to_string()
                    );
                    answered.fetch_add(1, Ordering::Relaxed);
                    turn += 1;
                }
            })
        })
        .collect();
    body(answered).await;
    over.cancel();
    for caller in callers {
        caller.await.unwrap();
    }
}

/// Waits for `count` more answers.
async fn further(answered: &AtomicU64, count: u64) {
    let before = answered.load(Ordering::Relaxed);
    eventually("more requests are answered", PATIENCE, async || {
        let done = answered.load(Ordering::Relaxed) - before;
        (done > count)
            .then_some(())
            .ok_or_else(|| format!("{done} requests answered so far"))
    })
    .await;
}

/// Replicas that restart in turn under load lose no request and give each caller its own answer.
#[tokio::test]
async fn rolling_restart_of_replicas_loses_no_request() {
    let (nats, _folder) = nats().await;
    let (first, second, caller) = tokio::join!(
        nats.connect("first"),
        nats.connect("second"),
        nats.connect("caller")
    );
    let _stays = echo(&first, 1).await;
    answers(&caller).await;
    under_load(&caller, async |answered| {
        for _ in 0..5 {
            let comes = echo(&second, 2).await;
            further(&answered, 500).await;
            comes.drain().await;
        }
    })
    .await;
}

/// The NATS client counts the messages of all its connections; the NATS server counts only those of the current
/// connection. A drain after a reconnection must take this difference into account.
#[tokio::test]
async fn draining_service_loses_no_request_after_a_reconnection() {
    let (nats, _folder) = nats().await;
    let (first, second, caller) = tokio::join!(
        nats.connect("first"),
        nats.connect("second"),
        nats.connect("caller")
    );
    let stays = echo(&first, 1).await;
    let leaves = echo(&second, 2).await;
    under_load(&caller, async |answered| further(&answered, 2_000).await).await;
    nats.server.kill9();
    nats.restart().await;
    answers(&caller).await;
    eventually("discovery finds both replicas", PATIENCE, async || {
        let found = replies(&caller, "$SRV.PING", 2, Duration::from_millis(100)).await;
        (found.len() == 2)
            .then_some(())
            .ok_or_else(|| format!("found {} replicas", found.len()))
    })
    .await;
    under_load(&caller, async |answered| {
        further(&answered, 500).await;
        leaves.drain().await;
    })
    .await;
    stays.drain().await;
}

/// After a reconnection, a service replaces its subscriptions. Requests that it receives meanwhile are answered, even
/// if a slow network delays an `UNSUB` line and everything that the service sends after that line.
#[tokio::test]
async fn requests_right_after_reconnection_are_answered() {
    let (nats, _folder) = nats().await;
    let proxy = NatsProxy::start(nats.url(), "UNSUB").await;
    let env = Environment::from_variables([(NATS_URL.name, proxy.url())]);
    let settings = BusSettings::read(&env).unwrap();
    let bus = Bus::connect("service", &settings).await.unwrap();
    proxy.release();
    let service = echo(&bus, 1).await;
    let caller = nats.connect("caller").await;
    nats.server.kill9();
    proxy.arm();
    nats.restart().await;
    eventually("the service has reconnected", PATIENCE, async || {
        let connections = bus.connections();
        (connections == 2)
            .then_some(())
            .ok_or_else(|| connections.to_string())
    })
    .await;
    // Wait until the service has replaced its subscriptions, which the second `settled` shows, or until the proxy holds
    // back an `UNSUB` line.
    tokio::select! {
        () = async { bus.settled().await; bus.settled().await } => {}
        () = proxy.held() => {}
    }
    let mut callers = JoinSet::new();
    for _ in 0..16 {
        callers.spawn(until_answered(caller.clone()));
        // Wait, so that the requests reach the service one after the other.
        tokio::task::yield_now().await;
        caller.settled().await;
    }
    proxy.release();
    callers.join_all().await;
    service.drain().await;
}

/// Sends requests until one is answered. Requests may be refused, but none may be lost.
async fn until_answered(caller: Bus) {
    loop {
        match caller.call::<VmLatest>(&viewer(), &latest("vm")).await {
            Ok(_) => return,
            Err(fault) => assert_eq!(fault.kind, FaultKind::Unavailable, "{fault}"),
        }
        tokio::task::yield_now().await;
    }
}

/// A stopping service completes and answers the requests that it accepted before the stop.
#[tokio::test]
async fn draining_service_completes_running_requests() {
    let (nats, _folder) = nats().await;
    let (bus, caller) = tokio::join!(nats.connect("service"), nats.connect("caller"));
    let (begun, may_end) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (signal, gate) = (Arc::clone(&begun), Arc::clone(&may_end));
    let server = Server::new(&bus, Service::Metrics, SETTINGS).method(VmLatest, move |_, params| {
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
        asking.await.unwrap().unwrap().rows.as_json(),
        r#"[{"instance_id":"vm"}]"#
    );
}
