//! Tests that HTTP clients which misuse the gateway do not affect other clients and are disconnected at a time limit.

use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};
use testkit::{Answer, PATIENCE, Program, Stack, codes, eventually, failure, figure};
use tokio::io::AsyncWriteExt;
use vmwatch_api::{Role, Scope};

use super::wire::{connect, drip, post, to_end};

const LEGACY: &str = "/wsgi_app.py";
const SESSIONS: &str = "/api/v1/sessions";

fn vm_request(session: &str) -> Value {
    json!({ "method": codes::VM, "session_id": session, "data": { "instance_id": "vm-1" } })
}

/// The gateway closes silent, slow and idle connections at its time limit, and not earlier.
#[tokio::test]
async fn gateway_closes_slow_and_idle_connections_at_time_limit() {
    let limit = Duration::from_secs(1);
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_REQUEST_TIMEOUT", "1s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let closed = async |what: &str, head: &str, byte: &str| {
        let started = Instant::now();
        let said = drip(gateway, head, byte).await;
        let took = started.elapsed();
        assert!(took >= limit, "{what} was closed early: {said}");
        figure(&format!("closed_after_ms_{what}"), took.as_secs_f64() * 1000.0);
        said
    };
    let head = |path: &str| format!("POST {path} HTTP/1.1\r\nHost: x\r\n");
    let body = |path: &str| {
        format!(
            "{}Content-Type: application/json\r\nContent-Length: 60000\r\n\r\n{{",
            head(path)
        )
    };
    let (legacy_head, rest_body, legacy_body, answered) = (
        head(LEGACY),
        body(SESSIONS),
        body(LEGACY),
        post(LEGACY, "", "{}").replace("Connection: close\r\n", ""),
    );
    let (silent, headers, rest, legacy, idle) = tokio::join!(
        closed("silent", "", ""),
        closed("slow_headers", &legacy_head, "x"),
        closed("slow_body_rest", &rest_body, " "),
        closed("slow_body_legacy", &legacy_body, " "),
        closed("idle_after_an_answer", &answered, ""),
    );
    assert_eq!(silent, "");
    assert!(
        headers.is_empty() || headers.starts_with("HTTP/1.1 408 "),
        "{headers}"
    );
    assert!(
        rest.starts_with("HTTP/1.1 408 ") && rest.contains("application/problem+json"),
        "{rest}"
    );
    assert!(
        legacy.starts_with("HTTP/1.1 408 ") && legacy.contains("received too slowly"),
        "{legacy}"
    );
    assert!(
        idle.starts_with("HTTP/1.1 200 ") && idle.contains("method must be one of"),
        "{idle}"
    );
}

/// Requests whose body is not complete yet occupy no permit, so slow senders do not block others.
#[tokio::test]
async fn requests_with_slow_bodies_hold_no_permit() {
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_MAX_LOGINS", "2")
        .set(Program::Gateway, "VMWATCH_MAX_CHEAP_READS", "2")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = stack.session(Role::Viewer, Scope::All).await;
    let mut slow = Vec::new();
    for path in [LEGACY, SESSIONS].repeat(5) {
        let mut stream = connect(gateway).await;
        let half = post(path, "", "{                  ").replace("Content-Length: 19", "Content-Length: 99");
        stream.write_all(half.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    eventually("all slow connections are open", PATIENCE, async || {
        let metrics = gateway.replica.metrics().await;
        if gauge(&metrics, "vmwatch_http_connections") >= 10.0 {
            Ok(())
        } else {
            Err(metrics)
        }
    })
    .await;
    for _ in 0..20 {
        let answer = gateway.post(&vm_request(&session)).await;
        assert_eq!((answer.http, answer.status()), (200, 1), "{answer:?}");
    }
}

fn gauge(metrics: &str, name: &str) -> f64 {
    let values = metrics
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
    values.sum()
}

/// Connections above the limit wait in the kernel's queue. The gateway serves them when other connections end.
#[tokio::test]
async fn gateway_limits_open_http_connections() {
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_MAX_CONNECTIONS", "5")
        .set(Program::Gateway, "VMWATCH_REQUEST_TIMEOUT", "1s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let mut most = 0.0_f64;
    let mut waiting = Vec::new();
    for _ in 0..20 {
        waiting.push(connect(gateway).await);
    }
    let mut late = connect(gateway).await;
    late.write_all(post(LEGACY, "", "{}").as_bytes()).await.unwrap();
    let watching = async {
        loop {
            most = most.max(gauge(
                &gateway.replica.metrics().await,
                "vmwatch_http_connections",
            ));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let said = tokio::select! {
        said = to_end(&mut late) => said,
        () = watching => unreachable!("the observer never ends"),
    };
    assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
    // The metric also counts the connection to the health listener, which has a separate limit.
    assert!(
        (5.0..=6.0).contains(&most),
        "{most} connections were open at once"
    );
}

/// Requests with too many or too large headers, a too large body or too deep nesting are refused before they use
/// resources.
#[tokio::test]
async fn gateway_limits_request_headers_bodies_and_nesting() {
    let stack = Stack::builder().replicas(Program::Metrics, 0).start().await;
    let gateway = stack.gateway(0);
    let said = async |request: String| {
        let mut stream = connect(gateway).await;
        // The gateway may answer and close the connection before everything is sent.
        let _ = stream.write_all(request.as_bytes()).await;
        to_end(&mut stream).await
    };
    let headers = post(LEGACY, &format!("X-Large: {}\r\n", "x".repeat(200_000)), "{}");
    let many = post(LEGACY, &"X-Many: x\r\n".repeat(200), "{}");
    for large in [headers, many] {
        let said = said(large).await;
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 431 "), "{said}");
    }
    let refused = failure(3, &Value::Null, "", "'the body must be nested at most 32 deep'");
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        for depth in [32, 5_000] {
            let nested = format!("{}1{}", open.repeat(depth), close.repeat(depth));
            let body = format!("{{\"method\":611611,\"data\":{nested}}}");
            let answer = gateway.post_text(body.clone()).await;
            assert_eq!(
                (answer.http, answer.body),
                (400, refused.clone()),
                "{open} {depth}"
            );
            let said = said(post(SESSIONS, "", &body)).await;
            assert!(
                said.starts_with("HTTP/1.1 400 ") && said.contains("nested at most 32 deep"),
                "{said}"
            );
        }
    }
    assert_eq!(gateway.replica.process.ended(), None);
}

/// A user's requests are processed up to a limit. Further requests are refused at once, and the header `Retry-After`
/// states the time to wait.
#[tokio::test]
async fn excess_requests_of_a_user_get_429_with_retry_after() {
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_MAX_CHEAP_READS", "8")
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "3s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = stack.session(Role::Viewer, Scope::All).await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.pause();
    let request = vm_request(&session);
    let answers = join_all((0..8).map(|_| gateway.post(&request))).await;
    metrics.process.resume();
    let (shed, late): (Vec<&Answer>, Vec<_>) = answers.iter().partition(|answer| answer.http == 429);
    assert_eq!((shed.len(), late.len()), (6, 2), "{answers:?}");
    for answer in shed {
        let text = "'this user has reached the limit of concurrent cheap reads per user; wait until one has finished'";
        assert_eq!(answer.body, failure(3, &json!(codes::VM), &session, text));
        assert_eq!(answer.retry_after.as_deref(), Some("1"), "{answer:?}");
    }
    assert!(late.iter().all(|answer| answer.status() == 4), "{late:?}");
    assert_eq!(gateway.post(&request).await.status(), 1);
}

/// The gateway takes the client's address from `X-Forwarded-For` only if a trusted proxy sent the header, so that
/// clients behind the proxy are throttled separately.
#[tokio::test]
async fn client_address_is_taken_only_from_trusted_proxy() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 2)
        .set(
            Program::Gateway,
            "VMWATCH_TRUSTED_PROXIES",
            "127.0.0.0/8,10.0.0.0/8",
        )
        .set(Program::Auth, "VMWATCH_LOCKOUT_FAILURES", "2")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let body =
        json!({ "method": codes::LOGIN, "data": { "user_name": "eve", "password": "a guess" } }).to_string();
    let status = async |forwarded: &str| {
        let mut stream = connect(gateway).await;
        let header = format!("X-Forwarded-For: {forwarded}\r\n");
        stream
            .write_all(post(LEGACY, &header, &body).as_bytes())
            .await
            .unwrap();
        to_end(&mut stream)
            .await
            .split(' ')
            .nth(1)
            .map(str::to_owned)
            .unwrap_or_default()
    };
    for _ in 0..2 {
        assert_eq!(status("203.0.113.1").await, "200");
    }
    assert_eq!(
        status("203.0.113.1").await,
        "429",
        "this address has no login attempts left"
    );
    // A client can add its own entries to `X-Forwarded-For`. They come before those of the proxies and have no effect.
    assert_eq!(status("198.51.100.1, 203.0.113.1, 10.1.1.1").await, "429");
    assert_eq!(
        status("203.0.113.1, 198.51.100.1").await,
        "200",
        "another address has its own login attempts"
    );
}
