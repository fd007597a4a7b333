//! Tests service discovery with the NATS subjects `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`.

use serde_json::Value;
use testkit::PATIENCE;
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
