//! Runs each browser test with its own set of running programs.

use std::{cell::Cell, ffi::OsStr, os::unix::fs::symlink, path::Path, process::Stdio, time::Duration};

use testkit::{
    ADMIN, MACHINES, PATIENCE, Program, Stack, StackBuilder, THIS_MACHINE, cloud::Cloud, eventually,
    no_requests, node_and_chromium, run_in_browser,
};
use tokio::{
    process::{Child, Command},
    time::MissedTickBehavior,
};
use vmwatch_api::{Role, time::unix_millis};

use super::{
    faults::publish_faults,
    shop::{SHOP, publish_shop},
};
use crate::{
    hypervisor_samples::{measured, publish_measured},
    pages::publish_hostile_table,
    rest::client::{self, Api, publish, sample},
    versions,
};

/// Builds a test environment with the permissions of deploy/nats and an agent that reports this machine every second.
pub(super) fn with_agent() -> StackBuilder {
    client::stack()
        .replicas(Program::Agent, 1)
        .set(Program::Agent, "VMWATCH_AGENT_VM_INTERVAL", "1s")
        .set(Program::Agent, "VMWATCH_AGENT_PROCESS_INTERVAL", "1s")
}

#[tokio::test]
async fn browser_shows_the_busiest_process_now_and_in_history() {
    let stack = with_agent().set(Program::Agent, "VMWATCH_AGENT_SHORT_LIVED_ROWS", "20");
    let stack = stack.start().await;
    let folder = tempfile::tempdir().unwrap();
    let mut burning: Option<Child> = None;
    let mut storming = Vec::new();
    run_in_browser(
        &stack,
        "culprit",
        &[("VMWATCH_PAGE_VM", THIS_MACHINE)],
        async |demand| {
            let name = "culprit-e2e";
            match demand {
                "burn" => burning = Some(burner(&folder.path().join(name))),
                "rest" => {
                    let mut child = burning.take().expect("the process was started before");
                    child.kill().await.expect("the process can be killed");
                }
                "storm" => {
                    let name = "storm-e2e";
                    storming = storm(&folder.path().join(name));
                    return name.to_owned();
                }
                "calm" => storming.clear(),
                "hide" => {
                    publish_hostile_table(&stack, "hidden", unix_millis()).await;
                    return "hidden".to_owned();
                }
                "shop" => {
                    publish_shop(&stack).await;
                    return SHOP.to_owned();
                }
                other => return no_requests(other).await,
            }
            name.to_owned()
        },
    )
    .await;
}

/// Runs a program with a lower priority than the page, which Chromium runs at a lower priority than other programs.
fn in_background(program: &OsStr) -> Command {
    let mut nice = Command::new("nice");
    nice.args(["-n", "10"])
        .arg(program)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    nice
}

/// Starts a process with many threads under this name, which uses all CPU time that others leave.
fn burner(name: &Path) -> Child {
    const BURN: &str = "const { Worker, isMainThread } = require('node:worker_threads');
        if (isMainThread) for (let i = 0; i < 4; i++) new Worker(__filename);
        for (;;) {}";
    let [node, _] = node_and_chromium();
    // The name of a process is the file name under which it was started.
    symlink(node, name).unwrap();
    let script = name.with_extension("cjs");
    std::fs::write(&script, BURN).unwrap();
    in_background(name.as_os_str()).arg(script).spawn().unwrap()
}

/// Starts shells that start processes under this name, which end at once.
fn storm(name: &Path) -> Vec<Child> {
    symlink("/bin/sh", name).unwrap();
    let script = format!("while :; do {} -c :; done", name.display());
    let shell = || {
        let mut shell = in_background(OsStr::new("sh"));
        shell.args(["-c", &script]).spawn().unwrap()
    };
    (0..3).map(|_| shell()).collect()
}

#[tokio::test]
async fn operator_can_start_a_vm_in_the_browser() {
    let stack = client::stack().start().await;
    publish(&stack, &sample("decommissioned", unix_millis(), 1.0)).await;
    let machines = [MACHINES[0].0, MACHINES[1].0].join(",");
    run_in_browser(
        &stack,
        "operate",
        &[("VMWATCH_PAGE_MACHINES", &machines)],
        no_requests,
    )
    .await;
}

#[tokio::test]
async fn operator_chooses_the_hypervisor_of_a_vm_that_two_have() {
    const DISPUTED: &str = "aaaaaaaa-1111-4111-8111-111111111111";
    const LOCKED: &str = "bbbbbbbb-2222-4222-8222-222222222222";
    let folder = tempfile::tempdir().unwrap();
    let a = Cloud::start(&[(DISPUTED, "ACTIVE"), (LOCKED, "SHUTOFF")]).await;
    let b = Cloud::start(&[(DISPUTED, "SHUTOFF")]).await;
    a.lock_server(LOCKED);
    let hypervisors = [a.entry(folder.path(), "a"), b.entry(folder.path(), "b")].join(",");
    let stack = client::stack().set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisors);
    let stack = stack.start().await;
    let machines = [DISPUTED, LOCKED].join(",");
    run_in_browser(
        &stack,
        "conflict",
        &[("VMWATCH_PAGE_MACHINES", &machines)],
        no_requests,
    )
    .await;
    assert_eq!(
        (a.status(DISPUTED), b.status(DISPUTED)),
        ("SHUTOFF".to_owned(), "ACTIVE".to_owned())
    );
    assert_eq!((a.accepted("os-start"), b.accepted("os-start")), (0, 1));
}

#[tokio::test]
async fn browser_shows_faults_and_versions_of_agents() {
    let stack = client::stack()
        .set(Program::Metrics, "VMWATCH_VM_MESSAGES_PER_SECOND", "1")
        // No VM becomes silent while the browser test runs, however busy the machine is.
        .set(Program::Metrics, "VMWATCH_SILENT_AFTER", "1h")
        .start()
        .await;
    run_in_browser(&stack, "faults", &[], async |demand| {
        match demand {
            "report" => publish_faults(&stack).await,
            other => return no_requests(other).await,
        }
        "done".to_owned()
    })
    .await;
}

/// The public key of an agent.
const AGENT_KEY: &str = "UAAACAQDAQCQMBYIBEFAWDANBYHRAEISCMKBKFQXDAMRUGY4DUPB63NN";

#[tokio::test]
async fn administrator_can_add_a_vm_in_the_browser() {
    const VM: &str = "added";
    let folder = tempfile::tempdir().unwrap();
    let stack = client::stack()
        .set(
            Program::Gateway,
            "VMWATCH_PUBLIC_URL",
            "https://vmwatch.example.com",
        )
        .set(
            Program::Gateway,
            "VMWATCH_PACKAGES_DIR",
            folder.path().to_str().unwrap(),
        );
    let stack = stack.start().await;
    let environment = [("VMWATCH_PAGE_VM", VM), ("VMWATCH_PAGE_KEY", AGENT_KEY)];
    run_in_browser(&stack, "add-vm", &environment, async |demand| {
        match demand {
            "report" => publish(&stack, &sample(VM, unix_millis(), 12.5)).await,
            other => return no_requests(other).await,
        }
        "done".to_owned()
    })
    .await;
}

#[tokio::test]
async fn browser_reconnects_to_live_updates() {
    let stack = with_agent().start().await;
    let gateway = stack.replica(Program::Gateway, 0);
    run_in_browser(
        &stack,
        "live",
        &[("VMWATCH_PAGE_VM", THIS_MACHINE)],
        async |demand| {
            match demand {
                "lose" => gateway.process.kill9(),
                "regain" => gateway.restart().await,
                other => return no_requests(other).await,
            }
            "done".to_owned()
        },
    )
    .await;
}

async fn views(theme: &str) {
    let stack = with_agent().replicas(Program::Alert, 1).start().await;
    let environment = [("VMWATCH_PAGE_VM", THIS_MACHINE), ("VMWATCH_PAGE_THEME", theme)];
    run_in_browser(&stack, "views", &environment, no_requests).await;
}

#[tokio::test]
async fn every_page_view_is_accessible_in_the_light_theme() {
    views("light").await;
}

#[tokio::test]
async fn every_page_view_is_accessible_in_the_dark_theme() {
    views("dark").await;
}

#[tokio::test]
async fn page_follows_browser_language_and_works_by_keyboard() {
    let stack = with_agent().start().await;
    versions::put_newer_operation(&stack, &versions::newer_operation()).await;
    versions::append_newer_audit_record(&stack).await;
    stack.session_as("Vera", Role::Viewer).await;
    versions::give_newer_role(&stack, "Vera").await;
    run_in_browser(
        &stack,
        "preferences",
        &[("VMWATCH_PAGE_VM", THIS_MACHINE)],
        no_requests,
    )
    .await;
}

/// Publishes what the hypervisor measured in the last quarter of an hour, ending with this CPU usage.
async fn publish_measures(stack: &Stack, instance: &str, cpu_util: f64) {
    let now = unix_millis();
    for step in (0..90_u32).rev() {
        let at_ms = now - 10_000 * u64::from(step);
        let cpu = if step == 0 {
            cpu_util
        } else {
            20.0 + f64::from(step % 13)
        };
        publish_measured(stack, &measured(instance, at_ms, cpu)).await;
    }
}

#[tokio::test]
async fn browser_shows_what_the_hypervisor_measured() {
    let [(vm, _), (other, _), _] = MACHINES;
    // However busy the machine is, the samples stay recent.
    let stack = client::stack().set(Program::Metrics, "VMWATCH_SILENT_AFTER", "1h");
    let stack = stack.start().await;
    let environment = [("VMWATCH_PAGE_VM", vm), ("VMWATCH_PAGE_OTHER", other)];
    run_in_browser(&stack, "hypervisor", &environment, async |demand| {
        match demand {
            "measure 12.5" => {
                publish_measures(&stack, other, 30.0).await;
                publish_measures(&stack, vm, 12.5).await;
            }
            "measure 37.5" => publish_measured(&stack, &measured(vm, unix_millis(), 37.5)).await,
            "measure 62.5" => publish_measured(&stack, &measured(vm, unix_millis(), 62.5)).await,
            "report" => {
                for step in (0..90).rev() {
                    let at_ms = unix_millis() - 10_000 * step;
                    publish(&stack, &sample(vm, at_ms, 20.0)).await;
                }
            }
            other => return no_requests(other).await,
        }
        "done".to_owned()
    })
    .await;
}

/// Number of VMs that only report samples. The hypervisor has three more VMs.
const FLEET: u32 = 1197;
/// Index of the busiest VM.
const BUSIEST: u32 = 42;
/// Index of a VM that is idle at first and becomes the busiest.
const RISING: u32 = 333;

/// Every four seconds, publishes samples of some idle VMs and of the busy VMs, which are on the screen. The values
/// change a little each time. The VM `RISING` is the busiest while `has_risen` is set.
async fn report_fleet(stack: &Stack, is_reporting: &Cell<bool>, has_risen: &Cell<bool>) {
    let mut passes = tokio::time::interval(Duration::from_secs(4));
    passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for pass in 0_u32.. {
        passes.tick().await;
        let reports = |index: &u32| {
            is_reporting.get() && (matches!(index % 90, 3 | 85..) || [BUSIEST, RISING].contains(index))
        };
        for index in (0..FLEET).filter(reports) {
            let busy = match index {
                RISING if has_risen.get() => 99.0,
                BUSIEST => 97.0,
                _ => f64::from(index % 90) + f64::from((7 * index + 3 * pass) % 10) / 10.0,
            };
            publish(stack, &sample(&fleet_vm(index), unix_millis(), busy)).await;
        }
    }
}

fn fleet_vm(index: u32) -> String {
    format!("fleet-{index:04}")
}

#[tokio::test]
async fn browser_shows_1200_reporting_vms_and_a_year_of_history() {
    const DAY: u64 = 86_400_000;
    // No VM becomes silent while the browser test runs, however busy the machine is.
    let stack = client::stack()
        .set(Program::Metrics, "VMWATCH_SILENT_AFTER", "1h")
        // Rows beyond the retention are not stored.
        .set(Program::Metrics, "VMWATCH_VM_RETENTION", "400d");
    let stack = stack.start().await;
    let now = unix_millis();
    // The busiest VM gets its rows below.
    for index in (0..FLEET).filter(|index| *index != BUSIEST) {
        publish(&stack, &sample(&fleet_vm(index), now, f64::from(index % 90))).await;
    }
    let busiest = fleet_vm(BUSIEST);
    for day in (0..360).rev() {
        publish(&stack, &sample(&busiest, now - day * DAY, 97.0)).await;
    }
    let api = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    eventually(
        "the list has all VMs, and the busiest VM has a year of rows",
        4 * PATIENCE,
        async || {
            let list = api.read("/vms?limit=1&sort=cpu").await;
            let ready = list["total"] == FLEET + 3 && list["vms"][0]["instance_id"] == *busiest;
            ready.then_some(()).ok_or_else(|| list.to_string())
        },
    )
    .await;
    let last = MACHINES.iter().map(|machine| machine.0).max().unwrap();
    let environment = [("VMWATCH_PAGE_VM", &*busiest), ("VMWATCH_PAGE_LAST", last)];
    let (is_reporting, has_risen) = (Cell::new(false), Cell::new(false));
    let story = run_in_browser(&stack, "fleet", &environment, async |demand| {
        match demand {
            "report" => is_reporting.set(true),
            "rise" => {
                has_risen.set(true);
                return fleet_vm(RISING);
            }
            "rest" => has_risen.set(false),
            other => return no_requests(other).await,
        }
        "done".to_owned()
    });
    tokio::select! {
        _figures = story => {}
        () = report_fleet(&stack, &is_reporting, &has_risen) => {}
    }
}
