//! Tests a gateway that receives more requests than its rate limit allows.

use std::time::{Duration, Instant};

use futures::future::join_all;
use testkit::{Program, Stack, figure};
use vmwatch_api::{Role, Scope};

use super::{
    answers,
    http::{Answered, Connection, address, post},
    load::quantile,
    size, soak, vm_request,
};
use crate::ingest_support::metric;

/// Clients send five times the permitted rate in an open loop. Requests up to the limit succeed, and the gateway
/// refuses the rest without sending them to the bus.
#[tokio::test]
async fn gateway_serves_requests_up_to_its_rate_limit_during_overload() {
    // An ordinary test run sends less load than `./dev soak`, because other tests run on the machine at the same time
    // and a debug build is slow.
    let cap = size(20_u32, if cfg!(debug_assertions) { 200 } else { 2000 });
    let (connections, seconds) = (size(50_u32, 400), size(10, 30));
    let stack = Stack::builder()
        .without_read_limit()
        .set(
            Program::Gateway,
            "VMWATCH_MAX_REQUESTS_PER_SECOND",
            &cap.to_string(),
        )
        .start()
        .await;
    let gateway = stack.gateway(0);
    // The VM is outside the user's scope, so that metrics-svc answers without the database. This test does not measure
    // the speed of the database.
    let scope = Scope::Only(vec!["another-vm".parse().unwrap()]);
    let session = stack.session(Role::Viewer, scope).await;
    answers(gateway, &session).await;
    let metrics = stack.replica(Program::Metrics, 0);
    let before = metric(metrics, "vmwatch_requests_total").await;

    let request = post(&vm_request(&session).to_string());
    let address = address(gateway);
    let opened = join_all((0..connections).map(|_| Connection::open(&address))).await;
    let pause = Duration::from_secs(1) * connections / (5 * cap);
    let each = 5 * cap * seconds / connections;
    let began = Instant::now() + pause;
    let asking = opened.into_iter().zip(0..).map(async |(connection, index)| {
        let mut connection = connection.unwrap();
        let mut seen: Vec<(Answered, Duration)> = Vec::new();
        for turn in 0..each {
            // If a request is sent late, its duration still counts from the time at which it was due.
            let due = began + pause * index / connections + pause * turn;
            tokio::time::sleep_until(due.into()).await;
            let answer = connection.ask(&request).await.unwrap();
            seen.push((answer, due.elapsed()));
        }
        seen
    });
    let seen: Vec<_> = join_all(asking).await.into_iter().flatten().collect();
    let took = began.elapsed().as_secs_f64();

    let (good, refused): (Vec<_>, Vec<_>) = seen.iter().partition(|(answer, _)| answer.http == 200);
    for (answer, _) in &refused {
        assert_eq!((answer.http, answer.status()), (503, 3), "{answer:?}");
        assert!(answer.head.contains("\r\nretry-after: 1\r\n"), "{answer:?}");
    }
    assert!(good.iter().all(|(answer, _)| answer.status() == 1));
    let waits: Vec<_> = refused.iter().map(|(_, took)| *took).collect();
    let goodput = good.len() as f64 / took;
    let p99 = quantile(&waits, 0.99);
    figure("faults_overload_cap_per_s", f64::from(cap));
    figure("faults_overload_offered_per_s", seen.len() as f64 / took);
    figure("faults_overload_goodput_per_s", goodput);
    figure("faults_overload_refusal_p50_ms", quantile(&waits, 0.5));
    figure("faults_overload_refusal_p99_ms", p99);
    assert!(
        goodput >= 0.9 * f64::from(cap),
        "{goodput} successful requests per second at a limit of {cap}"
    );
    let reached = metric(metrics, "vmwatch_requests_total").await - before;
    assert_eq!(
        reached,
        good.len() as f64,
        "refused requests must not reach the bus"
    );
    // The bound is asserted only under `./dev soak` with a release build, because in an ordinary test run other tests
    // share the machine.
    let measures = soak().is_some() && !cfg!(debug_assertions);
    assert!(
        !measures || p99 < 50.0,
        "the 99th percentile of refusals took {p99} ms"
    );
}
