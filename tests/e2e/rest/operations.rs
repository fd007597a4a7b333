//! Tests operations over the REST API: each is recorded before the request is answered, is executed once per
//! idempotency key, and gets the right result.

use std::sync::{Arc, Mutex};

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{MACHINES, PATIENCE, Program, Stack, cloud::Cloud, eventually};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    InstanceId, Role, Scope, Service,
    lifecycle::{MachineState, Operation, OperationsGet, Reboot, Start},
    no_such_vm,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::serve::{ServeSettings, Server};
use vmwatch_service::config::Environment;

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
async fn action_on_a_vm_of_two_hypervisors_must_name_one() {
    const VM: &str = "aaaaaaaa-1111-4111-8111-111111111111";
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (
        Cloud::start(&[(VM, "SHUTOFF")]).await,
        Cloud::start(&[(VM, "SHUTOFF")]).await,
    );
    let hypervisors = [a.entry(folder.path(), "a"), b.entry(folder.path(), "b")].join(",");
    let stack = stack().set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisors);
    let stack = stack.start().await;
    let api = Api::with(&stack, Role::Operator, Scope::All).await;
    let vm = eventually("the VM is listed", PATIENCE, async || {
        let reply = api.get(&format!("/vms/{VM}")).await;
        let has_both = reply.status == 200 && reply.json()["copies"].as_array().unwrap().len() == 2;
        has_both.then(|| reply.json()).ok_or_else(|| format!("{reply:?}"))
    })
    .await;
    assert_eq!(vm["allowed_actions"], json!([]));
    assert_eq!(vm["refused_actions"][0]["action"], "start");
    assert_eq!(vm["refused_actions"][0]["code"], "several_hypervisors");
    assert_eq!(vm["copies"][1]["hypervisor"], "b");
    assert_eq!(vm["copies"][1]["state"], "shut_off");
    assert_eq!(vm["copies"][1]["allowed_actions"], json!(["start"]));

    let said = "the VM is defined on a and b";
    let unnamed = ended(&api, &act(&api, VM, "start", None).await).await;
    assert!(
        unnamed["failure"]["detail"].as_str().unwrap().starts_with(said),
        "{unnamed}"
    );
    let request = json!({
        "method": 32523,
        "session_id": stack.session_as("ann", Role::Operator).await,
        "data": {"instance_id": VM, "hypervisor": "b"},
    });
    let documented = stack.gateway(0).post(&request).await;
    assert_eq!(documented.status(), 3);
    assert!(documented.message().contains(said), "{}", documented.message());
    let long = json!({"action": "start", "hypervisor": "x".repeat(129)});
    api.post(&format!("/vms/{VM}/actions"), long)
        .await
        .problem(400, "invalid");

    let named = |name: &str, key: &str| {
        let request = api.request(Method::POST, &format!("/vms/{VM}/actions"));
        let body = json!({"action": "start", "hypervisor": name});
        Reply::of(request.header("idempotency-key", key).json(&body))
    };
    let started = ended(&api, &named("b", "k").await).await;
    assert_eq!(
        (&started["state"], &started["hypervisor"]),
        (&json!("succeeded"), &json!("b"))
    );
    named("a", "k").await.problem(409, "conflict");
    let second = ended(&api, &named("a", "l").await).await;
    let detail = second["failure"]["detail"].as_str().unwrap();
    assert!(detail.contains("the VM is running on b"), "{second}");
    assert_eq!((a.commands().len(), b.accepted("os-start")), (0, 1));
}

#[tokio::test]
async fn operation_contains_source_address_and_result() {
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

/// A substitute for lifecycle-svc. The record of an operation can be read from it before it answers the request for the
/// operation.
struct SlowAnswers {
    /// The record of every operation.
    record: Mutex<Operation>,
    /// Permits for answers.
    answers: Semaphore,
    /// Notified when the record is read.
    read: Notify,
}

impl SlowAnswers {
    async fn start(stack: &Stack) -> Arc<Self> {
        let this = Arc::new(Self {
            record: Mutex::new(record(false, &json!(null))),
            answers: Semaphore::new(0),
            read: Notify::new(),
        });
        let settings = ServeSettings::read(&Environment::from_variables([])).unwrap();
        let (starts, reboots, reads) = (Arc::clone(&this), Arc::clone(&this), Arc::clone(&this));
        let server = Server::new(&stack.bus, Service::Lifecycle, settings)
            .method(Start, move |_, _| {
                let this = Arc::clone(&starts);
                async move {
                    this.answers.acquire().await.unwrap().forget();
                    Err(no_such_vm())
                }
            })
            .method(Reboot, move |_, _| {
                let this = Arc::clone(&reboots);
                async move {
                    this.answers.acquire().await.unwrap().forget();
                    Err(Fault::new(FaultKind::Conflict, "the key was used for a reboot"))
                }
            })
            .method(OperationsGet, move |_, _| {
                let this = Arc::clone(&reads);
                async move {
                    this.read.notify_one();
                    Ok(this.record.lock().unwrap().clone())
                }
            });
        let serving = Arc::new(Notify::new());
        let subscribed = Arc::clone(&serving);
        tokio::spawn(server.run(CancellationToken::new(), move || subscribed.notify_one()));
        tokio::time::timeout(PATIENCE, serving.notified()).await.unwrap();
        this
    }
}

/// A record as lifecycle-svc writes it.
fn record(hard: bool, fault: &Value) -> Operation {
    let golden = include_str!("../../golden/forms/operation-record.json");
    let mut record: Value = serde_json::from_str(golden).unwrap();
    record["operation"]["hard"] = hard.into();
    record["operation"]["fault"] = fault.clone();
    serde_json::from_value(record["operation"].take()).unwrap()
}

/// If the gateway reads the record of an operation before lifecycle-svc answers the request for the operation, the
/// client gets the answer that lifecycle-svc would have given.
#[tokio::test]
async fn client_gets_same_answer_if_gateway_reads_record_before_service_answers() {
    let stack = Stack::builder()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    let lifecycle = SlowAnswers::start(&stack).await;
    let api = Api::with(&stack, Role::Operator, Scope::All).await;

    let missing = json!({ "kind": "not_found", "message": no_such_vm().message });
    *lifecycle.record.lock().unwrap() = record(false, &missing);
    act(&api, "vm-1", "start", None).await.problem(404, "not_found");
    lifecycle.answers.add_permits(1);

    // The record belongs to a reboot with the same idempotency key, so a reset is refused.
    *lifecycle.record.lock().unwrap() = record(false, &Value::Null);
    let refused = act(&api, "vm-1", "reset", Some("key-1"));
    let answering = async {
        // When the gateway has read the record and found that it belongs to another request, it reads the record a
        // second time.
        for _ in 0..2 {
            tokio::time::timeout(PATIENCE, lifecycle.read.notified())
                .await
                .unwrap();
        }
        lifecycle.answers.add_permits(1);
    };
    let (refused, ()) = tokio::join!(refused, answering);
    refused.problem(409, "conflict");
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
