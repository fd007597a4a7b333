//! Actions on VMs, and live events.

use serde_json::Value;
use testkit::{Cli, MACHINES, PATIENCE, Stack, eventually};
use vmwatch_api::{Role, lifecycle::MachineState};

use super::user;
use crate::rest::client::stack;

async fn listed(cli: &Cli) {
    eventually("the VMs of the hypervisor are listed", PATIENCE, async || {
        let vms = cli.output(&["vms"]);
        if vms.contains("vm-0") { Ok(()) } else { Err(vms) }
    })
    .await;
}

#[tokio::test]
async fn start_waits_for_the_result() {
    let stack = stack().start().await;
    let cli = user(&stack, Role::Operator).await;
    listed(&cli).await;
    let operation = cli.output(&["start", "vm-0", "--wait", "--json"]);
    let operation: Value = serde_json::from_str(&operation).unwrap();
    assert_eq!(
        (&operation["state"], &operation["machine_state"]),
        (&"succeeded".into(), &"running".into())
    );
    assert_eq!(stack.machine_state(MACHINES[0].0).await, MachineState::Running);

    let operations = cli.output(&["operations", "--vm", "vm-0"]);
    assert!(
        operations.contains("start") && operations.contains("succeeded"),
        "{operations}"
    );
    cli.output(&["stop", MACHINES[0].0, "--force", "--wait"]);
    assert_eq!(stack.machine_state(MACHINES[0].0).await, MachineState::ShutOff);
    let newest = cli.output(&["operations", "-n", "1"]);
    assert!(newest.contains("force-stop"), "{newest}");
}

#[tokio::test]
async fn failed_action_has_its_own_exit_code() {
    let stack = stack().start().await;
    let cli = user(&stack, Role::Operator).await;
    listed(&cli).await;
    let (code, error) = cli.failure(&["reboot", "vm-0", "--wait"]);
    assert!(matches!(code, 1 | 65), "{code}: {error}");
    assert_eq!(cli.failure(&["start", "nosuch"]).0, 66);
    let (code, error) = cli.failure(&["start", "vm-0", "--hypervisor", "nosuch", "--wait"]);
    assert!(matches!(code, 1 | 66), "{code}: {error}");
    let viewer = user(&stack, Role::Viewer).await;
    let (code, error) = viewer.failure(&["start", "vm-0"]);
    assert_eq!(code, 77, "{error}");
}

#[tokio::test]
async fn events_are_followed_across_a_restart_of_the_gateway() {
    let stack = stack().start().await;
    let cli = user(&stack, Role::Operator).await;
    listed(&cli).await;
    let lines = follow_operations(&stack, &cli).await;
    let first = "start by test-operator";
    act(&stack, &cli, "start").await;
    contains(&lines, first).await;

    let gateway = &stack.gateway(0).replica;
    gateway.process.kill9();
    contains(&lines, "connection lost (").await;
    gateway.restart().await;
    contains(&lines, "connected again").await;
    act(&stack, &cli, "stop").await;
    contains(&lines, "stop by test-operator").await;
}

async fn follow_operations(stack: &Stack, cli: &Cli) -> testkit::Process {
    let process = cli.start(&["events", "-f", "--kind", "operation"]);
    // The command prints nothing when it is connected.
    let gateway = &stack.gateway(0).replica;
    eventually("the events are followed", PATIENCE, async || {
        let readers = gateway.metric("vmwatch_event_readers").await;
        if readers == Some(1.0) {
            Ok(())
        } else {
            Err(format!("{readers:?} readers"))
        }
    })
    .await;
    process
}

async fn act(stack: &Stack, cli: &Cli, action: &str) {
    let mut args = vec![action, "vm-0", "--wait"];
    if action == "stop" {
        args.push("--force");
    }
    stack.ready().await;
    cli.output(&args);
}

async fn contains(process: &testkit::Process, text: &str) {
    eventually(&format!("the output contains \"{text}\""), PATIENCE, async || {
        let output = process.log();
        if output.contains(text) {
            Ok(())
        } else {
            Err(output)
        }
    })
    .await;
}

#[tokio::test]
async fn events_end_after_a_number_of_them() {
    let stack = stack().start().await;
    let cli = user(&stack, Role::Operator).await;
    listed(&cli).await;
    let process = cli.start(&[
        "events",
        "--json",
        "--count",
        "1",
        "--vm",
        "vm-0",
        "--kind",
        "operation",
    ]);
    let ended = eventually("an event was printed", PATIENCE, async || {
        // The command may not be connected yet, so the first action may be missed.
        cli.run(&["start", "vm-0", "--wait"]);
        process.ended().ok_or_else(|| process.log())
    })
    .await;
    assert!(ended.success());
    let event: Value = serde_json::from_str(&process.log()).unwrap();
    assert_eq!(
        (&event["kind"], &event["data"]["action"]),
        (&"operation".into(), &"start".into())
    );
}
