//! Tests join tokens and the enrolment of agents over the bus: each refusal, repetitions, races, revocation and the
//! audit.

mod bounds;
mod commands;
mod creators;
mod former_keys;
mod races;

use async_nats::jetstream::kv::Store;
use nkeys::KeyPair;
use serde::de::DeserializeOwned;
use serde_json::json;
use testkit::{ADMIN, PATIENCE, Program, Stack, StackBuilder};
use vmwatch_api::{
    Method, Principal, Role, Scope,
    audit::{AuditRecord, AuditResult},
    enrollment::{
        AGENT_BUCKET, AgentKey, AgentList, AgentPage, AgentRecord, AgentRef, AgentsEnroll, AgentsList,
        AgentsRevoke, CreatedJoinToken, Enrolled, Enrollment, JOIN_TOKEN_BUCKET, JoinTokenRecord,
        JoinTokenRef, JoinTokensCreate, JoinTokensList, JoinTokensRevoke, NewJoinToken, SecretText,
    },
    metrics::Limit,
    sessions::Own,
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Context, audit};

const URL: &str = "tls://bus.example.com:4222";
const SOURCE: &str = "192.0.2.1";

/// Configures a stack with only auth-svc, in which agents can enrol.
fn builder() -> StackBuilder {
    [Program::Gateway, Program::Metrics, Program::Lifecycle]
        .into_iter()
        .fold(Stack::builder(), |builder, program| builder.replicas(program, 0))
        .set(Program::Auth, "VMWATCH_AGENT_NATS_URL", URL)
}

/// Calls a method as an administrator with this name and scope.
async fn call_as<M: Method>(
    stack: &Stack,
    user: &str,
    scope: Scope,
    params: &M::Params,
) -> Result<M::Reply, Fault> {
    let principal = Principal {
        user: user.to_owned(),
        role: Role::Admin,
        scope,
    };
    let context = Context::new(PATIENCE).as_principal(principal);
    stack.bus.call::<M>(&context, params).await
}

async fn as_admin<M: Method>(stack: &Stack, params: &M::Params) -> Result<M::Reply, Fault> {
    call_as::<M>(stack, ADMIN.0, Scope::All, params).await
}

/// Creates a join token for any VM.
async fn token(stack: &Stack, uses: u32, replace: bool) -> CreatedJoinToken {
    let new = json!({ "valid_seconds": 3600, "uses": uses, "vms": "any", "replace": replace });
    create(stack, new).await
}

async fn create(stack: &Stack, new: serde_json::Value) -> CreatedJoinToken {
    let new: NewJoinToken = serde_json::from_value(new).unwrap();
    as_admin::<JoinTokensCreate>(stack, &new).await.unwrap()
}

fn key() -> AgentKey {
    KeyPair::new_user().public_key().parse().unwrap()
}

fn request(token: &str, instance_id: &str, public_key: &AgentKey) -> Enrollment {
    let token: SecretText = serde_json::from_value(json!(token)).unwrap();
    Enrollment {
        token,
        instance_id: instance_id.parse().unwrap(),
        public_key: public_key.clone(),
        platform: Some("dmi:1".parse().unwrap()),
    }
}

/// Sends an enrolment as a gateway would.
async fn enroll_from(stack: &Stack, source: &str, request: &Enrollment) -> Result<Enrolled, Fault> {
    let mut context = Context::new(PATIENCE);
    context.source = Some(source.to_owned());
    stack.bus.call::<AgentsEnroll>(&context, request).await
}

async fn enroll(
    stack: &Stack,
    token: &CreatedJoinToken,
    vm: &str,
    key: &AgentKey,
) -> Result<Enrolled, Fault> {
    enroll_from(stack, SOURCE, &request(token.token.as_str(), vm, key)).await
}

fn refused(outcome: Result<Enrolled, Fault>, kind: FaultKind, part: &str) {
    let fault = outcome.unwrap_err();
    assert_eq!(fault.kind, kind, "{fault:?}");
    assert!(fault.message.contains(part), "{part}: {fault:?}");
}

async fn bucket(stack: &Stack, name: &str) -> Store {
    stack.bus.jetstream_for_tests().get_key_value(name).await.unwrap()
}

async fn record<T: DeserializeOwned>(bucket: &Store, key: &str) -> Option<T> {
    let value = bucket.get(key).await.unwrap()?;
    Some(serde_json::from_slice(&value).unwrap())
}

async fn agent(stack: &Stack, vm: &str) -> Option<AgentRecord> {
    record(&bucket(stack, AGENT_BUCKET).await, vm).await
}

async fn token_record(stack: &Stack, token: &CreatedJoinToken) -> JoinTokenRecord {
    let bucket = bucket(stack, JOIN_TOKEN_BUCKET).await;
    record(&bucket, token.summary.id.as_str()).await.unwrap()
}

/// Changes the stored record of a token.
async fn change(stack: &Stack, token: &CreatedJoinToken, change: impl FnOnce(&mut JoinTokenRecord)) {
    let mut record = token_record(stack, token).await;
    change(&mut record);
    let value = serde_json::to_vec(&record).unwrap();
    let bucket = bucket(stack, JOIN_TOKEN_BUCKET).await;
    bucket.put(token.summary.id.as_str(), value.into()).await.unwrap();
}

async fn agents(stack: &Stack) -> AgentList {
    as_admin::<AgentsList>(stack, &AgentPage::default())
        .await
        .unwrap()
}

async fn revoke_agent(stack: &Stack, vm: &str) -> Result<(), Fault> {
    let agent = AgentRef {
        instance_id: vm.parse().unwrap(),
    };
    as_admin::<AgentsRevoke>(stack, &agent).await.map(drop)
}

async fn revoke_token(stack: &Stack, token: &CreatedJoinToken) -> Result<(), Fault> {
    let id = token.summary.id.clone();
    as_admin::<JoinTokensRevoke>(stack, &JoinTokenRef { id })
        .await
        .map(drop)
}

#[tokio::test]
async fn agent_gets_what_it_needs_and_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.pem");
    let ca = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
    std::fs::write(&file, ca).unwrap();
    let stack = builder()
        .set(
            Program::Auth,
            "VMWATCH_AGENT_NATS_CA_FILE",
            file.to_str().unwrap(),
        )
        .set(Program::Auth, "VMWATCH_UTC_OFFSET", "+08:00")
        .set(Program::Auth, "VMWATCH_AGENT_VM_INTERVAL", "5s")
        .set(Program::Auth, "VMWATCH_AGENT_PROCESS_INTERVAL", "30s")
        .start()
        .await;
    let (token, key) = (token(&stack, 3, false).await, key());
    let before = unix_millis();
    let enrolled = enroll(&stack, &token, "vm-1", &key).await.unwrap();
    assert_eq!(enrolled.instance_id.as_str(), "vm-1");
    assert_eq!(enrolled.nats_urls, [URL]);
    assert_eq!(enrolled.ca_certificates, ca);
    assert_eq!(enrolled.utc_offset.to_string(), "+08:00");
    assert_eq!(
        (enrolled.vm_interval_ms, enrolled.process_interval_ms),
        (5_000, 30_000)
    );

    let stored = agent(&stack, "vm-1").await.unwrap();
    assert_eq!(
        (&stored.public_key, &stored.join_token),
        (&key, &token.summary.id)
    );
    assert_eq!(stored.source.as_deref(), Some(SOURCE));
    assert_eq!(stored.platform.unwrap().as_str(), "dmi:1");
    assert!(stored.enrolled_at_ms >= before && stored.revoked_at_ms.is_none());

    for vm in ["vm-2", "vm-3"] {
        enroll(&stack, &token, vm, &self::key()).await.unwrap();
    }
    let page = |after: Option<&str>| AgentPage {
        after: after.map(|after| after.parse().unwrap()),
        limit: Limit::new(2).unwrap(),
    };
    let ids = |list: &AgentList| {
        list.agents
            .iter()
            .map(|agent| agent.instance_id.to_string())
            .collect::<Vec<_>>()
    };
    let first = as_admin::<AgentsList>(&stack, &page(None)).await.unwrap();
    assert_eq!(
        (ids(&first), first.more),
        (vec!["vm-1".to_owned(), "vm-2".to_owned()], true)
    );
    let second = as_admin::<AgentsList>(&stack, &page(Some("vm-2"))).await.unwrap();
    assert_eq!((ids(&second), second.more), (vec!["vm-3".to_owned()], false));
    // An administrator with a limited scope sees and revokes only the agents of its VMs.
    let limited = Context::new(PATIENCE).as_principal(Principal {
        user: "bob".to_owned(),
        role: Role::Admin,
        scope: Scope::Only(vec!["vm-2".parse().unwrap()]),
    });
    let own = stack.bus.call::<AgentsList>(&limited, &page(None)).await.unwrap();
    assert_eq!(ids(&own), ["vm-2"]);
    let revoke = |vm: &str| AgentRef {
        instance_id: vm.parse().unwrap(),
    };
    let hidden = stack
        .bus
        .call::<AgentsRevoke>(&limited, &revoke("vm-1"))
        .await
        .unwrap_err();
    let unknown = stack
        .bus
        .call::<AgentsRevoke>(&limited, &revoke("vm-9"))
        .await
        .unwrap_err();
    assert_eq!((hidden.kind, hidden.message), (unknown.kind, unknown.message));
    assert!(agent(&stack, "vm-1").await.unwrap().revoked_at_ms.is_none());
}

/// A token that is malformed or unknown gets the same answer as one with a wrong secret.
#[tokio::test]
async fn wrong_tokens_get_the_same_answer() {
    let stack = builder().start().await;
    let good = token(&stack, 1, false).await;
    let text = good.token.as_str();
    let last = if text.ends_with('0') { "1" } else { "0" };
    let unknown = format!("vmj_{}{}", "0".repeat(16), &text[20..]);
    let wrong = format!("{}{last}", &text[..text.len() - 1]);
    // The answer does not depend on whether the token with this id is still valid.
    let revoked = token(&stack, 1, false).await;
    revoke_token(&stack, &revoked).await.unwrap();
    let mixed = format!("vmj_{}_{}", revoked.summary.id, &text[21..]);
    for bad in [
        "",
        &text[..40],
        &unknown,
        &wrong,
        &mixed,
        "x".repeat(1024).as_str(),
    ] {
        let outcome = enroll_from(&stack, SOURCE, &request(bad, "vm-1", &key())).await;
        let fault = outcome.unwrap_err();
        assert_eq!(
            (fault.kind, fault.message.as_str(), fault.retry_after),
            (
                FaultKind::Unauthenticated,
                "the join token is not valid; check that it is complete, or create a new one",
                None
            ),
            "{bad}"
        );
    }
    assert!(agents(&stack).await.agents.is_empty());
    enroll(&stack, &good, "vm-1", &key()).await.unwrap();
}

#[tokio::test]
async fn holder_of_the_secret_learns_why_enrolment_is_refused() {
    let stack = builder().start().await;
    let forbidden = FaultKind::Forbidden;

    let expired = token(&stack, 5, false).await;
    change(&stack, &expired, |record| record.expires_at_ms = unix_millis()).await;
    refused(
        enroll(&stack, &expired, "vm-1", &key()).await,
        forbidden,
        "has expired",
    );

    let revoked = token(&stack, 5, false).await;
    revoke_token(&stack, &revoked).await.unwrap();
    refused(
        enroll(&stack, &revoked, "vm-1", &key()).await,
        forbidden,
        "was revoked",
    );

    let once = token(&stack, 1, false).await;
    let first = key();
    enroll(&stack, &once, "vm-1", &first).await.unwrap();
    refused(
        enroll(&stack, &once, "vm-2", &key()).await,
        forbidden,
        "is used up",
    );

    let only = json!({ "only": ["vm-2", "vm-3"] });
    for (vms, allowed) in [(only, "vm-3"), (json!({ "prefix": "web-" }), "web-1")] {
        let new = json!({ "valid_seconds": 60, "uses": 5, "vms": vms, "replace": true });
        let limited = create(&stack, new).await;
        refused(
            enroll(&stack, &limited, "db-1", &key()).await,
            forbidden,
            "not for the VM db-1",
        );
        enroll(&stack, &limited, allowed, &key()).await.unwrap();
    }

    let many = token(&stack, 5, false).await;
    let taken = enroll(&stack, &many, "vm-1", &key()).await;
    refused(taken, FaultKind::Conflict, "the VM vm-1 has an agent");
    let of_another_vm = enroll(&stack, &many, "vm-9", &first).await;
    refused(
        of_another_vm,
        FaultKind::Conflict,
        "belongs or belonged to the agent of another VM",
    );
    let last = if first.as_str().ends_with('A') { "B" } else { "A" };
    let damaged = format!("{}{last}", &first.as_str()[..55]).parse().unwrap();
    refused(
        enroll(&stack, &many, "vm-9", &damaged).await,
        FaultKind::Invalid,
        "checksum",
    );
    assert_eq!(
        token_record(&stack, &many).await.used,
        0,
        "a refused enrolment takes no use"
    );
}

#[tokio::test]
async fn replaced_and_revoked_keys_are_no_longer_valid() {
    let stack = builder().start().await;
    let (many, replacing) = (token(&stack, 9, false).await, token(&stack, 1, true).await);
    let [old, new, newest] = [key(), key(), key()];
    enroll(&stack, &many, "vm-1", &old).await.unwrap();
    enroll(&stack, &replacing, "vm-1", &new).await.unwrap();
    let stored = agent(&stack, "vm-1").await.unwrap();
    assert_eq!(
        (&stored.public_key, &stored.join_token),
        (&new, &replacing.summary.id)
    );
    let back = enroll(&stack, &many, "vm-1", &old).await;
    refused(back, FaultKind::Forbidden, "was revoked or replaced");

    revoke_agent(&stack, "vm-1").await.unwrap();
    let revoked = agent(&stack, "vm-1").await.unwrap();
    assert!(revoked.revoked_at_ms.is_some());
    assert_eq!(
        agents(&stack).await.agents[0].revoked_at_ms,
        revoked.revoked_at_ms
    );
    revoke_agent(&stack, "vm-1").await.unwrap();
    assert_eq!(
        agent(&stack, "vm-1").await.unwrap(),
        revoked,
        "the first revocation counts"
    );
    let entry = bucket(&stack, AGENT_BUCKET).await.entry("vm-1").await.unwrap();
    assert_eq!(
        entry.unwrap().revision,
        4,
        "the write proves that the revoked record is the latest"
    );
    // The revoked key cannot come back, neither by a repetition nor with another token.
    for token in [&replacing, &many] {
        let back = enroll(&stack, token, "vm-1", &new).await;
        refused(back, FaultKind::Forbidden, "key of this agent was revoked");
    }
    enroll(&stack, &many, "vm-1", &newest).await.unwrap();
    let stored = agent(&stack, "vm-1").await.unwrap();
    assert_eq!((stored.public_key, stored.revoked_at_ms), (newest, None));

    assert_eq!(
        revoke_agent(&stack, "vm-9").await.unwrap_err().kind,
        FaultKind::NotFound
    );
    let mut unknown = token(&stack, 1, false).await;
    unknown.summary.id = "0".repeat(16).parse().unwrap();
    let missing = revoke_token(&stack, &unknown).await.unwrap_err();
    assert_eq!(missing.kind, FaultKind::NotFound);
}

/// The audit names the target, the creator of the token and the reason of each use, and never a secret.
#[tokio::test]
async fn uses_and_changes_are_audited_without_secrets() {
    let stack = builder().start().await;
    let once = token(&stack, 1, false).await;
    let id = &once.summary.id;
    enroll(&stack, &once, "vm-1", &key()).await.unwrap();
    enroll(&stack, &once, "vm-2", &key()).await.unwrap_err();
    let wrong = format!("{}x", once.token.as_str());
    enroll_from(&stack, SOURCE, &request(&wrong, "vm-3", &key()))
        .await
        .unwrap_err();
    revoke_token(&stack, &once).await.unwrap();
    revoke_agent(&stack, "vm-1").await.unwrap();

    let mut records = audit::newest(&stack.bus, 1000).await.unwrap();
    records.retain(|record| {
        record.action.starts_with("auth.join_tokens") || record.action.starts_with("auth.agents")
    });
    records.sort_by_key(|record| record.at_ms);
    let short = |record: &AuditRecord| {
        let target = record.target.clone().unwrap();
        (record.action.clone(), record.user.clone(), target, record.result)
    };
    let by_admin = |action: &str, target: &str, result| {
        (action.to_owned(), ADMIN.0.to_owned(), target.to_owned(), result)
    };
    let nobody = (
        "auth.agents.enroll".to_owned(),
        String::new(),
        "vm-3".to_owned(),
        AuditResult::Refused,
    );
    let expected = [
        by_admin("auth.join_tokens.create", id.as_str(), AuditResult::Requested),
        by_admin("auth.join_tokens.create", id.as_str(), AuditResult::Succeeded),
        by_admin("auth.agents.enroll", "vm-1", AuditResult::Requested),
        by_admin("auth.agents.enroll", "vm-1", AuditResult::Succeeded),
        by_admin("auth.agents.enroll", "vm-2", AuditResult::Refused),
        nobody,
        by_admin("auth.join_tokens.revoke", id.as_str(), AuditResult::Requested),
        by_admin("auth.join_tokens.revoke", id.as_str(), AuditResult::Succeeded),
        by_admin("auth.agents.revoke", "vm-1", AuditResult::Requested),
        by_admin("auth.agents.revoke", "vm-1", AuditResult::Succeeded),
    ];
    for record in &expected {
        assert!(
            records.iter().any(|found| short(found) == *record),
            "{record:?}: {records:?}"
        );
    }
    assert_eq!(records.len(), expected.len(), "{records:?}");
    let detail = |vm: &str| {
        let of_vm = |record: &&AuditRecord| {
            record.action == "auth.agents.enroll" && record.target.as_deref() == Some(vm)
        };
        records.iter().find(of_vm).unwrap().detail.clone()
    };
    assert_eq!(detail("vm-1"), format!("join token {id}"));
    assert_eq!(
        detail("vm-2"),
        format!("join token {id}: the join token is used up; create a new one")
    );
    let secret = once.token.as_str().rsplit('_').next().unwrap();
    assert!(!format!("{records:?}").contains(secret));
    let listed = as_admin::<JoinTokensList>(&stack, &Own {}).await.unwrap();
    assert_eq!(listed.tokens.len(), 1);
    assert!(listed.tokens[0].revoked && listed.tokens[0].used == 1);
    assert!(
        !serde_json::to_string(&listed)
            .unwrap()
            .contains(&token_record(&stack, &once).await.secret_hash)
    );
    assert!(!stack.replica(Program::Auth, 0).process.log().contains(secret));
}
