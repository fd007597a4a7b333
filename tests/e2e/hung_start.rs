//! Tests the start of a VM whose hypervisor accepts the request and then hangs.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{
    PATIENCE, Program,
    cloud::{At, Cloud},
    eventually,
};
use vmwatch_api::{Role, Scope};

use crate::rest::client::{Api, stack};

const VM: &str = "aaaaaaaa-1111-4111-8111-111111111111";
/// Deadline of commands, which is shorter than the time limit of a call to the hypervisor.
const DEADLINE: Duration = Duration::from_secs(2);
const CALL_LIMIT: Duration = Duration::from_mins(1);

/// The caller gets an answer at the deadline. The operation continues, is not sent again, and ends with the state that the
/// hypervisor then reports.
#[tokio::test]
async fn start_that_hangs_beyond_its_deadline_is_answered_and_continues() {
    let folder = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(&[(VM, "SHUTOFF")]).await;
    let hypervisors = cloud.entry(folder.path(), "cloud");
    let stack = stack()
        .set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisors)
        .set(
            Program::Lifecycle,
            "VMWATCH_HYPERVISOR_TIMEOUT",
            &format!("{}s", CALL_LIMIT.as_secs()),
        )
        .set(
            Program::Gateway,
            "VMWATCH_COMMAND_DEADLINE",
            &format!("{}s", DEADLINE.as_secs()),
        );
    let stack = stack.start().await;
    let api = Api::with(&stack, Role::Operator, Scope::All).await;
    let session = stack.session_as("ann", Role::Operator).await;
    let operation = async || -> Value {
        let page = api.read(&format!("/operations?instance_id={VM}")).await;
        let operations = page["operations"].as_array().unwrap();
        assert!(operations.len() <= 1, "{page}");
        operations.first().cloned().unwrap_or_default()
    };
    cloud.hold(At::Arrived);

    let began = Instant::now();
    let answer = stack.gateway(0).start_vm(&session, VM).await;
    assert_eq!(answer.status(), 4, "{answer:?}");
    assert!(answer.message().contains("deadline"), "{answer:?}");
    let took = began.elapsed();
    assert!(took >= DEADLINE && took < CALL_LIMIT / 2, "{took:?}");
    assert_eq!(cloud.held(At::Arrived), 1);
    let hanging = operation().await;
    assert_eq!(hanging["state"], "running", "{hanging}");
    assert_eq!(cloud.status(VM), "SHUTOFF");

    cloud.release(At::Arrived);
    let ended = eventually("the operation has ended", PATIENCE, async || {
        let operation = operation().await;
        let has_ended = operation["finished_at"].is_string();
        has_ended.then(|| operation.clone()).ok_or(operation.to_string())
    })
    .await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert_eq!(ended["id"], hanging["id"]);
    assert_eq!(cloud.accepted("os-start"), 1);
    eventually("the VM is listed as running", PATIENCE, async || {
        let vm = api.read(&format!("/vms/{VM}")).await;
        let is_running = vm["state"] == json!("running");
        is_running.then_some(()).ok_or_else(|| vm.to_string())
    })
    .await;
}
