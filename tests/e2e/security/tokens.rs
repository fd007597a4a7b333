//! Tests session tokens that are guessed, truncated, replayed or ended, and users that have too many sessions.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use serde_json::{Value, json};
use testkit::{ADMIN, Gateway, PATIENCE, Program, Stack, codes, eventually, failure, figure};
use vmwatch_api::{Role, Scope, auth::Token, sessions::SESSION_BUCKET};

const INVALID: &str = "'invalid or expired session'";

fn vm_request(session: &str) -> Value {
    json!({ "method": codes::VM, "session_id": session, "data": { "instance_id": "vm-1" } })
}

/// Returns whether a gateway accepts the session. Panics on any answer other than success and the documented refusal.
async fn accepted(gateway: &Gateway, session: &str) -> bool {
    let answer = gateway.post(&vm_request(session)).await;
    if answer.status() == 1 {
        return true;
    }
    let refused = failure(3, &json!(codes::VM), session, INVALID);
    assert_eq!((answer.http, answer.body), (200, refused));
    false
}

fn random() -> String {
    let mut bits = [0; 16];
    getrandom::fill(&mut bits).unwrap();
    Token::from_random(bits).to_string()
}

/// Counts all reads of the KV bucket of sessions.
async fn bucket_questions(stack: &Stack) -> Arc<AtomicU64> {
    let bucket = format!("KV_{SESSION_BUCKET}");
    let count = Arc::new(AtomicU64::new(0));
    for subject in [
        format!("$JS.API.STREAM.INFO.{bucket}"),
        format!("$JS.API.DIRECT.GET.{bucket}"),
        format!("$JS.API.DIRECT.GET.{bucket}.>"),
    ] {
        let mut seen = stack.bus.client_for_tests().subscribe(subject).await.unwrap();
        let count = Arc::clone(&count);
        tokio::spawn(async move {
            while seen.next().await.is_some() {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    stack.bus.settled().await;
    count
}

/// However many session tokens are guessed, the gateway reads the KV bucket at a bounded rate, and users with a session
/// are not affected.
#[tokio::test]
async fn guesses_of_session_tokens_cause_bounded_kv_bucket_reads() {
    const GUESSES: usize = 10_000;
    let stack = Stack::builder().start().await;
    let gateway = stack.gateway(0);
    let live = stack.session(Role::Viewer, Scope::All).await;
    let over = gateway.login(ADMIN.0, ADMIN.1).await;
    assert!(accepted(gateway, &live).await && accepted(gateway, &over).await);
    let changed = stack.command(
        Program::Auth,
        &["user", "password", ADMIN.0],
        "another password\n",
    );
    assert!(changed.contains("ended 1 sessions"), "{changed}");

    let reads = bucket_questions(&stack).await;
    let started = Instant::now();
    let guesses = (0..GUESSES).map(|turn| match turn % 4 {
        // Each guess is a truncated token, a token with one changed digit, the token of an ended session, or a random
        // token.
        0 => live[..turn % 36].to_owned(),
        1 => {
            let at = turn % 8;
            let other = if &live[at..=at] == "0" { "1" } else { "0" };
            format!("{}{other}{}", &live[..at], &live[at + 1..])
        }
        2 => over.clone(),
        _ => random(),
    });
    let hits = stream::iter(guesses)
        .map(|guess| async move { accepted(gateway, &guess).await })
        .buffer_unordered(64)
        .filter(|hit| std::future::ready(*hit))
        .count()
        .await;
    let seconds = started.elapsed().as_secs_f64();
    let reads = reads.load(Ordering::Relaxed);
    assert_eq!(hits, 0);
    // The gateway may read 50 unknown tokens per second, and reads the KV bucket once more per second for a check of
    // its own.
    #[expect(clippy::cast_precision_loss, reason = "the count is in the thousands")]
    let rate = reads as f64 / seconds;
    figure("token_guesses", 10_000.0);
    figure("token_guess_hits", 0.0);
    #[expect(clippy::cast_precision_loss, reason = "the count is in the thousands")]
    figure("token_guess_bucket_reads", reads as f64);
    figure("token_guess_bucket_reads_per_s", rate);
    assert!(reads > 0, "no read of the session bucket was counted");
    assert!(
        rate <= 52.0 + 60.0 / seconds,
        "the session bucket was read {reads} times in {seconds} s"
    );
    assert!(accepted(gateway, &live).await);
}

/// A login above the limit of sessions ends the user's oldest session on every gateway. Sessions of other users stay
/// valid.
#[tokio::test]
async fn login_above_session_limit_ends_the_oldest_session() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 2)
        .replicas(Program::Auth, 2)
        .with_permissions()
        .set(Program::Auth, "VMWATCH_SESSIONS_PER_USER", "3")
        .set(Program::Auth, "VMWATCH_LOGIN_PERMITS", "16")
        .set(Program::Gateway, "VMWATCH_LOGIN_BURST", "200")
        .start()
        .await;
    let gateways = [0, 1].map(|index| stack.gateway(index));
    stack.command(Program::Auth, &["user", "add", "eve"], "her own password\n");
    let login = async |turn: usize| gateways[turn % 2].login("eve", "her own password").await;
    let other = gateways[0].login(ADMIN.0, ADMIN.1).await;
    let mut sessions = Vec::new();
    for turn in 0..3 {
        sessions.push(login(turn).await);
    }
    // After a logout the user can log in once more without losing another session.
    let out = reqwest::Client::new()
        .delete(gateways[0].url("/api/v1/sessions/current"))
        .bearer_auth(&sessions[1])
        .send()
        .await
        .unwrap();
    assert_eq!(out.status(), 204);
    sessions.remove(1);
    sessions.push(login(0).await);
    for session in &sessions {
        assert!(accepted(gateways[0], session).await && accepted(gateways[1], session).await);
    }
    for turn in 0..3 {
        sessions.push(login(turn).await);
        let ended = Instant::now();
        let oldest = sessions.remove(0);
        for gateway in gateways {
            eventually(
                "the gateway refuses the oldest session",
                Duration::from_secs(1),
                async || {
                    if accepted(gateway, &oldest).await {
                        Err("the session is still accepted".to_owned())
                    } else {
                        Ok(())
                    }
                },
            )
            .await;
        }
        figure(
            "session_over_limit_ends_ms",
            ended.elapsed().as_secs_f64() * 1000.0,
        );
        for session in &sessions {
            assert!(
                accepted(gateways[0], session).await && accepted(gateways[1], session).await,
                "turn {turn}"
            );
        }
    }
    assert!(
        accepted(gateways[1], &other).await,
        "another user's session is still valid"
    );
    // After many concurrent logins of one user, exactly the maximum number of its sessions remains. Several rounds of logins
    // whose passwords are hashed concurrently make it likely that some are overtaken between their two writes.
    for _ in 0..4 {
        let at_once = futures::future::join_all((0..12).map(login)).await;
        eventually("three sessions of the user are left", PATIENCE, async || {
            let mut left = 0;
            for session in &at_once {
                left += u32::from(accepted(gateways[0], session).await);
            }
            if left == 3 {
                Ok(())
            } else {
                Err(format!("{left} of twelve sessions are left"))
            }
        })
        .await;
    }
    for session in &sessions {
        assert!(!accepted(gateways[0], session).await);
    }
    let log = stack.nats.server.log();
    assert!(!log.contains("Violation"), "{log}");
}

/// Measures the time from a change of password, and from the removal of a user, to the first refusal of the session on
/// each of two gateways.
#[tokio::test]
async fn password_change_or_user_removal_ends_sessions_within_a_second() {
    let stack = Stack::builder().replicas(Program::Gateway, 2).start().await;
    let admin = stack.gateway(0).login(ADMIN.0, ADMIN.1).await;
    stack.command(Program::Auth, &["user", "add", "eve"], "the first password\n");
    let http = reqwest::Client::new();
    for (what, method, path, body, password) in [
        (
            "password_change",
            reqwest::Method::PUT,
            "/api/v1/users/eve/password",
            json!({ "password": "the second password" }),
            "the first password",
        ),
        (
            "user_removal",
            reqwest::Method::DELETE,
            "/api/v1/users/eve",
            Value::Null,
            "the second password",
        ),
    ] {
        let mut sessions = Vec::new();
        for turn in 0..4 {
            sessions.push(stack.gateway(turn % 2).login("eve", password).await);
        }
        for session in &sessions {
            assert!(accepted(stack.gateway(0), session).await && accepted(stack.gateway(1), session).await);
        }
        let mut request = http
            .request(method, stack.gateway(0).url(path))
            .bearer_auth(&admin);
        if !body.is_null() {
            request = request.json(&body);
        }
        let begun = Instant::now();
        let done = async { request.send().await.unwrap() };
        let refusals = [0, 1].map(|index| {
            let (gateway, sessions) = (stack.gateway(index), &sessions);
            async move {
                for session in sessions {
                    while accepted(gateway, session).await {
                        assert!(begun.elapsed() < PATIENCE, "the session is still accepted");
                    }
                }
                begun.elapsed()
            }
        });
        let [first, second] = refusals;
        let (done, first, second) = tokio::join!(done, first, second);
        assert!(done.status().is_success(), "{done:?}");
        for (index, took) in [first, second].into_iter().enumerate() {
            figure(
                &format!("{what}_to_refusal_gateway_{index}_ms"),
                took.as_secs_f64() * 1000.0,
            );
            assert!(
                took <= Duration::from_secs(1),
                "{what} on gateway {index}: {took:?}"
            );
        }
    }
    assert!(accepted(stack.gateway(1), &admin).await);
}
