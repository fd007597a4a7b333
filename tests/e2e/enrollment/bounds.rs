//! Tests the limits of enrolment: throttling of wrong secrets, records of refusals, and stored tokens.

use std::time::Duration;

use async_nats::jetstream::stream::Config;
use futures::StreamExt;
use serde_json::json;
use testkit::{PATIENCE, Program, Stack};
use vmwatch_api::{
    audit::{AUDIT_STREAM, AuditResult},
    enrollment::{
        JOIN_TOKEN_BUCKET, JoinTokenRecord, JoinTokensCreate, JoinTokensList, JoinVms, NewJoinToken,
    },
    sessions::Own,
    time::unix_millis,
    wire::FaultKind,
};
use vmwatch_bus::audit;

use super::{
    SOURCE, agent, as_admin, bucket, builder, enroll, enroll_from, key, refused, request, token, token_record,
};

#[tokio::test]
async fn enrolment_is_unavailable_without_the_address_for_agents() {
    let stack = builder()
        .set(Program::Auth, "VMWATCH_AGENT_NATS_URL", "")
        .start()
        .await;
    let token = token(&stack, 1, false).await;
    let outcome = enroll(&stack, &token, "vm-1", &key()).await;
    refused(
        outcome,
        FaultKind::Unavailable,
        "set VMWATCH_AGENT_NATS_URL of auth-svc",
    );
}

/// Wrong secrets are throttled by token and source address. Others that share the address, or use the token from another
/// address, can still enrol.
#[tokio::test]
async fn wrong_secrets_are_throttled() {
    let stack = builder().replicas(Program::Auth, 2).start().await;
    let (attacked, other) = (token(&stack, 9, false).await, token(&stack, 9, false).await);
    let wrong = format!("vmj_{}_{}", attacked.summary.id, "0".repeat(64));
    for _ in 0..5 {
        let outcome = enroll_from(&stack, SOURCE, &request(&wrong, "vm-1", &key())).await;
        refused(outcome, FaultKind::Unauthenticated, "not valid");
    }
    for text in [wrong.as_str(), attacked.token.as_str()] {
        let outcome = enroll_from(&stack, SOURCE, &request(text, "vm-1", &key())).await;
        let wait = outcome.as_ref().unwrap_err().retry_after.unwrap();
        assert!(
            wait > Duration::from_mins(14) && wait <= Duration::from_mins(15),
            "{wait:?}"
        );
        refused(outcome, FaultKind::Throttled, "wrong join token");
    }
    enroll(&stack, &other, "vm-2", &key()).await.unwrap();
    let elsewhere = request(attacked.token.as_str(), "vm-3", &key());
    enroll_from(&stack, "192.0.2.2", &elsewhere).await.unwrap();
    // All malformed tokens of an address count together.
    for turn in 0..6 {
        let outcome = enroll_from(&stack, SOURCE, &request(&format!("vmj_{turn}"), "vm-4", &key())).await;
        let kind = if turn < 5 {
            FaultKind::Unauthenticated
        } else {
            FaultKind::Throttled
        };
        refused(outcome, kind, "join token");
    }
}

/// A client without a token cannot fill the KV bucket of login failures with counters of random ids.
#[tokio::test]
async fn unknown_tokens_of_an_address_count_together() {
    let stack = builder().start().await;
    for turn in 0..6 {
        let text = format!("vmj_{turn:016x}_{}", "0".repeat(64));
        let outcome = enroll_from(&stack, SOURCE, &request(&text, "vm-1", &key())).await;
        let kind = if turn < 5 {
            FaultKind::Unauthenticated
        } else {
            FaultKind::Throttled
        };
        refused(outcome, kind, "join token");
    }
    let info = stack.bus.stream_info("KV_vmwatch_login_failures", PATIENCE).await;
    assert_eq!(info.unwrap().state.messages, 3, "one counter per kind");
    let good = token(&stack, 1, false).await;
    enroll(&stack, &good, "vm-1", &key()).await.unwrap();
}

/// While the audit is required and unreachable, an enrolment takes no use.
#[tokio::test]
async fn enrolment_that_cannot_be_audited_changes_nothing() {
    let stack = builder().start().await;
    let (token, known) = (token(&stack, 2, false).await, key());
    let first = enroll(&stack, &token, "vm-1", &known).await.unwrap();
    let info = stack.bus.stream_info(AUDIT_STREAM, PATIENCE).await.unwrap();
    let full = Config {
        max_message_size: 1,
        ..info.config
    };
    stack
        .bus
        .jetstream_for_tests()
        .update_stream(&full)
        .await
        .unwrap();
    let outcome = enroll(&stack, &token, "vm-2", &key()).await;
    refused(
        outcome,
        FaultKind::Unavailable,
        "could not be recorded in the audit",
    );
    assert_eq!(token_record(&stack, &token).await.used, 1);
    assert_eq!(agent(&stack, "vm-2").await, None);
    // A repetition changes nothing and needs no record.
    assert_eq!(enroll(&stack, &token, "vm-1", &known).await.unwrap(), first);
}

/// An agent that repeats refused or successful requests cannot evict other records from the audit.
#[tokio::test]
async fn repeated_enrolments_make_a_bounded_number_of_audit_records() {
    let stack = builder().start().await;
    let once = token(&stack, 1, false).await;
    let first = key();
    let authenticated = async || {
        let info = stack.bus.stream_info(AUDIT_STREAM, PATIENCE).await.unwrap();
        info.state.messages
    };
    enroll(&stack, &once, "vm-1", &first).await.unwrap();
    let before = authenticated().await;
    for _ in 0..30 {
        enroll(&stack, &once, "vm-1", &first).await.unwrap();
        enroll(&stack, &once, "vm-2", &key()).await.unwrap_err();
    }
    assert_eq!(authenticated().await, before);
    let refusals = async || {
        let mut records = audit::newest(&stack.bus, 1000).await.unwrap();
        records
            .retain(|record| record.action == "auth.agents.enroll" && record.result == AuditResult::Refused);
        records
    };
    assert_eq!(refusals().await.len(), 10);
    // When auth-svc stops, it records the number of refusals that have no record of their own.
    stack.replica(Program::Auth, 0).process.terminate(PATIENCE).await;
    let records = refusals().await;
    let counted = |text: &str| records.iter().any(|record| record.detail.starts_with(text));
    assert!(
        counted("20 further refused enrolments from this source"),
        "{records:?}"
    );
}

async fn listed(stack: &Stack) -> Vec<String> {
    let list = as_admin::<JoinTokensList>(stack, &Own {}).await.unwrap();
    list.tokens
        .into_iter()
        .map(|token| token.id.to_string())
        .collect()
}

#[tokio::test]
async fn creation_removes_the_oldest_finished_token_if_there_are_too_many() {
    let stack = builder().start().await;
    let store = bucket(&stack, JOIN_TOKEN_BUCKET).await;
    let now = unix_millis();
    let put = async |number: u64, revoked: bool| {
        let record = JoinTokenRecord {
            secret_hash: "0".repeat(64),
            created_by: "ann".to_owned(),
            by_command: false,
            created_at_ms: now - 10_000 + number,
            expires_at_ms: now + 3_600_000,
            uses: 1,
            used: 0,
            vms: JoinVms::Any,
            replace: false,
            revoked,
            last_use: None,
        };
        let value = serde_json::to_vec(&record).unwrap();
        store.put(format!("{number:016x}"), value.into()).await.unwrap();
    };
    let puts = (0..1000).map(|number| put(number, false));
    futures::stream::iter(puts).buffer_unordered(64).count().await;
    let new = json!({ "valid_seconds": 60, "uses": 1, "vms": "any", "replace": false });
    let new: NewJoinToken = serde_json::from_value(new).unwrap();
    let full = as_admin::<JoinTokensCreate>(&stack, &new).await.unwrap_err();
    assert_eq!(full.kind, FaultKind::Conflict);
    assert!(
        full.message.contains("revoke those that are no longer needed"),
        "{full:?}"
    );

    put(3, true).await;
    put(7, true).await;
    let created = as_admin::<JoinTokensCreate>(&stack, &new).await.unwrap();
    let ids = listed(&stack).await;
    assert_eq!((ids.len(), &ids[0]), (1000, &created.summary.id.to_string()));
    assert!(
        !ids.contains(&format!("{:016x}", 3)),
        "the older of the finished tokens was removed"
    );
    assert!(ids.contains(&format!("{:016x}", 7)));
    assert_eq!(store.get(format!("{:016x}", 3)).await.unwrap(), None);
}
