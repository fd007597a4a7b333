//! Browser tests of alerts.

use std::{cell::Cell, time::Duration};

use testkit::{MACHINES, Program, Stack, no_requests, run_in_browser};
use tokio::time::MissedTickBehavior;
use vmwatch_api::{
    metrics::{CpuSeconds, ProcessOwner, Sample},
    time::unix_millis,
};

use crate::rest::client::{self, process, publish, sample};

/// Instance id of the VM that fires the alert.
const VM: &str = "alerts-1";
/// Name of the process that causes the alert.
const CULPRIT: &str = "pg_restore";
/// Interval of the samples in seconds.
const INTERVAL: f64 = 1.0;

/// A sample of the VM with four cores, whose CPU time is mostly that of one process while it is busy.
fn sample_of(is_busy: bool, now_ms: u64, started_ms: u64) -> Sample {
    let (usage, seconds) = if is_busy { (97.0, 3.2) } else { (5.0, 0.1) };
    let mut body = sample(VM, now_ms, usage);
    body.vm_cpu = Some(CpuSeconds {
        user: seconds * 1.2,
        nice: 0.0,
        system: 0.0,
    });
    let mut restore = process(CULPRIT, 4121, 100.0 * seconds / INTERVAL, started_ms);
    restore.cpu_seconds = Some(seconds);
    restore.owner = ProcessOwner {
        user: Some("postgres".to_owned()),
        parent_pid: Some(1),
        unit: Some("backup.service".to_owned()),
        command_line: Some("pg_restore --jobs 4 --dbname=orders".to_owned()),
        ..ProcessOwner::default()
    };
    body.processes = vec![restore];
    body
}

/// Publishes a sample of the VM every second.
async fn report(stack: &Stack, is_busy: &Cell<bool>) {
    let started_ms = unix_millis() - 600_000;
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(INTERVAL));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        publish(stack, &sample_of(is_busy.get(), unix_millis(), started_ms)).await;
    }
}

#[tokio::test]
async fn browser_shows_an_alert_with_its_culprit_until_it_is_resolved() {
    let stack = client::stack().replicas(Program::Alert, 1).start().await;
    let is_busy = Cell::new(false);
    let environment = [("VMWATCH_PAGE_VM", VM), ("VMWATCH_PAGE_PROCESS", CULPRIT)];
    let story = run_in_browser(&stack, "alerts", &environment, async |demand| {
        match demand {
            "burn" => is_busy.set(true),
            "rest" => is_busy.set(false),
            other => return no_requests(other).await,
        }
        "done".to_owned()
    });
    tokio::select! {
        _figures = story => {}
        () = report(&stack, &is_busy) => {}
    }
}

#[tokio::test]
async fn views_about_alerts_are_accessible_and_send_what_the_user_enters() {
    let stack = client::stack().start().await;
    let names = ["db-1", "web-1", "cache-2"];
    let machines = MACHINES.iter().zip(names);
    let machines: Vec<_> = machines.map(|((id, _), name)| format!("{id}={name}")).collect();
    let environment = [("VMWATCH_PAGE_MACHINES", &*machines.join(","))];
    run_in_browser(&stack, "alert-views", &environment, no_requests).await;
}
