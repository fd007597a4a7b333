//! Tests isolation: while the system is overloaded in one way, all other kinds of work must remain usable.
//!
//! The test applies one overload after the other. During each overload, it repeats every other kind of work (module
//! `cells`), which must succeed within a bound far above its usual duration and far below its deadline.

mod cells;
mod loads;

use std::{fs, time::Duration};

use testkit::{Process, Program, Stack, figure};
use tokio_util::sync::CancellationToken;

use self::{
    cells::{Bystander, Cell, Took},
    loads::{DeadHosts, EventReaders, HeavyViewer},
};
use super::{load::quantile, size, soak};
use crate::ingest_support::metric;

/// Returns the duration of each overload.
fn row_length() -> Duration {
    size(Duration::from_secs(5), Duration::from_secs(30))
}

/// Number of logins per second in a login flood.
const FLOOD_RATE: u32 = 400;
/// Number of clients that follow live events.
const READERS: usize = 1000;
/// The rate in bytes per second at which the packet filter in deploy/nats lets a guest send.
const GUEST_RATE: u32 = 128 * 1024;
/// Maximum resident memory of the gateway in KiB, over all overloads.
const GATEWAY_MEMORY: u64 = 128 * 1024;

/// Applies one overload, repeats every other kind of work meanwhile, and asserts that each kind stays within its bound.
async fn row(
    name: &str,
    stack: &Stack,
    leaves_out: &[Cell],
    load: impl AsyncFnOnce(CancellationToken),
) -> Took {
    let bystander = Bystander::prepare(stack).await;
    let over = CancellationToken::new();
    let working = async {
        let took = bystander.work(row_length(), leaves_out).await;
        over.cancel();
        took
    };
    let (took, ()) = tokio::join!(working, load(over.clone()));
    took.check(name);
    took
}

/// Returns the number of requests that the gateway refused because it was overloaded.
async fn refused(stack: &Stack) -> f64 {
    metric(&stack.gateway(0).replica, "vmwatch_requests_shed_total").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_overload_leaves_all_other_work_usable() {
    let stack = Stack::builder()
        .with_permissions()
        // The gateway trusts `X-Forwarded-For` from loopback, so that a flood can appear to come from many addresses.
        .set(Program::Gateway, "VMWATCH_TRUSTED_PROXIES", "127.0.0.0/8")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let quiet = row("quiet", &stack, &[], async |_| {}).await;

    let before = refused(&stack).await;
    let flood = row("login_flood", &stack, &[], async |over| {
        loads::login_flood(gateway, FLOOD_RATE, &over).await;
    })
    .await;
    assert!(
        refused(&stack).await > before,
        "the gateway refused no request, so the flood was no overload"
    );
    compare_reads(&quiet, &flood);

    let before = refused(&stack).await;
    // A flood from many addresses may delay all logins, so logins have no bound here.
    let leaves_out = [Cell::Login];
    row("distributed_login_flood", &stack, &leaves_out, async |over| {
        loads::distributed_login_flood(gateway, FLOOD_RATE, &over).await;
    })
    .await;
    assert!(
        refused(&stack).await > before,
        "the gateway refused no request, so the flood was no overload"
    );

    let before = refused(&stack).await;
    let viewer = HeavyViewer::prepare(&stack).await;
    row("heavy_viewer", &stack, &[], async |over| viewer.read(&over).await).await;
    assert!(
        refused(&stack).await > before,
        "the gateway refused no request, so the viewer's reads were no overload"
    );

    let readers = EventReaders::prepare(&stack, READERS).await;
    row("event_readers", &stack, &[], async |over| {
        readers.follow(&over).await;
    })
    .await;
    assert_eq!(
        readers.connected(),
        READERS,
        "some readers of live events were disconnected"
    );
    figure("isolation_event_readers", READERS as f64);
    figure(
        "isolation_event_readers_sent_mib",
        readers.sent() as f64 / f64::from(1 << 20),
    );
    drop(readers);

    let dead = DeadHosts::listen().await;
    add_hypervisors(&stack, &dead.hypervisors()).await;
    let mut hung_calls = 0;
    row("hung_hypervisors", &stack, &[], async |over| {
        let asking = loads::ask_dead_hosts(&stack, &over);
        let looking = async { hung_calls = loads::calls_with_own_threads(&stack).await };
        tokio::join!(asking, looking);
    })
    .await;
    assert!(dead.all_were_asked(), "some hanging hypervisors received no call");
    figure("isolation_hung_calls", hung_calls as f64);

    // The overloads by a guest come last, because messages of the guest are still in the stream afterwards.
    // docs/security.md states how a guest affects ingestion if the packet filter of deploy/nats is not in use.
    row("limited_guest", &stack, &[], async |over| {
        Box::pin(loads::hostile_guest(&stack, Some(GUEST_RATE), &over)).await;
    })
    .await;
    row("hostile_guest", &stack, &[Cell::Ingest], async |over| {
        Box::pin(loads::hostile_guest(&stack, None, &over)).await;
    })
    .await;

    let memory = peak_memory(&gateway.replica.process);
    figure("isolation_gateway_peak_mib", memory as f64 / 1024.0);
    assert!(
        memory <= GATEWAY_MEMORY,
        "the gateway's memory reached {memory} KiB"
    );
}

/// Restarts lifecycle-svc with the given hypervisors in addition to its own.
async fn add_hypervisors(stack: &Stack, more: &str) {
    const SETTING: &str = "VMWATCH_HYPERVISORS";
    let lifecycle = stack.replica(Program::Lifecycle, 0);
    let given = lifecycle.process.setting(SETTING);
    lifecycle.process.set(SETTING, &format!("{given},{more}"));
    lifecycle.process.set("VMWATCH_HYPERVISOR_TIMEOUT", "1s");
    lifecycle
        .process
        .set("VMWATCH_HYPERVISOR_CALLS", DeadHosts::CALLS);
    lifecycle.process.kill9();
    lifecycle.restart().await;
}

/// Records how much a flood of logins slows the reads of users who already have a session.
fn compare_reads(quiet: &Took, flood: &Took) {
    let p99 = |took: &Took| quantile(took.of(Cell::Read), 0.99);
    let (without, with) = (p99(quiet), p99(flood));
    figure("isolation_login_flood_reads_p99_ms", with);
    figure("isolation_login_flood_reads_p99_without_ms", without);
    // The bound is asserted only under `./dev soak` with a release build, because in an ordinary test run other tests
    // share the machine.
    let measures = soak().is_some() && !cfg!(debug_assertions);
    assert!(
        !measures || with <= f64::max(2.0 * without, 10.0),
        "the 99th percentile of reads rose from {without} ms to {with} ms"
    );
}

/// Returns the maximum resident memory of a process so far, in KiB.
fn peak_memory(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
