//! Tests records of a newer vmwatch version in the stores: this version shows them where possible and does not change
//! them.

use async_nats::jetstream::kv::Store;
use mongodb::bson::doc;
use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    Role, Scope, UserKey,
    audit::AUDIT_SUBJECT_PREFIX,
    auth::Token,
    events::EVENT_SUBJECT_PREFIX,
    sessions::{SESSION_BUCKET, USER_BUCKET},
    time::unix_millis,
};

use crate::{
    ingest_support::metric,
    rest::client::{Api, Reply, stack},
};

const OPERATION: &str = "00112233445566778899aabbccddeeff";

/// Returns an operation that a replica of a newer version began, with an expired lease.
pub(crate) fn newer_operation() -> Value {
    json!({
        "method": "lifecycle.migrate",
        "operation": {
            "id": OPERATION, "verb": "migrate", "instance_id": "vm-1", "user": "ann", "request_id": "r",
            "requested_at_ms": unix_millis(), "deadline_ms": unix_millis() + 60_000, "state": "preparing",
            "target": "other-host", "history": [],
        },
        "lease": { "owner": "newer", "until_ms": 1 },
        "acts": 0,
    })
}

/// Writes an operation of a newer version to the KV bucket of operations. Returns its revision.
pub(crate) async fn put_newer_operation(stack: &Stack, operation: &Value) -> (Store, u64) {
    let operations = bucket(stack, "vmwatch_operations").await;
    let revision = put(&operations, OPERATION, operation).await;
    (operations, revision)
}

/// Appends an audit record of a newer version to the audit stream.
pub(crate) async fn append_newer_audit_record(stack: &Stack) {
    let record = json!({
        "at_ms": unix_millis(), "action": "lifecycle.migrate", "user": "ann", "request_id": "r",
        "result": "deferred", "approved_by": "bob",
    });
    publish(
        stack,
        &format!("{AUDIT_SUBJECT_PREFIX}lifecycle.migrate"),
        &record,
    )
    .await;
}

/// Gives the user a role and a scope that only a newer version knows.
pub(crate) async fn give_newer_role(stack: &Stack, user: &str) -> (Store, u64) {
    let set = doc! { "role": "auditor", "scope": { "tenant": "x" }, "of_a_newer_version": 1 };
    let users = stack
        .database
        .handle()
        .collection::<mongodb::bson::Document>("users");
    let key = UserKey::from_name(user);
    let update = users.update_one(doc! { "_id": key.as_str() }, doc! { "$set": set });
    assert_eq!(update.await.unwrap().matched_count, 1);
    let bucket = bucket(stack, USER_BUCKET).await;
    let mut record = value(&bucket, &key.bucket_key()).await;
    record["principal"]["role"] = json!("auditor");
    record["principal"]["scope"] = json!({ "tenant": "x" });
    record["of_a_newer_version"] = json!({ "a": 1 });
    let revision = put(&bucket, &key.bucket_key(), &record).await;
    (bucket, revision)
}

async fn bucket(stack: &Stack, name: &str) -> Store {
    stack.bus.jetstream_for_tests().get_key_value(name).await.unwrap()
}

async fn value(bucket: &Store, key: &str) -> Value {
    serde_json::from_slice(&bucket.get(key).await.unwrap().unwrap()).unwrap()
}

async fn put(bucket: &Store, key: &str, value: &Value) -> u64 {
    let value = value.to_string();
    bucket.put(key, value.into()).await.unwrap()
}

async fn publish(stack: &Stack, subject: &str, body: &Value) {
    let sent = stack
        .bus
        .jetstream_for_tests()
        .publish(subject.to_owned(), body.to_string().into())
        .await;
    sent.unwrap().await.unwrap();
}

async fn has_status(api: &Api, status: u16) -> Reply {
    eventually(
        "the gateway applies the changed user record",
        PATIENCE,
        async || {
            let reply = api.get("/me").await;
            if reply.status == status {
                Ok(reply)
            } else {
                Err(format!("{reply:?}"))
            }
        },
    )
    .await
}

#[tokio::test]
async fn records_of_a_newer_version_are_shown_and_not_changed() {
    let stack = stack()
        .set(Program::Lifecycle, "VMWATCH_OPERATION_LEASE", "1s")
        .set(Program::Auth, "VMWATCH_RECONCILE_INTERVAL", "200ms")
        // With this idle time-out, auth-svc records the use of a session every 250 ms.
        .set(Program::Auth, "VMWATCH_SESSION_IDLE_TIMEOUT", "5s")
        .start()
        .await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let began = unix_millis();
    let operation = newer_operation();
    let (operations, revision) = put_newer_operation(&stack, &operation).await;
    shows_operation_audit_record_and_event(&stack, &admin).await;
    refuses_and_keeps_newer_role(&stack, &admin).await;
    keeps_newer_fields_of_sessions(&stack).await;

    // Waits for twice the time after which lifecycle-svc adopts an operation with an expired lease.
    eventually("leases have expired", PATIENCE, async || {
        (unix_millis() > began + 2_000)
            .then_some(())
            .ok_or("too early".to_owned())
    })
    .await;
    let entry = operations.entry(OPERATION).await.unwrap().unwrap();
    assert_eq!(
        (entry.revision, entry.value.as_ref()),
        (revision, operation.to_string().as_bytes())
    );
}

async fn shows_operation_audit_record_and_event(stack: &Stack, admin: &Api) {
    let shown = admin.read(&format!("/operations/{OPERATION}")).await;
    assert_eq!(
        (&shown["action"], &shown["state"]),
        (&json!("unknown"), &json!("unknown"))
    );
    let listed = admin.read("/operations").await;
    assert_eq!(listed["operations"].as_array().map(Vec::len), Some(1), "{listed}");

    append_newer_audit_record(stack).await;
    let audit = admin.read("/audit?action=lifecycle.migrate").await;
    assert_eq!(audit["records"][0]["result"], "unknown");

    let event = json!({ "kind": "of_a_newer_version", "severity": 3 });
    publish(
        stack,
        &format!("{EVENT_SUBJECT_PREFIX}of_a_newer_version.vm-1"),
        &event,
    )
    .await;
    let gateway = stack.replica(Program::Gateway, 0);
    eventually("the gateway counts the unknown event", PATIENCE, async || {
        let counted = metric(gateway, "vmwatch_events_of_newer_kinds_total").await;
        // The metric is a count in a floating-point number: above 0.5 means at least one event.
        (counted > 0.5).then_some(()).ok_or(counted.to_string())
    })
    .await;
    assert!(!gateway.process.log().contains("decoding a live event failed"));
}

async fn refuses_and_keeps_newer_role(stack: &Stack, admin: &Api) {
    let token = stack.session_as("Vera", Role::Viewer).await;
    let vera = Api::of(stack.gateway(0)).holding(&token);
    has_status(&vera, 200).await;
    let (users, revision) = give_newer_role(stack, "Vera").await;
    has_status(&vera, 403).await;
    for path in ["/vms", "/events", "/audit"] {
        vera.get(path).await.problem(403, "forbidden");
    }
    let listed = admin.read("/users/vera").await;
    assert_eq!(
        (&listed["role"], &listed["scope"]),
        (&json!("unknown"), &json!("unknown"))
    );
    // Waits for a reconciler pass that began after this point. Each pass removes the user `ghost`, which exists only in
    // the KV bucket. The first removal may be the work of a pass that began before.
    let auth = stack.replica(Program::Auth, 0);
    let ghost = json!({
        "principal": { "user": "ghost", "role": "viewer", "scope": "all" }, "sessions_not_before_ms": 0,
    });
    for _ in 0..2 {
        let before = metric(auth, "vmwatch_users_reconciled_total").await;
        put(&users, &UserKey::from_name("ghost").bucket_key(), &ghost).await;
        eventually("a reconciler pass has completed", PATIENCE, async || {
            let reconciled = metric(auth, "vmwatch_users_reconciled_total").await;
            (reconciled > before).then_some(()).ok_or(reconciled.to_string())
        })
        .await;
    }
    let key = UserKey::from_name("Vera").bucket_key();
    assert_eq!(users.entry(&key).await.unwrap().unwrap().revision, revision);
    // The session was kept: it is valid again as soon as its user has a known role.
    let mut record = value(&users, &key).await;
    record["principal"]["role"] = json!("viewer");
    record["principal"]["scope"] = json!("all");
    put(&users, &key, &record).await;
    has_status(&vera, 200).await;
}

async fn keeps_newer_fields_of_sessions(stack: &Stack) {
    let token = Token::from_random([7; 16]);
    let session = stack.session_of(token, Role::Viewer, Scope::All).await;
    let sessions = bucket(stack, SESSION_BUCKET).await;
    let mut record = value(&sessions, &token.key()).await;
    record["of_a_newer_version"] = json!({ "a": [1] });
    // These times make auth-svc record the next use of this session soon.
    record["last_used_at_ms"] = json!(unix_millis() - 1_000);
    record["idle_ends_at_ms"] = json!(unix_millis() + 4_000);
    let revision = put(&sessions, &token.key(), &record).await;
    let api = Api::of(stack.gateway(0)).holding(&session);
    eventually("the use of the session is recorded", PATIENCE, async || {
        assert_eq!(api.get("/me").await.status, 200);
        let entry = sessions.entry(token.key()).await.unwrap().unwrap();
        (entry.revision > revision)
            .then_some(())
            .ok_or(entry.revision.to_string())
    })
    .await;
    let kept = value(&sessions, &token.key()).await;
    assert_eq!(kept["of_a_newer_version"], record["of_a_newer_version"], "{kept}");
    assert!(kept["last_used_at_ms"].as_u64() > record["last_used_at_ms"].as_u64());
}
