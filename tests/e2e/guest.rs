//! The complete path: a VM that is off is started over HTTP, and the samples of its own agent are read over HTTP under
//! the id that libvirt gave it. Uses real libvirtd, QEMU and a real kernel.

use std::time::{Duration, Instant};

use serde_json::json;
use testkit::{Libvirtd, Program, Stack, codes, eventually, figure};
use vmwatch_api::{Role, Scope, lifecycle::MachineState};

const GUEST: &str = "5d6b1c9a-3f0e-4a57-9a86-2f4c1e0b7d11";
/// Time from power-on to the guest's first row: ten seconds on idle cores; this limit allows for two busy cores without
/// KVM.
const BOOT: Duration = Duration::from_mins(2);

#[tokio::test]
async fn starts_real_guest_and_stores_its_rows() {
    let libvirtd = Libvirtd::start().await;
    let hypervisor = format!("lab={}", libvirtd.uri());
    let stack = Stack::builder()
        .set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisor)
        .start()
        .await;
    // 10.0.2.2 is this machine's loopback address in QEMU's user network.
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
    let first = eventually("the guest's VM row arrives", BOOT, async || {
        let rows = gateway.rows(&session, codes::VM, 1, query.clone()).await;
        rows.first()
            .cloned()
            .ok_or_else(|| format!("its console says:\n{}", libvirtd.console(GUEST)))
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
        "too few processes for a kernel and its threads: {row}"
    );

    let processes = eventually("the guest's processes arrive", BOOT, async || {
        let rows = gateway
            .rows(&session, codes::PROCESSES, 1000, query.clone())
            .await;
        if rows.iter().any(|row| row["cmd"] == "vmwatch-agent") {
            Ok(rows)
        } else {
            Err(format!("{} rows", rows.len()))
        }
    });
    let names: Vec<_> = processes
        .await
        .iter()
        .map(|row| row["cmd"].as_str().unwrap().to_owned())
        .collect();
    assert!(names.iter().any(|name| name == "init"), "{names:?}");
}
