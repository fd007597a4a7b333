//! Tests the whole life of an agent, with all programs and the deployed configuration of NATS: it enrols at the gateway with a
//! join token, reports over its own login, is shut out when it is revoked, and enrols again.

use std::{fs, path::Path};

use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{Role, Scope};

use crate::rest::client::Api;

const VM: &str = "vm-enrolled";

/// Creates a join token and runs `vmwatch-agent enroll` with it.
async fn enrol(stack: &Stack, api: &Api, identity: &Path, vm: &str) -> String {
    let token = new_token(api).await;
    let enrolled = stack.try_enrol(&token, identity, vm);
    let errors = String::from_utf8_lossy(&enrolled.stderr);
    assert!(enrolled.status.success(), "{errors}");
    token
}

async fn new_token(api: &Api) -> String {
    let created = api.post("/join-tokens", json!({})).await;
    assert_eq!(created.status, 201, "{created:?}");
    created.json()["token"].as_str().unwrap().to_owned()
}

/// Waits until the newest row of the VM is later than this one.
async fn newer_row(api: &Api, than: &Value) -> Value {
    eventually("a new row arrives", PATIENCE, async || {
        let reply = api.get(&format!("/vms/{VM}")).await;
        let vm: Value = serde_json::from_str(&reply.body).unwrap_or_default();
        let date = vm["last_report_at"].clone();
        if date.is_string() && date != *than {
            Ok(date)
        } else {
            Err(format!("{reply:?}"))
        }
    })
    .await
}

#[tokio::test]
async fn agent_enrols_reports_and_is_shut_out_until_it_enrols_again() {
    let stack = Stack::builder().with_tls().start().await;
    let api = Api::with(&stack, Role::Admin, Scope::All).await;
    let identity = stack.folder().join("identity");
    let token = enrol(&stack, &api, &identity, VM).await;

    // The token of one use is used up, and the answer says so only because the secret is right.
    let other = stack.try_enrol(&token, &stack.folder().join("other"), "vm-other");
    let refusal = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(
        other.status.code() == Some(77) && refusal.contains("used"),
        "{refusal}"
    );

    let agent = stack.start_enrolled_agent(&identity);
    agent.ready().await;
    let first = newer_row(&api, &Value::Null).await;
    let agents = api.read("/agents").await;
    assert_eq!(agents["agents"][0]["instance_id"], VM, "{agents}");

    let revoked = api.delete(&format!("/agents/{VM}")).await;
    assert_eq!(revoked.status, 204, "{revoked:?}");
    eventually(
        "the agent reports that its login is refused",
        PATIENCE,
        async || match agent.readiness().await {
            Err(reason) if reason.contains("refuse") => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .await;

    enrol(&stack, &api, &identity, VM).await;
    agent.process.kill9();
    agent.restart().await;
    newer_row(&api, &first).await;
    let seed = fs::read_to_string(identity.join("agent.seed")).unwrap();
    let seed = seed.lines().next().unwrap();
    for program in [Program::Auth, Program::Gateway] {
        assert!(!stack.replica(program, 0).process.log().contains(seed));
    }
    assert!(!agent.process.log().contains(seed));
}

/// In networks that let only port 443 out, agents reach NATS over WebSocket. Its configuration is the deployed one, like that of
/// the client port.
#[tokio::test]
async fn agent_enrols_and_reports_over_websocket() {
    let stack = Stack::builder().with_websocket().start().await;
    let api = Api::with(&stack, Role::Admin, Scope::All).await;
    let identity = stack.folder().join("identity");
    enrol(&stack, &api, &identity, VM).await;
    let record = fs::read_to_string(identity.join("enrollment.json")).unwrap();
    assert!(
        record.contains("wss://") && !record.contains("tls://"),
        "{record}"
    );
    let agent = stack.start_enrolled_agent(&identity);
    agent.ready().await;
    newer_row(&api, &Value::Null).await;
}
