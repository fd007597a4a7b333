//! Tests the complete path with a real libvirtd, QEMU and a real kernel: a VM that is off is started over HTTP, its own
//! agent publishes samples, and these are read over HTTP under the id that libvirt gave the VM.

use std::time::{Duration, Instant};

use serde_json::json;
use testkit::{Libvirtd, Program, Stack, codes, eventually, figure};
use vmwatch_api::{Role, Scope, lifecycle::MachineState};

const GUEST: &str = "5d6b1c9a-3f0e-4a57-9a86-2f4c1e0b7d11";
/// Time limit from power-on to the guest's first row. This takes ten seconds on idle cores; the limit is long enough
/// for two busy cores without KVM.
const BOOT: Duration = Duration::from_mins(2);

#[tokio::test]
async fn guest_started_over_http_reports_its_rows() {
    let libvirtd = Libvirtd::start().await;
    let hypervisor = format!("lab={}", libvirtd.uri());
    let stack = Stack::builder()
        .set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisor)
        .start()
        .await;
    // QEMU's user network maps 10.0.2.2 to this machine's loopback address.
    let bus = stack.nats.url().replace("127.0.0.1", "10.0.2.2");
    let every = [
        ("NATS_URL", &*bus),
        ("AGENT_VM_INTERVAL", "1s"),
        ("AGENT_PROCESS_INTERVAL", "1s"),
    ];
    libvirtd.define_guest(GUEST, &every);
    let session = stack.session(Role::Operator, Scope::All).await;
    let gateway = stack.gateway(0);

    assert_eq!(libvirtd.virsh(&["domstate", GUEST]), "shut off");
    let posted = Instant::now();
    let answer = gateway.start_vm(&session, GUEST).await;
    assert_eq!((answer.http, answer.status()), (200, 1), "{answer:?}");
    assert_eq!(libvirtd.virsh(&["domstate", GUEST]), "running");
    assert_eq!(stack.machine_state(GUEST).await, MachineState::Running);
    let running = posted.elapsed();

    let query = json!({ "instance_id": GUEST });
    let first = eventually("the guest's first VM row is stored", BOOT, async || {
        let rows = gateway.rows(&session, codes::VM, 1, query.clone()).await;
        rows.first().cloned().ok_or_else(|| {
            format!(
                "no VM row; the guest's console shows:\n{}",
                libvirtd.console(GUEST)
            )
        })
    });
    let row = first.await;
    figure("startmonitor_to_running_seconds", running.as_secs_f64());
    figure(
        "startmonitor_to_first_row_seconds",
        posted.elapsed().as_secs_f64(),
    );
    assert_eq!(row["instance_id"], GUEST);
    assert!(
        row["proc"].as_u64().unwrap() > 10,
        "the process count is too low for a kernel with its threads: {row}"
    );

    let processes = eventually("the guest's process rows are stored", BOOT, async || {
        let rows = gateway
            .rows(&session, codes::PROCESSES, 1000, query.clone())
            .await;
        if rows.iter().any(|row| row["cmd"] == "vmwatch-agent") {
            Ok(rows)
        } else {
            Err(format!("none of {} process rows is of vmwatch-agent", rows.len()))
        }
    });
    let names: Vec<_> = processes
        .await
        .iter()
        .map(|row| row["cmd"].as_str().unwrap().to_owned())
        .collect();
    assert!(names.iter().any(|name| name == "init"), "{names:?}");
}
