//! Tests the marks of a VM's charts.

use serde_json::{Value, json};
use testkit::{MACHINES, PATIENCE, Program, Stack, eventually};
use vmwatch_api::{InstanceId, Role, Scope, time::unix_millis};

use crate::{
    history_support::{MINUTE, SECOND, stored},
    rest::client::{Api, process, publish, rfc3339, sample, stack},
};

/// The samples of the VM: its age in minutes, and for how many minutes the VM and its agent had run by now.
const SAMPLES: [(u64, u64, u64); 3] = [(50, 55, 54), (20, 30, 29), (10, 30, 15)];

/// Publishes samples of a VM that was rebooted. Its agent was restarted later.
async fn publish_starts(stack: &Stack, vm: &str, now: u64) {
    for (age, boot, agent) in SAMPLES {
        let mut sample = sample(vm, now - age * MINUTE, 5.0);
        sample.processes = vec![
            process("systemd", 1, 0.0, now - boot * MINUTE),
            process("vmwatch-agent", 300, 1.0, now - agent * MINUTE),
        ];
        publish(stack, &sample).await;
    }
    stored(stack).await;
}

/// Creates a rule and publishes samples that fulfil it until its alert fires.
async fn fire_alert(stack: &Stack, api: &Api, vm: &str) {
    let threshold = json!({ "direction": "above", "limit": 90 });
    let rule = json!({
        "name": "High CPU", "enabled": true, "severity": "critical", "for_seconds": 0,
        "condition": { "kind": "measure", "measure": "cpu_util", "threshold": threshold },
        "vms": { "ids": [vm] },
    });
    let rule = api.post("/alert-rules", rule).await;
    assert_eq!(rule.status, 201, "{rule:?}");
    let firing = format!(
        "/alerts?state=firing&rule_id={}",
        rule.json()["id"].as_str().unwrap()
    );
    eventually("the alert fires", PATIENCE, async || {
        publish(stack, &sample(vm, unix_millis(), 97.0)).await;
        let list = api.read(&firing).await;
        let fires = list["alerts"].as_array().is_some_and(|alerts| !alerts.is_empty());
        fires.then_some(()).ok_or_else(|| list.to_string())
    })
    .await;
}

/// Starts the VM and waits until the operation has succeeded.
async fn start_vm(api: &Api, vm: &str) -> String {
    let action = json!({ "action": "start" });
    let accepted = api.post(&format!("/vms/{vm}/actions"), action).await;
    assert_eq!(accepted.status, 202, "{accepted:?}");
    let id = accepted.json()["id"].as_str().unwrap().to_owned();
    eventually("the operation has succeeded", PATIENCE, async || {
        let operation = api.read(&format!("/operations/{id}")).await;
        let succeeded = operation["state"] == "succeeded";
        succeeded.then_some(()).ok_or_else(|| operation.to_string())
    })
    .await;
    id
}

fn kinds(marks: &Value) -> Vec<&str> {
    let marks = marks["marks"].as_array().unwrap();
    marks.iter().map(|mark| mark["kind"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn operations_alerts_and_starts_are_listed_in_chronological_order() {
    let stack = stack().replicas(Program::Alert, 1).start().await;
    let api = Api::with(&stack, Role::Operator, Scope::All).await;
    let vm = MACHINES[0].0;
    let now = unix_millis() / SECOND * SECOND;
    publish_starts(&stack, vm, now).await;
    fire_alert(&stack, &api, vm).await;
    let operation = start_vm(&api, vm).await;
    let path = format!("/vms/{vm}/marks");

    let all = api.read(&path).await;
    assert_eq!((&all["cut"], &all["missing"]), (&json!(false), &json!([])));
    assert_eq!(
        kinds(&all),
        [
            "vm_start",
            "agent_start",
            "vm_start",
            "agent_start",
            "agent_start",
            "alert",
            "operation"
        ]
    );
    let marks = all["marks"].as_array().unwrap();
    let ages = [55, 54, 30, 29, 15].map(|age| json!(rfc3339(now - age * MINUTE)));
    assert_eq!(
        marks[..5]
            .iter()
            .map(|mark| mark["at"].clone())
            .collect::<Vec<_>>(),
        ages
    );
    let (alert, action) = (&marks[5], &marks[6]);
    assert_eq!(
        (
            &alert["rule_name"],
            &alert["severity"],
            &alert["state"],
            &alert["until"]
        ),
        (
            &json!("High CPU"),
            &json!("critical"),
            &json!("firing"),
            &Value::Null
        )
    );
    assert_eq!(
        (&action["id"], &action["action"], &action["state"]),
        (&json!(operation), &json!("start"), &json!("succeeded"))
    );
    assert!(action["until"].is_string(), "{action}");

    let newest = api.read(&format!("{path}?limit=2")).await;
    assert_eq!(
        (kinds(&newest), &newest["cut"]),
        (vec!["alert", "operation"], &json!(true))
    );
    // The range ends before the first sample after the reboot, which shows its time.
    let range = format!(
        "from={}&to={}",
        rfc3339(now - 54 * MINUTE),
        rfc3339(now - 28 * MINUTE)
    );
    let middle = api.read(&format!("{path}?{range}")).await;
    assert_eq!(kinds(&middle), ["agent_start", "vm_start", "agent_start"]);

    let other = Scope::Only(vec!["vm-2".parse::<InstanceId>().unwrap()]);
    let hidden = Api::with(&stack, Role::Operator, other).await.read(&path).await;
    assert_eq!((kinds(&hidden), &hidden["missing"]), (Vec::new(), &json!([])));
    let day = |number: u64| rfc3339(number * 24 * 60 * MINUTE);
    let years = format!("{path}?from={}&to={}", day(1), day(401));
    let years = api.read(&years).await;
    assert_eq!((kinds(&years), &years["cut"]), (Vec::new(), &json!(false)));
    let too_long = format!("{path}?from={}&to={}", day(1), day(402));
    let detail = api.get(&too_long).await.problem(422, "contradictory");
    assert!(detail.contains("at most 400 days"), "{detail}");
    let reversed = format!("{path}?from={}&to={}", day(2), day(1));
    api.get(&reversed).await.problem(422, "contradictory");
    for query in ["limit=0", "limit=1001", "from=now", "kind=alert"] {
        api.get(&format!("{path}?{query}")).await.problem(400, "invalid");
    }
}

#[tokio::test]
async fn marks_of_unreachable_services_are_reported_as_missing() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let now = unix_millis() / SECOND * SECOND;
    publish_starts(&stack, "vm-1", now).await;
    // This stack has no alert-svc.
    let marks = api.read("/vms/vm-1/marks").await;
    assert_eq!(
        (marks["marks"].as_array().unwrap().len(), &marks["missing"]),
        (5, &json!(["alerts"]))
    );
    stack.replica(Program::Metrics, 0).process.kill9();
    stack.replica(Program::Lifecycle, 0).process.kill9();
    eventually("no source can be read", PATIENCE, async || {
        let reply = api.get("/vms/vm-1/marks").await;
        let is_unavailable = reply.status == 503;
        is_unavailable.then_some(()).ok_or_else(|| format!("{reply:?}"))
    })
    .await;
}
