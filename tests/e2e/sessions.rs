//! Sessions: made by one gateway, good on all at once, and ended everywhere.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{ADMIN, Gateway, PATIENCE, Program, Stack, codes, eventually, failure};
use vmwatch_api::{Role, Scope};

const INVALID: &str = "'invalid or expired session'";

fn vm_request(session: &Value) -> Value {
    json!({ "method": codes::VM, "session_id": session, "data": { "instance_id": "vm-1" } })
}

/// Whether a gateway takes the session; anything but yes and the contract's no is a failure.
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

/// A gateway learns of a session by watching; a request that is faster than the watch is answered as well.
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
        assert!(seen.insert(session), "a session is never given twice");
    }
    // Without the time that passwords take, the request and the watch run side by side.
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
async fn session_expires() {
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
            "it ended too early"
        );
        eventually("the session ends", PATIENCE, async || {
            if accepted(gateway, &session).await {
                Err("it is still taken".to_owned())
            } else {
                Ok(())
            }
        })
        .await;
        assert!(before.elapsed() >= Duration::from_secs(2), "it ended too early");
    }
    assert!(
        made.elapsed() < Duration::from_secs(4),
        "it lived too long: {:?}",
        made.elapsed()
    );
}

/// One answer for all that is no session, whatever else is wrong with the request.
#[tokio::test]
async fn refuses_all_invalid_sessions_alike() {
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
    // The session comes before any other parameter, and for every method but login.
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

/// What an operator does with users takes hold at once, and a wrong user reads as a wrong password.
#[tokio::test]
async fn password_change_ends_sessions_of_user() {
    let stack = Stack::builder().replicas(Program::Gateway, 2).start().await;
    let gateway = stack.gateway(0);
    let printed = stack.command(Program::Auth, &["user", "add", "eve"], "first password\n");
    assert!(printed.contains("added eve as viewer"), "{printed}");
    let session = gateway.login("eve", "first password").await;
    let other = gateway.login(ADMIN.0, ADMIN.1).await;
    assert!(accepted(stack.gateway(1), &session).await);

    stack.command(Program::Auth, &["user", "password", "eve"], "second password\n");
    for index in [0, 1] {
        eventually("the session ends", Duration::from_secs(1), async || {
            if accepted(stack.gateway(index), &session).await {
                Err("it is still taken".to_owned())
            } else {
                Ok(())
            }
        })
        .await;
        assert!(
            accepted(stack.gateway(index), &other).await,
            "other users keep theirs"
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
