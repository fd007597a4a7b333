//! Tests the preview of rules on real data.

use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{InstanceId, Role, Scope, time::unix_millis};

use crate::{
    history_support::followed,
    rest::client::{Api, publish, sample},
};

const MINUTE: u64 = 60_000;

fn rule(condition: &Value, for_seconds: u64) -> Value {
    json!({
        "name": "a rule", "enabled": true, "condition": condition, "for_seconds": for_seconds, "severity": "warning",
        "vms": { "labels": [] },
    })
}

fn cpu_above(limit: u64) -> Value {
    let threshold = json!({ "direction": "above", "limit": limit });
    json!({ "kind": "measure", "measure": "cpu_util", "threshold": threshold })
}

async fn preview(api: &Api, condition: &Value, for_seconds: u64) -> Value {
    let reply = api
        .post("/alert-rules/preview", rule(condition, for_seconds))
        .await;
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()
}

fn vms(preview: &Value) -> Vec<&str> {
    let vms = preview["vms"].as_array().unwrap().iter();
    vms.map(|vm| vm["instance_id"].as_str().unwrap()).collect()
}

/// Publishes one sample per minute of three hours: "busy" has 97 % CPU in the second hour, and "gone" has no samples in
/// it.
async fn publish_history(stack: &Stack) {
    let now = unix_millis();
    for minute in 0..180 {
        let at_ms = now - (180 - minute) * MINUTE;
        let is_second_hour = (60..120).contains(&minute);
        let cpu = if is_second_hour { 97.0 } else { 10.0 };
        publish(stack, &sample("busy", at_ms, cpu)).await;
        if !is_second_hour {
            publish(stack, &sample("gone", at_ms, 10.0)).await;
        }
    }
    followed(stack).await;
}

#[tokio::test]
async fn preview_shows_when_a_rule_would_have_fired() {
    let stack = Stack::builder()
        .with_permissions()
        .replicas(Program::Alert, 1)
        .without_rates()
        .set(Program::Metrics, "VMWATCH_ROLLUP_INTERVAL", "200ms")
        .start()
        .await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    publish_history(&stack).await;
    let condition = cpu_above(95);
    eventually("the preview shows the busy hour", PATIENCE, async || {
        let preview = preview(&api, &condition, 900).await;
        (vms(&preview) == ["busy"])
            .then_some(())
            .ok_or_else(|| preview.to_string())
    })
    .await;
    let shown = preview(&api, &condition, 900).await;
    assert_eq!(
        (&shown["step_ms"], &shown["unread"]),
        (&json!(5 * MINUTE), &json!({}))
    );
    assert!(
        shown["evaluated"].as_u64() >= Some(2) && shown["selected"] == shown["evaluated"],
        "{shown}"
    );
    assert!(
        shown["limitation"].as_str().unwrap().contains("five minutes"),
        "{shown}"
    );
    let firing = shown["vms"][0]["firing"].as_array().unwrap();
    assert_eq!((firing.len(), &firing[0]["peak"]), (1, &json!(97.0)), "{shown}");

    // The hour is not long enough for this duration, and the VM is not busy enough for this limit.
    assert_eq!(vms(&preview(&api, &condition, 7200).await), [""; 0]);
    assert_eq!(vms(&preview(&api, &cpu_above(98), 0).await), [""; 0]);
    assert_eq!(vms(&preview(&api, &cpu_above(98), 900).await), [""; 0]);

    // While samples of the last hour wait to be stored, both VMs look silent.
    eventually("the preview shows the silent hour", PATIENCE, async || {
        let silent = preview(&api, &json!({ "kind": "agent_silent" }), 1800).await;
        (vms(&silent) == ["gone"])
            .then_some(())
            .ok_or_else(|| silent.to_string())
    })
    .await;

    let threshold = json!({ "direction": "below", "limit": 1 });
    let missing = json!({ "kind": "process_count", "name": "postgres", "threshold": threshold });
    let unknown = preview(&api, &missing, 60).await;
    assert_eq!((&unknown["evaluated"], vms(&unknown)), (&json!(0), vec![]));
    assert!(
        unknown["limitation"].as_str().unwrap().contains("processes"),
        "{unknown}"
    );

    // A user sees only the VMs of its scope.
    let scope = Scope::Only(vec!["gone".parse::<InstanceId>().unwrap()]);
    let limited = Api::with(&stack, Role::Viewer, scope).await;
    let shown = preview(&limited, &condition, 900).await;
    assert_eq!(
        (vms(&shown), &shown["evaluated"], &shown["selected"]),
        (vec![], &json!(1), &json!(1)),
        "{shown}"
    );
}
