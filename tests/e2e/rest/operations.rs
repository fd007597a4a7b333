//! Tests operations over the REST API: each is recorded before the request is answered, is executed once per
//! idempotency key, and gets the right result.

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{MACHINES, PATIENCE, Program, eventually};
use vmwatch_api::{InstanceId, Role, Scope, lifecycle::MachineState};

use super::client::{Api, Reply, stack};

async fn act(api: &Api, instance: &str, action: &str, key: Option<&str>) -> Reply {
    let mut request = api.request(Method::POST, &format!("/vms/{instance}/actions"));
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    Reply::of(request.json(&json!({ "action": action }))).await
}

/// Waits until the operation that an accepted request named has ended, and returns it.
async fn ended(api: &Api, accepted: &Reply) -> Value {
    assert_eq!(accepted.status, 202, "{accepted:?}");
    let operation = accepted.json();
    let path = format!("/operations/{}", operation["id"].as_str().unwrap());
    assert_eq!(
        accepted.header("location"),
        Some(format!("/api/v1{path}").as_str())
    );
    eventually("the operation has ended", PATIENCE, async || {
        let operation = api.read(&path).await;
        if operation["finished_at"].is_string() {
            Ok(operation)
        } else {
            Err(operation.to_string())
        }
    })
    .await
}

#[tokio::test]
async fn operation_records_source_address_and_result() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Operator, Scope::All).await;
    let (off, _) = MACHINES[0];
    let accepted = act(&api, off, "start", None).await;
    let operation = ended(&api, &accepted).await;
    assert_eq!(
        (&operation["state"], &operation["machine_state"]),
        (&json!("succeeded"), &json!("running"))
    );
    assert_eq!(
        (
            &operation["action"],
            &operation["instance_id"],
            &operation["user"]
        ),
        (&json!("start"), &json!(off), &json!("test-operator"))
    );
    assert_eq!(
        (
            &operation["source"],
            &operation["hypervisor"],
            &operation["failure"]
        ),
        (&json!("127.0.0.1"), &json!("test"), &Value::Null)
    );
    assert_eq!(operation["request_id"].as_str(), accepted.header("x-request-id"));
    assert_eq!(operation["history"][0]["state"], "requested");
    assert_eq!(stack.machine_state(off).await, MachineState::Running);

    for (action, state) in [
        ("reboot", "running"),
        ("reset", "running"),
        ("force-stop", "shut_off"),
        ("start", "running"),
        ("stop", "shut_off"),
    ] {
        let operation = ended(&api, &act(&api, off, action, None).await).await;
        assert_eq!(
            (
                &operation["action"],
                &operation["state"],
                &operation["machine_state"]
            ),
            (&json!(action), &json!("succeeded"), &json!(state)),
            "{operation}"
        );
    }
    // An action that the VM's state does not allow is recorded as refused.
    let refused = ended(&api, &act(&api, off, "reboot", None).await).await;
    assert_eq!(
        (&refused["state"], &refused["failure"]["code"]),
        (&json!("failed"), &json!("conflict")),
        "{refused}"
    );

    let listed = api.read(&format!("/operations?instance_id={off}")).await;
    let actions: Vec<_> = listed["operations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|operation| operation["action"].as_str().unwrap())
        .collect();
    assert_eq!(
        actions,
        [
            "reboot",
            "stop",
            "start",
            "force-stop",
            "reset",
            "reboot",
            "start"
        ],
        "operations are listed newest first"
    );
    assert_eq!(listed["operations"][0], refused);
    let failed = api.read("/operations?state=failed").await;
    assert_eq!(failed["operations"].as_array().unwrap().len(), 1);
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = api.read(&format!("/operations?limit=2{cursor}")).await;
        seen.extend(page["operations"].as_array().unwrap().clone());
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(
        &seen,
        listed["operations"].as_array().unwrap(),
        "the last page has been read"
    );
}

#[tokio::test]
async fn requests_with_the_same_idempotency_key_act_once() {
    let stack = stack()
        .replicas(Program::Gateway, 2)
        .replicas(Program::Lifecycle, 1)
        .start()
        .await;
    let api = Api::with(&stack, Role::Operator, Scope::All).await;
    let there = api.at(stack.gateway(1));
    let (off, _) = MACHINES[0];
    let (one, other) = tokio::join!(
        act(&api, off, "start", Some("key-1")),
        act(&there, off, "start", Some("key-1"))
    );
    let (one, other) = (ended(&api, &one).await, ended(&there, &other).await);
    assert_eq!(one, other);
    assert_eq!(
        ended(&api, &act(&api, off, "force-stop", Some("key-1")).await).await["state"],
        "succeeded",
        "the same key with another action makes another operation"
    );
    let again = ended(&api, &act(&api, off, "start", Some("key-1")).await).await;
    assert_eq!(
        again, one,
        "a repeated request returns the operation of the first"
    );
    assert_eq!(
        stack.machine_state(off).await,
        MachineState::ShutOff,
        "the repeated request must not start the VM again"
    );

    let (running, _) = MACHINES[2];
    assert_eq!(act(&api, running, "reboot", Some("key-2")).await.status, 202);
    act(&api, running, "reset", Some("key-2"))
        .await
        .problem(409, "conflict");
    for bad in ["", &"k".repeat(129), "schlüssel", "with space"] {
        let request = api
            .request(Method::POST, &format!("/vms/{off}/actions"))
            .json(&json!({ "action": "start" }));
        let value = reqwest::header::HeaderValue::from_bytes(bad.as_bytes()).unwrap();
        Reply::of(request.header("idempotency-key", value))
            .await
            .problem(400, "invalid");
    }
}

#[tokio::test]
async fn vm_actions_outside_role_or_scope_are_refused() {
    let stack = stack().start().await;
    let [(off, _), (other, _), _] = MACHINES;
    let viewer = Api::with(&stack, Role::Viewer, Scope::All).await;
    let scope = Scope::Only(vec![off.parse::<InstanceId>().unwrap()]);
    let limited = Api::with(&stack, Role::Operator, scope).await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    act(&viewer, off, "start", None).await.problem(403, "forbidden");
    let hidden = act(&limited, other, "start", None)
        .await
        .problem(404, "not_found");
    let unknown = act(&limited, "0b5c4c56-6d0f-4a0e-8a4f-000000000000", "start", None)
        .await
        .problem(404, "not_found");
    assert_eq!(hidden, unknown);
    act(&admin, "0b5c4c56-6d0f-4a0e-8a4f-000000000000", "start", None)
        .await
        .problem(404, "not_found");
    for body in [
        json!({}),
        json!({ "action": "force_stop" }),
        json!({ "action": "start", "hard": true }),
        json!(["start"]),
        Value::Null,
    ] {
        admin
            .post(&format!("/vms/{off}/actions"), body)
            .await
            .problem(400, "invalid");
    }
    assert_eq!(
        stack.machine_state(off).await,
        MachineState::ShutOff,
        "no VM was started"
    );

    let operation = ended(&admin, &act(&admin, other, "start", None).await).await;
    let path = format!("/operations/{}", operation["id"].as_str().unwrap());
    limited.get(&path).await.problem(404, "not_found");
    limited
        .get("/operations/00000000000000000000000000000000")
        .await
        .problem(404, "not_found");
    assert_eq!(limited.read("/operations").await["operations"], json!([]));
    assert_eq!(
        limited.read(&format!("/operations?instance_id={other}")).await["operations"],
        json!([])
    );
    assert_eq!(viewer.read(&path).await, operation);
    for bad in ["x", "0000000000000000000000000000000G"] {
        viewer
            .get(&format!("/operations/{bad}"))
            .await
            .problem(400, "invalid");
    }
}

#[tokio::test]
async fn one_request_can_act_on_several_vms() {
    let stack = stack().start().await;
    let [(off, _), (other, _), (running, _)] = MACHINES;
    let unknown = "0b5c4c56-6d0f-4a0e-8a4f-000000000000";
    let operator = Api::with(&stack, Role::Operator, Scope::All).await;
    let body = json!({ "action": "start", "instance_ids": [off, unknown, running, other], "at_once": 2 });
    let reply = operator.post("/actions", body.clone()).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let outcomes = reply.json();
    let results: Vec<_> = outcomes["outcomes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|outcome| {
            (
                outcome["instance_id"].as_str().unwrap(),
                outcome["operation"]["state"].as_str(),
                outcome["refusal"]["code"].as_str(),
            )
        })
        .collect();
    let expected = [
        (off, Some("succeeded"), None),
        (unknown, None, Some("not_found")),
        (running, Some("succeeded"), None),
        (other, Some("succeeded"), None),
    ];
    assert_eq!(results, expected);
    for instance in [off, other] {
        assert_eq!(stack.machine_state(instance).await, MachineState::Running);
    }
    let viewer = Api::with(&stack, Role::Viewer, Scope::All).await;
    viewer.post("/actions", body).await.problem(403, "forbidden");
    for body in [
        json!({ "action": "start", "instance_ids": [] }),
        json!({ "action": "start", "instance_ids": vec![off; 101] }),
        json!({ "action": "start", "instance_ids": ["a.b"] }),
        json!({ "action": "start", "instance_ids": [off], "at_once": 0 }),
        json!({ "action": "start", "instance_ids": [off], "at_once": 17 }),
        json!({ "action": "start" }),
    ] {
        operator.post("/actions", body).await.problem(400, "invalid");
    }
}
