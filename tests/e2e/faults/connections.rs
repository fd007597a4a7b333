//! Tests HTTP connections whose clients send slowly or not at all.

use std::time::{Duration, Instant};

use futures::future::join_all;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testkit::{Gateway, Program, Stack, figure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant as Moment, Interval, interval_at},
};

use super::{
    answers,
    http::{Connection, address},
    load::{Client, Load, quantile},
    session, size, soak, vm_request,
};
use crate::ingest_support::{metric, resident};

/// Pause between two bytes of a slow sender. If each byte restarted the gateway's time limit, the gateway would never
/// close the connection, because this pause is much shorter than the limit.
const DRIP: Duration = Duration::from_millis(200);

/// Sets the limit of open files of this process and its future children. `None` sets the maximum.
fn allow_open_files(files: Option<u64>) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = files.or(maximum);
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
}

async fn open_many(gateway: &Gateway, count: usize) -> Vec<Connection> {
    let (address, mut opened) = (address(gateway), Vec::new());
    // Opens at most 100 connections at once, so that they fit into the listener's queue.
    while opened.len() < count {
        let some = (0..100.min(count - opened.len())).map(|_| Connection::open(&address));
        opened.extend(join_all(some).await.into_iter().map(Result::unwrap));
    }
    opened
}

/// Returns the 99th percentile, in milliseconds, of the durations of `requests` consecutive requests. All of them must
/// succeed.
async fn p99(gateway: &Gateway, session: &str, requests: usize) -> f64 {
    let clients = vec![(Client::of(&[gateway], 0), vm_request(session))];
    let (seen, ()) = Load::default()
        .during(clients, async |load| load.goes_on(requests).await)
        .await;
    assert!(seen.iter().all(super::load::Seen::is_good), "{seen:?}");
    quantile(&seen.iter().map(|seen| seen.took).collect::<Vec<_>>(), 0.99)
}

/// Sends the head of a request and one byte per tick until the gateway closes the connection. Returns how long that took.
async fn drip(mut connection: Connection, head: &'static str, mut ticks: Interval) -> Duration {
    let began = Instant::now();
    ticks.tick().await;
    let stream = &mut connection.stream;
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    loop {
        tokio::select! {
            read = stream.read_buf(&mut answer) => match read {
                Ok(0) | Err(_) => return began.elapsed(),
                Ok(_) => {}
            },
            _ = ticks.tick() => {
                if stream.write_all(b"x").await.is_err() {
                    return began.elapsed();
                }
            }
        }
    }
}

/// The gateway closes connections with slow heads or bodies at its time limit, and serves other clients meanwhile. The
/// slow senders run in their own thread, so that they do not delay the measured requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn gateway_disconnects_slow_senders_at_time_limit() {
    const SENDERS: usize = 1000;
    let limit = Duration::from_secs(2);
    allow_open_files(None);
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_REQUEST_TIMEOUT", "2s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    let requests = size(200, 2_000);
    let without = p99(gateway, &session, requests).await;

    let senders = open_many(gateway, SENDERS).await;
    let heads = [
        "POST /wsgi_app.py HTTP/1.1\r\nHost: vmwatch\r\nX-Slow: ",
        "POST /wsgi_app.py HTTP/1.1\r\nHost: vmwatch\r\nContent-Length: 1000\r\n\r\n{",
    ];
    let senders = senders.into_iter().zip(heads.into_iter().cycle());
    // The senders start at different times, as independent clients do.
    let ticks = |index| interval_at(Moment::now() + DRIP.mul_f64(index as f64 / SENDERS as f64), DRIP);
    let dripping: Vec<_> = senders
        .enumerate()
        .map(|(index, (sender, head))| tokio::spawn(drip(sender, head, ticks(index))))
        .collect();
    let with = p99(gateway, &session, requests).await;
    let open = join_all(dripping).await.into_iter().map(Result::unwrap);
    let longest = open.max().unwrap_or_default();
    figure("faults_slow_senders", SENDERS as f64);
    figure("faults_slow_senders_longest_open_ms", longest.as_secs_f64() * 1e3);
    figure("faults_slow_senders_others_p99_ms", with);
    figure("faults_slow_senders_others_p99_without_ms", without);
    // The additional three seconds allow for a busy machine that closes a thousand connections.
    assert!(longest < limit + Duration::from_secs(3), "{longest:?}");
    assert!(
        soak().is_none() || with < 2.0 * without,
        "the 99th percentile rose from {without} ms to {with} ms"
    );
}

/// Idle connections use a bounded amount of the gateway's memory and do not slow other requests.
#[tokio::test]
async fn idle_connections_do_not_slow_other_requests() {
    let idle = size(1_200, 10_000);
    // The gateway starts with the usual limit of open files and raises it itself.
    allow_open_files(Some(1024));
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_REQUEST_TIMEOUT", "5m")
        .set(Program::Gateway, "VMWATCH_MAX_CONNECTIONS", "11000")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    allow_open_files(None);
    let requests = size(200, 5_000);
    let without = p99(gateway, &session, requests).await;
    let before = resident(&gateway.replica.process);

    let connections = open_many(gateway, idle).await;
    let with = p99(gateway, &session, requests).await;
    let open = metric(&gateway.replica, "vmwatch_http_connections").await;
    assert!(open >= idle as f64, "only {open} of {idle} connections are open");
    let memory = resident(&gateway.replica.process).saturating_sub(before) as f64 / idle as f64;
    drop(connections);
    figure("faults_idle_connections", idle as f64);
    figure("faults_idle_connection_kib", memory);
    figure("faults_idle_others_p99_ms", with);
    figure("faults_idle_others_p99_without_ms", without);
    assert!(memory < 32.0, "each connection uses {memory} KiB");
    assert!(
        soak().is_none() || with < 2.0 * without,
        "the 99th percentile rose from {without} ms to {with} ms"
    );
}
