//! API tokens at the command line: what they permit, and how refused ones are reported.

use std::fs;

use serde_json::{Value, json};
use testkit::{ADMIN, Cli, MACHINES, PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    api_tokens::{API_TOKEN_BUCKET, ApiTokenRecord},
    lifecycle::MachineState,
    time::unix_millis,
};

use super::{ago, running, stored};
use crate::rest::client::{Api, stack};

/// What the command line prints for a token that the gateway does not accept.
const NOT_VALID: &str = "the API token is not valid: it is unknown, was revoked or has expired";

/// An API token of the administrator.
#[derive(Debug)]
struct ApiToken {
    id: String,
    text: String,
}

async fn administrator(stack: &Stack) -> Api {
    Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await
}

/// Creates a token with the administrator's role.
async fn created(admin: &Api, access: &str) -> ApiToken {
    let token = json!({ "name": access, "role": "admin", "access": access });
    let reply = admin.post("/tokens", token).await;
    assert_eq!(reply.status, 201, "{reply:?}");
    let answer = reply.json();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    ApiToken {
        id: text(&answer["api_token"]["id"]),
        text: text(&answer["token"]),
    }
}

fn holding(stack: &Stack, token: &str) -> Cli {
    Cli::with_token(stack.gateway(0), token)
}

/// Lets a token expire now. The shortest lifetime that a client may choose is a minute.
async fn expire(stack: &Stack, token: &ApiToken) {
    let bucket = stack
        .bus
        .jetstream_for_tests()
        .get_key_value(API_TOKEN_BUCKET)
        .await
        .unwrap();
    let record = bucket.get(&token.id).await.unwrap().unwrap();
    let mut record: ApiTokenRecord = serde_json::from_slice(&record).unwrap();
    record.expires_at_ms = unix_millis() - 1;
    let record = serde_json::to_vec(&record).unwrap();
    bucket.put(&token.id, record.into()).await.unwrap();
}

#[tokio::test]
async fn read_only_token_suffices_for_each_command_that_reads() {
    let stack = stack().replicas(Program::Alert, 1).start().await;
    let samples = [
        running(ago(7200), &["cron", "nginx"]),
        running(ago(1), &["stress", "nginx"]),
    ];
    stored(&stack, &samples).await;
    let token = created(&administrator(&stack).await, "read_only").await;
    let cli = Cli::new().set("VMWATCH_URL", &stack.gateway(0).url(""));
    let path = cli.home().join("token");
    fs::write(&path, format!("{}\n", token.text)).unwrap();
    let from_file = cli.set("VMWATCH_TOKEN_FILE", path.to_str().unwrap());
    let from_environment = holding(&stack, &token.text);
    eventually("the VMs and the names are stored", PATIENCE, async || {
        let (vms, found) = (
            from_file.output(&["vms"]),
            from_file.output(&["who-ran", "stress"]),
        );
        let is_stored = vms.contains("vm-0") && found.contains("vm-1");
        is_stored.then_some(()).ok_or_else(|| format!("{vms}{found}"))
    })
    .await;

    for cli in [&from_file, &from_environment] {
        for (args, text) in [
            (vec!["vms"], "vm-1"),
            (vec!["ps", "vm-1", "--at", "-1h"], "cron"),
            (vec!["who-ran", "stress"], "vm-1"),
            (vec!["history", "vm-1", "--from", "-15m"], "40.0"),
            (vec!["changed", "vm-1", "--from", "-1h"], "stress"),
            (vec!["status"], "vmwatch-metrics"),
        ] {
            let output = cli.output(&args);
            assert!(output.contains(text), "{args:?}: {output}");
        }
        // The starter rules may have made alerts meanwhile.
        for command in ["operations", "alerts"] {
            let list: Value = serde_json::from_str(&cli.output(&[command, "--json"])).unwrap();
            assert!(list.is_array(), "{command}: {list}");
        }
    }
    let top = from_file.terminal(&["top", "vm-1"], 100, 24);
    top.shows("stress").await;
    top.shows("LIVE").await;

    let (code, error) = from_file.failure(&["start", "vm-0", "--wait"]);
    assert_eq!(code, 77, "{error}");
    assert!(error.contains("this API token may only read"), "{error}");
    assert_eq!(stack.machine_state(MACHINES[0].0).await, MachineState::ShutOff);
}

#[tokio::test]
async fn full_token_starts_a_vm_and_metrics_only_token_reads_nothing_else() {
    let stack = stack().start().await;
    let admin = administrator(&stack).await;
    let full = holding(&stack, &created(&admin, "full").await.text);
    eventually("the VMs of the hypervisor are listed", PATIENCE, async || {
        let vms = full.output(&["vms"]);
        if vms.contains("vm-0") { Ok(()) } else { Err(vms) }
    })
    .await;
    full.output(&["start", "vm-0", "--wait"]);
    assert_eq!(stack.machine_state(MACHINES[0].0).await, MachineState::Running);

    let metrics = holding(&stack, &created(&admin, "metrics_only").await.text);
    for args in [
        vec!["vms"],
        vec!["ps", "vm-0"],
        vec!["events", "-f"],
        vec!["status"],
        vec!["stop", "vm-0"],
    ] {
        let (code, error) = metrics.failure(&args);
        assert_eq!(code, 77, "{args:?}: {error}");
        assert!(
            error.contains("may only read the metrics of VMs"),
            "{args:?}: {error}"
        );
    }
}

#[tokio::test]
async fn refused_token_is_reported_without_repeating_it() {
    let stack = stack().start().await;
    let admin = administrator(&stack).await;
    let (revoked, expired) = (
        created(&admin, "read_only").await,
        created(&admin, "read_only").await,
    );
    for token in [&revoked, &expired] {
        holding(&stack, &token.text).output(&["vms"]);
    }
    assert_eq!(admin.delete(&format!("/tokens/{}", revoked.id)).await.status, 204);
    expire(&stack, &expired).await;
    for token in [&revoked, &expired] {
        let api = admin.holding(&token.text);
        api.answers("the gateway refuses the token", 401).await;
    }

    let valid = created(&admin, "read_only").await.text;
    let (truncated, foreign) = (
        &valid[..valid.len() - 1],
        format!("vmt_{}_{}", "0".repeat(16), "0".repeat(64)),
    );
    for token in [&*revoked.text, &*expired.text, truncated, &*foreign, "vmt_"] {
        let cli = holding(&stack, token);
        for args in [vec!["vms"], vec!["start", "vm-0"], vec!["events", "-f"]] {
            let (code, error) = cli.failure(&args);
            assert_eq!(code, 77, "{args:?}: {error}");
            assert!(error.contains(NOT_VALID), "{args:?}: {error}");
            assert!(error.contains("create another one on the page"), "{error}");
            let secret = token.rsplit('_').next().unwrap();
            assert!(secret.is_empty() || !error.contains(secret), "{error}");
        }
    }
}

#[tokio::test]
async fn revocation_ends_a_command_that_follows_events() {
    let stack = stack().start().await;
    let admin = administrator(&stack).await;
    let token = created(&admin, "read_only").await;
    let cli = holding(&stack, &token.text);
    let process = cli.start(&["events", "-f"]);
    let gateway = &stack.gateway(0).replica;
    eventually("the events are followed", PATIENCE, async || {
        let readers = gateway.metric("vmwatch_event_readers").await;
        (readers == Some(1.0))
            .then_some(())
            .ok_or_else(|| format!("{readers:?} readers"))
    })
    .await;
    assert_eq!(admin.delete(&format!("/tokens/{}", token.id)).await.status, 204);
    let ended = eventually("the command has ended", PATIENCE, async || {
        process.ended().ok_or_else(|| process.log())
    })
    .await;
    assert_eq!(ended.code(), Some(77), "{}", process.log());
    assert!(process.log().contains(NOT_VALID), "{}", process.log());
}
