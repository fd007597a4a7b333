//! Leaving a queue group: no request is lost.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use e2e::{PATIENCE, eventually};
use serde_json::json;
use shared::{
    api::{Service, metrics::VmLatest},
    bus::serve::Server,
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{SETTINGS, Served, answers, echo, latest, nats, rows_of, viewer};

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
                assert_eq!(
                    rows.rows.as_json(),
                    json!([{ "instance_id": instance }]).to_string()
                );
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
        asking.await.unwrap().unwrap().rows.as_json(),
        r#"[{"instance_id":"vm"}]"#
    );
}
