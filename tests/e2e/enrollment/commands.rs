//! Tests `vmwatch-auth join-token` and `vmwatch-auth agent` with the NATS permissions of a deployment.

use std::process::Output;

use serde_json::{Value, json};
use testkit::{Program, Stack};
use vmwatch_api::{
    audit::AuditResult,
    enrollment::{InvalidJoinToken, JoinToken},
    wire::FaultKind,
};
use vmwatch_bus::audit;

use super::{SOURCE, agent, builder, enroll_from, key, refused, request};

fn try_run(stack: &Stack, args: &[&str]) -> Output {
    stack.try_command("vmwatch-auth", Program::Auth, args, "", &[])
}

fn run(stack: &Stack, args: &[&str]) -> String {
    stack.command(Program::Auth, args, "")
}

fn json_of(stack: &Stack, args: &[&str]) -> Value {
    serde_json::from_str(&run(stack, args)).unwrap()
}

#[tokio::test]
async fn commands_manage_join_tokens_and_agents() {
    let stack = builder().with_permissions().start().await;
    let printed = run(
        &stack,
        &[
            "join-token",
            "create",
            "--valid-for",
            "2h",
            "--uses",
            "2",
            "--instances",
            "vm-1,vm-2",
        ],
    );
    let token = printed.strip_suffix('\n').unwrap();
    assert_ne!(
        token.parse::<JoinToken>(),
        Err(InvalidJoinToken),
        "only the token is printed: {printed}"
    );
    let key = key();
    enroll_from(&stack, SOURCE, &request(token, "vm-1", &key))
        .await
        .unwrap();
    refused(
        enroll_from(&stack, SOURCE, &request(token, "vm-3", &super::key())).await,
        FaultKind::Forbidden,
        "not for the VM vm-3",
    );

    let tokens = json_of(&stack, &["join-token", "list", "--json"]);
    let listed = &tokens[0];
    let id = listed["id"].as_str().unwrap();
    assert_eq!(token.split('_').nth(1), Some(id));
    assert_eq!(
        (&listed["used"], &listed["uses"], &listed["revoked"]),
        (&json!(1), &json!(2), &json!(false))
    );
    assert_eq!(listed["created_by"], "vmwatch-auth");
    let lifetime = listed["expires_at_ms"].as_u64().unwrap() - listed["created_at_ms"].as_u64().unwrap();
    assert_eq!(lifetime, 7_200_000);
    let table = run(&stack, &["join-token", "list"]);
    assert!(
        table.contains(id) && table.contains("1/2") && table.contains("vm-1,vm-2"),
        "{table}"
    );

    assert_eq!(
        run(&stack, &["join-token", "revoke", id]),
        format!("revoked the join token {id}\n")
    );
    let outcome = enroll_from(&stack, SOURCE, &request(token, "vm-2", &super::key())).await;
    refused(outcome, FaultKind::Forbidden, "was revoked");

    let agents = json_of(&stack, &["agent", "list", "--json"]);
    assert_eq!(
        (&agents[0]["instance_id"], &agents[0]["public_key"]),
        (&json!("vm-1"), &json!(key.as_str()))
    );
    assert_eq!(
        run(&stack, &["agent", "revoke", "vm-1"]),
        format!("revoked the key {key} of vm-1\n")
    );
    assert!(agent(&stack, "vm-1").await.unwrap().revoked_at_ms.is_some());
    let table = run(&stack, &["agent", "list"]);
    assert!(table.contains("vm-1") && table.contains(key.as_str()), "{table}");

    let records = audit::newest(&stack.bus, 1000).await.unwrap();
    for action in [
        "auth.join_tokens.create",
        "auth.join_tokens.revoke",
        "auth.agents.revoke",
    ] {
        for result in [AuditResult::Requested, AuditResult::Succeeded] {
            let is_wanted = |record: &vmwatch_api::audit::AuditRecord| {
                (record.action.as_str(), record.result, record.user.as_str())
                    == (action, result, "vmwatch-auth")
            };
            assert!(records.iter().any(is_wanted), "{action} {result}: {records:?}");
        }
    }
    let log = stack.nats.server.log();
    assert!(!log.contains("Violation"), "{log}");
}

#[tokio::test]
async fn commands_explain_what_is_wrong() {
    let stack = builder().start().await;
    for (args, part) in [
        (
            &["join-token", "create", "--valid-for", "10s"][..],
            "must be 60 to 7776000 seconds",
        ),
        (&["join-token", "create", "--uses", "10001"], "must be 1 to 10000"),
        (
            &["join-token", "create", "--prefix", "a", "--instances", "b"],
            "cannot be used with",
        ),
        (
            &["join-token", "revoke", "0000000000000000"],
            "there is no such join token",
        ),
        (&["join-token", "revoke", "vmj_0"], "must be 16 characters"),
        (&["agent", "revoke", "vm-9"], "this VM has no enrolled agent"),
    ] {
        let output = try_run(&stack, args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains(part),
            "{args:?}: {said}"
        );
        assert!(output.stdout.is_empty());
    }
    assert_eq!(json_of(&stack, &["join-token", "list", "--json"]), json!([]));
}
