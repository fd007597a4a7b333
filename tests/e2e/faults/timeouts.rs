//! Requests that nobody answers.

use std::time::Duration;

use futures::future::join_all;
use testkit::{Program, Stack, eventually, figure};
use vmwatch_api::{Method, Role, Scope, metrics::VmLatest};

use super::{
    http::{Connection, address, post},
    size, vm_request,
};
use crate::ingest_support::{metric, resident};

/// async-nats 0.51 by itself keeps 333 bytes of each request that timed out, for ever (measured over 100,000).
#[tokio::test]
async fn timed_out_requests_leave_nothing_behind() {
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
    // Whoever listens and says nothing.
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
    eventually("nobody waits", Duration::from_secs(5), async || {
        let waiting = metric(&gateway.replica, "vmwatch_bus_replies_awaited").await;
        (waiting == 0.0).then_some(()).ok_or(waiting.to_string())
    })
    .await;
    assert!(
        grown < 1024 + requests as u64 / 8,
        "{grown} KiB for {requests} requests"
    );
    drop(silent);
}
