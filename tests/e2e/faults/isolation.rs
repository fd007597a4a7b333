//! Isolation: overload of one kind leaves everything else usable.
//!
//! Each row of the matrix is an overload. Each cell is a kind of work that must succeed during it, within a bound far
//! above its usual time and far below the deadline.

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

/// Duration of each overload.
fn row_length() -> Duration {
    size(Duration::from_secs(5), Duration::from_secs(30))
}

/// Logins per second of a flood.
const FLOOD_RATE: u32 = 400;
/// Clients that follow live events.
const READERS: usize = 1000;
/// The rate at which the packet filter of deploy/nats lets a guest send, in bytes per second.
const GUEST_RATE: u32 = 128 * 1024;
/// Maximum memory of the gateway in KiB, for every overload.
const GATEWAY_MEMORY: u64 = 128 * 1024;

/// Runs the cells during a load, and compares each with its bound.
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

/// The number of requests that the gateway refused.
async fn refused(stack: &Stack) -> f64 {
    metric(&stack.gateway(0).replica, "vmwatch_requests_shed_total").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overload_of_one_kind_leaves_other_work_usable() {
    let stack = Stack::builder()
        .with_permissions()
        // A flood can come from many addresses.
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
    assert!(refused(&stack).await > before, "the flood was no overload");
    compare_reads(&quiet, &flood);

    let before = refused(&stack).await;
    // Floods from many addresses delay other logins, so logins are not asserted.
    let leaves_out = [Cell::Login];
    row("distributed_login_flood", &stack, &leaves_out, async |over| {
        loads::distributed_login_flood(gateway, FLOOD_RATE, &over).await;
    })
    .await;
    assert!(refused(&stack).await > before, "the flood was no overload");

    let before = refused(&stack).await;
    let viewer = HeavyViewer::prepare(&stack).await;
    row("heavy_viewer", &stack, &[], async |over| viewer.read(&over).await).await;
    assert!(refused(&stack).await > before, "the viewer was no overload");

    let readers = EventReaders::prepare(&stack, READERS).await;
    row("event_readers", &stack, &[], async |over| {
        readers.follow(&over).await;
    })
    .await;
    assert_eq!(readers.connected(), READERS, "some readers were disconnected");
    figure("isolation_event_readers", READERS as f64);
    figure(
        "isolation_event_readers_sent_mib",
        readers.sent() as f64 / f64::from(1 << 20),
    );
    drop(readers);

    let dead = DeadHosts::listen().await;
    add_hypervisors(&stack, &dead.hypervisors()).await;
    row("hung_hypervisors", &stack, &[], async |over| {
        loads::ask_dead_hosts(&stack, &over).await;
    })
    .await;
    assert!(dead.all_were_asked(), "the hosts were no overload");

    // The guest is last, because its messages wait in the stream after it has ended. docs/security.md states what a
    // guest does to ingestion without the packet filter of deploy/nats.
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
    assert!(memory <= GATEWAY_MEMORY, "the gateway used {memory} KiB");
}

/// Restarts lifecycle-svc with more hypervisors.
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

/// The effect of a flood of logins on users that already have a session.
fn compare_reads(quiet: &Took, flood: &Took) {
    let p99 = |took: &Took| quantile(took.of(Cell::Read), 0.99);
    let (without, with) = (p99(quiet), p99(flood));
    figure("isolation_login_flood_reads_p99_ms", with);
    figure("isolation_login_flood_reads_p99_without_ms", without);
    // Asserted only in the long form on a release build, because other tests share the machine in the short form.
    let measures = soak().is_some() && !cfg!(debug_assertions);
    assert!(
        !measures || with <= f64::max(2.0 * without, 10.0),
        "{without} ms became {with} ms"
    );
}

/// The maximum resident memory of a process so far, in KiB.
fn peak_memory(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
