//! Tests that users can list and end their own sessions, and that idle sessions expire.

use std::time::Instant;

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, PATIENCE, Program, Stack, eventually, figure};
use vmwatch_api::time::unix_millis;

use super::client::{Api, rfc3339, stack};
use crate::ingest_support::metric;

async fn listed(api: &Api) -> Vec<Value> {
    api.read("/sessions").await["sessions"]
        .as_array()
        .unwrap()
        .clone()
}

#[tokio::test]
async fn user_can_list_and_end_own_sessions() {
    let stack = stack()
        .replicas(Program::Gateway, 2)
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    let before = rfc3339(unix_millis());
    let anonymous = Api::of(stack.gateway(0));
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    let new = json!({ "name": "eve", "password": "long enough", "role": "viewer" });
    assert_eq!(admin.post("/users", new).await.status, 201);
    let mut eve = Vec::new();
    for _ in 0..6 {
        eve.push(anonymous.log_in("eve", "long enough").await);
    }
    let [first, .., last] = &eve[..] else {
        unreachable!()
    };
    let sessions = listed(first).await;
    assert_eq!(
        sessions.len(),
        6,
        "the list has only the user's own sessions: {sessions:?}"
    );
    let current: Vec<_> = sessions
        .iter()
        .filter(|session| session["current"] == true)
        .collect();
    assert_eq!(current, [&sessions[5]], "the newest session is listed first");
    for session in &sessions {
        assert_eq!(session["source"], "127.0.0.1");
        let began = session["began_at"].as_str().unwrap();
        assert!(began >= before.as_str(), "{session}");
        assert!(session["last_used_at"].as_str().unwrap() >= began, "{session}");
        assert!(session["idle_ends_at"].as_str().unwrap() < session["expires_at"].as_str().unwrap());
    }
    // Neither the session's token nor its storage key can be derived from its id.
    let text = json!(sessions).to_string();
    for api in &eve {
        let token: vmwatch_api::auth::Token = api.token.as_ref().unwrap().parse().unwrap();
        assert!(!text.contains(&token.to_string()) && !text.contains(&token.key()));
    }

    let id = |index: usize| sessions[index]["id"].as_str().unwrap().to_owned();
    let path = |id: &str| format!("/sessions/{id}");
    admin.delete(&path(&id(0))).await.problem(404, "not_found");
    first
        .delete(&path(&"0".repeat(32)))
        .await
        .problem(404, "not_found");
    first.delete(&path("x")).await.problem(400, "invalid");
    assert_eq!(
        last.get("/me").await.status,
        200,
        "another user must not end the session"
    );
    assert_eq!(first.delete(&path(&id(0))).await.status, 204);
    for api in [last, &last.at(stack.gateway(1))] {
        api.is_over().await;
    }
    first.delete(&path(&id(0))).await.problem(404, "not_found");
    assert_eq!(listed(first).await.len(), 5);
    // The user ends the current session, like a logout.
    assert_eq!(first.delete(&path(&id(5))).await.status, 204);
    first.is_over().await;
    assert_eq!(listed(&eve[1]).await.len(), 4);

    // A change of the password ends all sessions, which auth-svc finds by the index of the user's sessions.
    let create = format!(
        "$JS.API.CONSUMER.CREATE.KV_{}",
        vmwatch_api::sessions::SESSION_BUCKET
    );
    // If the consumer has a name, the subject ends with that name.
    let client = stack.bus.client_for_tests();
    let mut scans = futures::stream::select(
        client.subscribe(create.clone()).await.unwrap(),
        client.subscribe(format!("{create}.>")).await.unwrap(),
    );
    stack.bus.settled().await;
    let password = json!({ "password": "another one" });
    let changed = admin.send(Method::PUT, "/users/eve/password", password).await;
    assert_eq!(changed.status, 204, "{changed:?}");
    for api in &eve {
        api.is_over().await;
    }
    stack.bus.settled().await;
    let scanned = futures::FutureExt::now_or_never(futures::StreamExt::next(&mut scans));
    assert!(
        scanned.is_none(),
        "auth-svc must not read the whole session bucket: {scanned:?}"
    );
    let audited = admin.read("/audit?action=auth.sessions.end").await;
    assert_eq!(audited["records"].as_array().unwrap().len(), 5, "{audited}");
    let log = stack.nats.server.log();
    assert!(!log.contains("Violation"), "{log}");
}

/// A session that is used stays valid on all gateways; an idle session ends.
#[tokio::test]
async fn idle_session_ends_and_used_session_stays_valid() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 2)
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .with_permissions()
        .set(Program::Auth, "VMWATCH_SESSION_IDLE_TIMEOUT", "4s")
        .start()
        .await;
    let anonymous = Api::of(stack.gateway(0));
    let used = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    let began = Instant::now();
    let idle = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    let there = used.at(stack.gateway(1));
    // The session is used only on the first gateway, until the other session has ended.
    eventually("the idle session is invalid", PATIENCE, async || {
        assert_eq!(used.get("/me").await.status, 200, "the session in use is valid");
        let sessions = listed(&used).await.len();
        (sessions == 1)
            .then_some(())
            .ok_or(format!("{sessions} sessions"))
    })
    .await;
    figure("idle_session_over_ms", began.elapsed().as_secs_f64() * 1e3);
    for gateway in [0, 1] {
        let reply = idle.at(stack.gateway(gateway)).get("/me").await;
        reply.problem(401, "unauthenticated");
    }
    assert_eq!(
        there.get("/me").await.status,
        200,
        "the session is valid on the other gateway too"
    );
    // auth-svc records the uses of a session at a bounded rate: with this idle time-out at most once in 250 ms, however
    // often the session is used.
    let seconds = began.elapsed().as_secs_f64();
    let noted = metric(
        stack.replica(Program::Auth, 0),
        "vmwatch_session_uses_noted_total",
    )
    .await;
    assert!(
        noted >= 1.0 && noted <= 4.0 * seconds + 2.0,
        "{noted} uses were recorded in {seconds} s"
    );

    // A use that is reported after the session has ended does not restore the session.
    let key = used
        .token
        .as_ref()
        .unwrap()
        .parse::<vmwatch_api::auth::Token>()
        .unwrap()
        .key();
    assert_eq!(used.delete("/sessions/current").await.status, 204);
    let report = vmwatch_api::sessions::UsedSessions {
        sessions: vec![vmwatch_api::sessions::UsedSession {
            key,
            used_at_ms: unix_millis(),
        }],
    };
    let context = vmwatch_bus::Context::new(PATIENCE);
    let noted = stack
        .bus
        .call::<vmwatch_api::sessions::SessionsUsed>(&context, &report);
    noted.await.unwrap();
    used.is_over().await;
    there.is_over().await;
}
