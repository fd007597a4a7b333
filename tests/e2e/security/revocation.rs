//! Tests that changes and removals of users take effect even if some of their steps fail.

use mongodb::bson::{DateTime, Document, doc};
use reqwest::Method;
use serde_json::json;
use sha2::{Digest, Sha256};
use testkit::{ADMIN, PATIENCE, Program, Stack, eventually, figure};
use vmwatch_api::{
    Principal, Role, Scope, UserKey,
    sessions::{SESSION_BUCKET, USER_BUCKET, UserRecord},
    users::{PasswordChange, UsersSetPassword},
    wire::FaultKind,
};
use vmwatch_bus::Context;

use crate::{
    ingest_support::metric,
    rest::client::{Api, Reply},
};

/// Returns the keys of the KV bucket of sessions.
async fn stored_sessions(stack: &Stack) -> usize {
    use futures::TryStreamExt;
    let bucket = stack
        .bus
        .jetstream_for_tests()
        .get_key_value(SESSION_BUCKET)
        .await
        .unwrap();
    let keys: Vec<_> = bucket.keys().await.unwrap().try_collect().await.unwrap();
    keys.len()
}

fn users(stack: &Stack) -> mongodb::Collection<Document> {
    stack.database.handle().collection("users")
}

async fn set_in_database(stack: &Stack, user: &str, set: Document) {
    let users = users(stack);
    let update = users.update_one(doc! { "_id": user }, doc! { "$set": set });
    assert_eq!(update.await.unwrap().matched_count, 1);
}

async fn add(admin: &Api, name: &str, role: &str) {
    let user = json!({ "name": name, "password": "long enough", "role": role });
    let added = admin.post("/users", user).await;
    assert_eq!(added.status, 201, "{added:?}");
}

/// Each step of a user change may fail or be skipped. The state of the database must still take effect.
#[tokio::test]
async fn user_changes_take_effect_despite_failures() {
    let stack = Stack::builder()
        .replicas(Program::Auth, 2)
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .with_permissions()
        .set(Program::Auth, "VMWATCH_RECONCILE_INTERVAL", "500ms")
        .start()
        .await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    removes_user_while_the_bus_is_frozen(&stack, &anonymous, &admin).await;
    repeats_change_that_was_not_passed_on(&stack, &anonymous, &admin).await;
    heals_what_a_crash_left_undone(&stack, &anonymous, &admin).await;
    finishes_removal_that_a_crash_interrupted(&stack, &anonymous, &admin).await;
    assert_eq!(
        admin.get("/me").await.status,
        200,
        "the sessions of other users stay valid"
    );
    let log = stack.nats.server.log();
    assert!(!log.contains("Violation"), "{log}");
}

/// Removes a user with the command line and returns its output.
fn remove_by_command(stack: &Stack, user: &str) -> Result<String, String> {
    remove_by_command_with(stack, user, &[])
}

fn remove_by_command_with(
    stack: &Stack,
    user: &str,
    settings: &[(String, String)],
) -> Result<String, String> {
    let args = ["user", "remove", user];
    let output = stack.try_command("vmwatch-auth", Program::Auth, &args, "", settings);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

async fn removes_user_while_the_bus_is_frozen(stack: &Stack, anonymous: &Api, admin: &Api) {
    add(admin, "vic", "operator").await;
    let vic = anonymous.log_in("vic", "long enough").await;
    stack.nats.server.pause();
    // With the default setting the command would be refused, because the audit is unreachable.
    let unaudited = [("VMWATCH_AUDIT_REQUIRED".to_owned(), "false".to_owned())];
    let refused = remove_by_command_with(stack, "vic", &unaudited);
    stack.nats.server.resume();
    let refused = refused.unwrap_err();
    assert!(refused.contains("repeat the request"), "{refused}");
    stack.ready().await;
    // The reconciler may have removed the user first. In both cases the removal has succeeded and nothing is left to
    // remove.
    let repeated = remove_by_command(stack, "vic");
    assert!(
        repeated.as_ref().is_ok_and(|text| text.contains("removed vic"))
            || repeated.as_ref().is_err_and(|text| text.contains("no user vic")),
        "{repeated:?}"
    );
    vic.is_over().await;
    let again = remove_by_command(stack, "vic");
    assert!(again.unwrap_err().contains("there is no user vic"));
}

/// The KV bucket of users is unreachable while a password is changed and while a user is added.
async fn repeats_change_that_was_not_passed_on(stack: &Stack, anonymous: &Api, admin: &Api) {
    add(admin, "eve", "viewer").await;
    let eve = anonymous.log_in("eve", "long enough").await;
    let change = json!({ "password": "another one", "old_password": "long enough" });
    let put = async |api: &Api| api.send(Method::PUT, "/users/eve/password", change.clone()).await;
    let new = json!({ "name": "ann", "password": "long enough", "role": "viewer" });
    refuses_writes(stack, true).await;
    for reply in [put(&eve).await, admin.post("/users", new.clone()).await] {
        let detail = reply.problem(503, "backend");
        assert!(detail.contains("repeat the request"), "{detail}");
    }
    refuses_writes(stack, false).await;
    // The password in the database has changed already, but auth-svc accepts a repetition of the change for a minute.
    // If the reconciler was faster, the repeated request gets 401, because the session has already ended.
    let repeated = put(&eve).await;
    assert!(matches!(repeated.status, 204 | 401), "{repeated:?}");
    eve.is_over().await;
    anonymous.log_in("eve", "another one").await;
    let repeated = admin.post("/users", new).await;
    assert!(matches!(repeated.status, 201 | 409), "{repeated:?}");
    anonymous.log_in("ann", "long enough").await;
}

/// Makes the KV bucket of users refuse or accept new values.
async fn refuses_writes(stack: &Stack, refuses: bool) {
    let stream = format!("KV_{USER_BUCKET}");
    let info = stack.bus.jetstream_for_tests().get_stream(&stream).await.unwrap();
    let mut config = info.cached_info().config.clone();
    config.max_message_size = if refuses { 1 } else { -1 };
    stack
        .bus
        .jetstream_for_tests()
        .update_stream(config)
        .await
        .unwrap();
}

/// Tests the state that remains after auth-svc died between its writes to the database and to the KV bucket, or after
/// an operator changed the database.
async fn heals_what_a_crash_left_undone(stack: &Stack, anonymous: &Api, admin: &Api) {
    add(admin, "mia", "operator").await;
    let mia = anonymous.log_in("mia", "long enough").await;
    assert_eq!(mia.read("/me").await["role"], "operator");
    set_in_database(stack, "mia", doc! { "role": "viewer" }).await;
    eventually(
        "the role of an open session follows the database",
        PATIENCE,
        async || {
            let role = mia.read("/me").await["role"].clone();
            (role == "viewer").then_some(()).ok_or(role.to_string())
        },
    )
    .await;
    set_in_database(stack, "mia", doc! { "sessions_not_before": DateTime::now() }).await;
    eventually("the gateway refuses the session", PATIENCE, async || {
        let status = mia.get("/me").await.status;
        (status == 401).then_some(()).ok_or(status.to_string())
    })
    .await;
    anonymous.log_in("mia", "long enough").await.read("/me").await;
    // The user's record in the KV bucket is damaged, by an attacker or a software error.
    let bucket = stack
        .bus
        .jetstream_for_tests()
        .get_key_value(USER_BUCKET)
        .await
        .unwrap();
    bucket
        .put(UserKey::from_name("mia").bucket_key(), "{".into())
        .await
        .unwrap();
    eventually(
        "the reconciler restores the user's record",
        PATIENCE,
        async || {
            let value = bucket
                .get(UserKey::from_name("mia").bucket_key())
                .await
                .unwrap()
                .unwrap();
            let record = serde_json::from_slice::<UserRecord>(&value);
            record.map(drop).map_err(|error| error.to_string())
        },
    )
    .await;
}

/// Tests a user who is removed from the database but not from the KV bucket, and whose sessions still exist.
async fn finishes_removal_that_a_crash_interrupted(stack: &Stack, anonymous: &Api, admin: &Api) {
    let before = stored_sessions(stack).await;
    add(admin, "zoe", "viewer").await;
    let zoe = anonymous.log_in("zoe", "long enough").await;
    assert_eq!(zoe.get("/me").await.status, 200);
    users(stack).delete_one(doc! { "_id": "zoe" }).await.unwrap();
    eventually("the gateway refuses the session", PATIENCE, async || {
        let status = zoe.get("/me").await.status;
        (status == 401).then_some(()).ok_or(status.to_string())
    })
    .await;
    eventually("the removed user's session is deleted", PATIENCE, async || {
        let stored = stored_sessions(stack).await;
        (stored == before).then_some(()).ok_or(format!(
            "{stored} sessions are stored, {before} were stored before"
        ))
    })
    .await;
}

/// Returns the key of a counter in the KV bucket of failed logins.
fn counter_key(kind: &str, parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    let digest: [u8; 32] = hash.finalize().into();
    format!("{kind}.{}", data_encoding::HEXLOWER.encode(&digest))
}

/// However many guesses of an old password run concurrently, auth-svc verifies at most the limit. Damaged records of
/// the throttle and of the session index neither allow more guesses nor lock a user out.
#[tokio::test]
async fn guesses_of_old_passwords_are_throttled_despite_damaged_records() {
    let stack = Stack::builder()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .set(Program::Auth, "VMWATCH_MAX_ACCOUNT_REQUESTS", "1000")
        .start()
        .await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    add(&admin, "vera", "viewer").await;
    // For a minute after a password change, auth-svc accepts a repetition of the change without the right old password,
    // so the test moves the change into the past.
    set_in_database(
        &stack,
        "vera",
        doc! { "sessions_not_before": DateTime::from_millis(0) },
    )
    .await;
    let vera = anonymous.log_in("vera", "long enough").await;
    // The guesses bypass the gateway, whose own limits would refuse most of them.
    let context = Context::new(PATIENCE).as_principal(Principal {
        user: "vera".to_owned(),
        role: Role::Viewer,
        scope: Scope::All,
    });
    let guesses = (0..60).map(|guess| {
        let change = PasswordChange {
            name: "vera".parse().unwrap(),
            password: "long enough".parse().unwrap(),
            old_password: Some(format!("guess {guess}").parse().unwrap()),
        };
        let (bus, context) = (&stack.bus, &context);
        async move {
            bus.call::<UsersSetPassword>(context, &change)
                .await
                .unwrap_err()
                .kind
        }
    });
    let refusals = futures::future::join_all(guesses).await;
    let count = |kind: FaultKind| refusals.iter().filter(|refusal| **refusal == kind).count();
    let (judged, throttled) = (count(FaultKind::Forbidden), count(FaultKind::Throttled));
    figure(
        "old_password_guesses_judged",
        f64::from(u32::try_from(judged).unwrap()),
    );
    assert_eq!((judged, throttled), (5, 55), "{refusals:?}");
    assert_eq!(vera.get("/me").await.status, 200);

    let js = stack.bus.jetstream_for_tests();
    add(&admin, "bob", "viewer").await;
    let log_in = async || {
        let body = json!({ "user_name": "bob", "password": "long enough" });
        anonymous.post("/sessions", body).await
    };
    let failures = js.get_key_value("vmwatch_login_failures").await.unwrap();
    let pair = counter_key("pair", &["bob", "127.0.0.1"]);
    let broken = r#"{"stream":"VMWATCH_SAMPLES","seq":1}"#;
    failures.put(&pair, broken.into()).await.unwrap();
    log_in().await.problem(429, "throttled");
    failures.delete(&pair).await.unwrap();

    // A damaged counter of a user's failed logins counts as a counter at its limit, so one attempt per address is left.
    failures
        .put(counter_key("user", &["bob"]), broken.into())
        .await
        .unwrap();
    let session = |reply: &Reply| {
        assert_eq!(reply.status, 201, "{reply:?}");
        anonymous.holding(reply.json()["token"].as_str().unwrap())
    };
    let unlisted = session(&log_in().await);

    // After the user's index of sessions was damaged, it contains only new sessions.
    let index = js.get_key_value("vmwatch_user_sessions").await.unwrap();
    let damage_index = async || {
        let key = UserKey::from_name("bob").bucket_key();
        index.put(key, broken.into()).await.unwrap();
    };
    damage_index().await;
    let listed = session(&log_in().await);
    let sessions = listed.read("/sessions").await["sessions"].clone();
    assert_eq!(sessions.as_array().unwrap().len(), 1);
    let counted = metric(stack.replica(Program::Auth, 0), "vmwatch_broken_records_total").await;
    assert!(counted >= 3.0, "{counted}");

    // The user's record contains a date that ends all older sessions, also those that the damaged index does not
    // contain.
    assert_eq!(unlisted.get("/me").await.status, 200);
    let set = json!({ "password": "long enough" });
    let reply = admin.send(Method::PUT, "/users/bob/password", set).await;
    assert_eq!(reply.status, 204, "{reply:?}");
    listed.is_over().await;
    unlisted.is_over().await;
    let unlisted = session(&log_in().await);
    damage_index().await;
    assert_eq!(admin.delete("/users/bob").await.status, 204);
    unlisted.is_over().await;
}
