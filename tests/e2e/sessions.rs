//! Tests sessions of the documented API: a session that was created through one gateway is valid on all gateways at
//! once, and ends on all of them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{ADMIN, Gateway, PATIENCE, Program, Stack, codes, eventually, failure};
use vmwatch_api::{Role, Scope};

const INVALID: &str = "'invalid or expired session'";

fn vm_request(session: &Value) -> Value {
    json!({ "method": codes::VM, "session_id": session, "data": { "instance_id": "vm-1" } })
}

/// Returns whether a gateway accepts the session. Panics on any answer other than success and the documented refusal.
async fn accepted(gateway: &Gateway, session: &str) -> bool {
    let answer = gateway.post(&vm_request(&json!(session))).await;
    let accepted = answer.status() == 1;
    if !accepted {
        assert_eq!(
            (answer.http, answer.body),
            (200, failure(3, &json!(codes::VM), session, INVALID))
        );
    }
    accepted
}

/// A gateway learns of a new session by watching a KV bucket. It also accepts a request with the session that arrives
/// before the watch's update.
#[tokio::test]
async fn new_session_is_valid_on_every_gateway_at_once() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 3)
        .replicas(Program::Auth, 2)
        .start()
        .await;
    let gateways = [0, 1, 2].map(|index| stack.gateway(index));
    let mut seen = std::collections::HashSet::new();
    for turn in 0..6 {
        let session = gateways[turn % 3].login(ADMIN.0, ADMIN.1).await;
        assert!(accepted(gateways[(turn + 1) % 3], &session).await, "turn {turn}");
        assert!(accepted(gateways[(turn + 2) % 3], &session).await, "turn {turn}");
        assert!(seen.insert(session), "each login gets a new session id");
    }
    // These sessions are made without password hashing, so that requests arrive at the same time as the watch's
    // updates.
    for turn in 0..200 {
        let session = stack.session(Role::Viewer, Scope::All).await;
        let [first, second, third] = gateways.map(|gateway| accepted(gateway, &session));
        assert_eq!(
            tokio::join!(first, second, third),
            (true, true, true),
            "turn {turn}"
        );
    }
}

#[tokio::test]
async fn session_expires_after_its_lifetime() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 2)
        .set(Program::Auth, "VMWATCH_SESSION_TTL", "2s")
        .start()
        .await;
    let before = Instant::now();
    let session = stack.gateway(0).login(ADMIN.0, ADMIN.1).await;
    let made = Instant::now();
    for index in [0, 1] {
        let gateway = stack.gateway(index);
        let taken = accepted(gateway, &session).await;
        assert!(
            taken || before.elapsed() > Duration::from_secs(2),
            "the session ended too early"
        );
        eventually("the gateway refuses the session", PATIENCE, async || {
            if accepted(gateway, &session).await {
                Err("the session is still accepted".to_owned())
            } else {
                Ok(())
            }
        })
        .await;
        assert!(
            before.elapsed() >= Duration::from_secs(2),
            "the session ended too early"
        );
    }
    assert!(
        made.elapsed() < Duration::from_secs(12),
        "the session ended too late: {:?}",
        made.elapsed()
    );
}

/// Every invalid session gets the same answer, whatever else is wrong with the request.
#[tokio::test]
async fn all_invalid_sessions_get_the_same_answer() {
    let stack = Stack::builder().replicas(Program::Metrics, 0).start().await;
    let gateway = stack.gateway(0);
    let good = stack.session(Role::Admin, Scope::All).await;
    let unknown = "00000000-0000-0000-0000-000000000000";
    let texts = [
        "",
        unknown,
        &good[..35],
        &good.to_uppercase(),
        &good.replace('-', ""),
        &format!("{good} "),
        &format!("{good}\n"),
        "vmwatch_sessions.>",
        "*",
        "é",
        &"a".repeat(4096),
    ];
    for text in texts {
        assert!(!accepted(gateway, text).await, "{text:?}");
    }
    for no_text in [
        Value::Null,
        json!(7),
        json!({ "$gt": "" }),
        json!([good]),
        json!(true),
    ] {
        let answer = gateway.post(&vm_request(&no_text)).await;
        assert_eq!(
            answer.body,
            failure(3, &json!(codes::VM), "", INVALID),
            "{no_text}"
        );
    }
    // The session is checked before all other parameters, for every method except login.
    for method in [
        codes::PROCESSES,
        codes::VM,
        codes::PROCESSES_BY_NAME,
        codes::START,
    ] {
        for request in [
            json!({ "method": method, "data": { "instance_id": "vm-1" } }),
            json!({ "method": method, "data": 7, "limit": 0, "format": "xml", "message_id": 1 }),
        ] {
            let answer = gateway.post(&request).await;
            assert_eq!(
                (answer.http, answer.body),
                (200, failure(3, &json!(method), "", INVALID))
            );
        }
    }
}

/// An operator's changes of users take effect at once. A login with an unknown user name gets the same answer as one
/// with a wrong password.
#[tokio::test]
async fn password_change_by_an_operator_ends_the_users_sessions() {
    let stack = Stack::builder().replicas(Program::Gateway, 2).start().await;
    let gateway = stack.gateway(0);
    let printed = stack.command(Program::Auth, &["user", "add", "eve"], "first password\n");
    assert!(printed.contains("added eve as viewer"), "{printed}");
    let session = gateway.login("eve", "first password").await;
    let other = gateway.login(ADMIN.0, ADMIN.1).await;
    assert!(accepted(stack.gateway(1), &session).await);

    stack.command(Program::Auth, &["user", "password", "eve"], "second password\n");
    for index in [0, 1] {
        eventually(
            "the gateway refuses the session",
            Duration::from_secs(1),
            async || {
                if accepted(stack.gateway(index), &session).await {
                    Err("the session is still accepted".to_owned())
                } else {
                    Ok(())
                }
            },
        )
        .await;
        assert!(
            accepted(stack.gateway(index), &other).await,
            "other users keep their sessions"
        );
    }
    gateway.login("eve", "second password").await;

    let refused = async |user: &str, password: &str| {
        let data = json!({ "user_name": user, "password": password });
        gateway
            .post(&json!({ "method": codes::LOGIN, "data": data }))
            .await
    };
    let (wrong_password, wrong_user) = (
        refused("eve", "first password").await,
        refused("mallory", "first password").await,
    );
    assert_eq!((wrong_password.http, wrong_password.status()), (200, 3));
    assert_eq!(wrong_password.body, wrong_user.body);
    let body = wrong_password.body;
    assert!(
        body.starts_with(r#"{"status_code":3,"message":"'"#)
            && body.ends_with(r#"'","method":458753,"session_id":"","message_id":""}"#),
        "{body}"
    );
}
