//! Tests service discovery with the NATS subjects `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`.

use serde_json::Value;
use testkit::{PATIENCE, eventually};
use tokio_util::sync::CancellationToken;
use vmwatch_api::metrics::VmLatest;
use vmwatch_bus::Context;

use super::{ask_all, echo, latest, nats, viewer};

/// `nats micro ls`, `nats micro info` and `nats micro stats` find every replica, with its request counts.
#[tokio::test]
async fn every_replica_answers_nats_service_discovery() {
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
    let gone = caller
        .client_for_tests()
        .request("$SRV.PING", "".into())
        .await
        .unwrap_err();
    assert_eq!(gone.kind(), async_nats::RequestErrorKind::NoResponders);
}

/// Programs find all running replicas, also of a program without methods, until these have ended.
#[tokio::test]
async fn running_programs_are_found_with_their_versions() {
    let (nats, _folder) = nats().await;
    let (server, edge, caller) = tokio::join!(
        nats.connect("server"),
        nats.connect("edge"),
        nats.connect("caller")
    );
    assert_eq!(caller.discover().await.unwrap(), []);
    let replica = echo(&server, 1).await;
    let (shutdown, announced) = (CancellationToken::new(), edge.clone());
    let until = shutdown.clone();
    let announcing = tokio::spawn(async move { announced.announce("vmwatch-gateway", until).await });
    let found = eventually("both programs are found", PATIENCE, async || {
        let found = caller.discover().await.unwrap();
        (found.len() == 2)
            .then_some(found.clone())
            .ok_or_else(|| format!("{found:?}"))
    })
    .await;
    let names = found
        .iter()
        .map(|replica| (replica.name.as_str(), replica.version.as_str()));
    let version = env!("CARGO_PKG_VERSION");
    let expected = [("vmwatch-gateway", version), ("vmwatch-metrics", version)];
    assert_eq!(names.collect::<Vec<_>>(), expected);
    assert_ne!(found[0].id, found[1].id);
    // Only services describe their methods.
    let infos = ask_all(&caller, "$SRV.INFO", 1).await;
    assert_eq!(infos[0]["name"], "vmwatch-metrics");

    shutdown.cancel();
    announcing.await.unwrap();
    replica.drain().await;
    eventually("no program is found any more", PATIENCE, async || {
        let found = caller.discover().await.unwrap();
        found.is_empty().then_some(()).ok_or_else(|| format!("{found:?}"))
    })
    .await;
    nats.server.kill9();
    eventually("programs cannot be found without NATS", PATIENCE, async || {
        let found = caller.discover().await;
        found.err().map(drop).ok_or("NATS still answers".to_owned())
    })
    .await;
}
