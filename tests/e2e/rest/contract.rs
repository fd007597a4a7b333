//! Tests rules that hold for every route of the OpenAPI document.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{PATIENCE, Program, eventually};
use vmwatch_api::{Role, Scope};

use super::client::{Api, Reply, stack};

/// Returns every method and path of the OpenAPI document, with values for the path parameters.
async fn routes(api: &Api) -> Vec<(Method, String, bool)> {
    let document = Reply::of(api.raw(Method::GET, "/api/openapi.json")).await.json();
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let path = path
            .replace("{instance_id}", "vm-1")
            .replace("{operation_id}", "00000000000000000000000000000000")
            .replace("{join_token_id}", "0000000000000000")
            .replace("{token_id}", "0000000000000000")
            .replace("{session_id}", "00000000000000000000000000000000")
            .replace("{id}", "00000000000000000000000000000000")
            .replace("{user_name}", "nobody");
        assert!(!path.contains('{'), "{path}");
        for (method, operation) in item.as_object().unwrap() {
            let method: Method = method.to_uppercase().parse().unwrap();
            routes.push((method, path.clone(), operation.get("requestBody").is_some()));
        }
    }
    assert!(routes.len() >= 20, "{routes:?}");
    routes
}

#[tokio::test]
async fn every_rest_route_requires_a_session_and_rejects_unknown_fields() {
    let stack = stack().replicas(Program::Alert, 1).start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let anonymous = Api::of(stack.gateway(0));
    for (method, path, takes_body) in routes(&admin).await {
        let what = format!("{method} {path}");
        if !["POST /api/v1/sessions", "POST /api/v1/agents"].contains(&&*what) {
            let reply = Reply::of(anonymous.raw(method.clone(), &path)).await;
            reply.problem(401, "unauthenticated");
        }
        let with_query = admin.raw(method.clone(), &format!("{path}?nonsense=1"));
        let refused = Reply::of(with_query).await;
        let detail = refused.problem(400, "invalid");
        assert!(detail.contains("nonsense"), "{what}: {detail}");
        if takes_body {
            for (content_type, body, status) in [
                (None, "{}", 415),
                (Some("text/plain"), "{}", 415),
                (Some("application/json"), "", 400),
                (Some("application/json"), "{", 400),
                (Some("application/json"), "[]", 400),
                (Some("application/json"), "\"x\"", 400),
                (Some("application/json; charset=utf-8"), r#"{"nonsense":1}"#, 400),
            ] {
                let mut request = admin.raw(method.clone(), &path).body(body);
                if let Some(content_type) = content_type {
                    request = request.header("content-type", content_type);
                }
                let reply = Reply::of(request).await;
                assert_eq!(reply.status, status, "{what} {content_type:?} {body}: {reply:?}");
                let code = if status == 415 {
                    "unsupported_media_type"
                } else {
                    "invalid"
                };
                reply.problem(status, code);
            }
            let large = format!("{{\"nonsense\":\"{}\"}}", "x".repeat(65 * 1024));
            let request = admin
                .raw(method.clone(), &path)
                .header("content-type", "application/json")
                .body(large);
            assert_eq!(Reply::of(request).await.status, 413, "{what}");
        }
    }
}

#[tokio::test]
async fn unknown_paths_and_methods_get_problem_documents() {
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    for path in [
        "/api",
        "/api/v1",
        "/api/v1/",
        "/api/v1/vm",
        "/api/v1/vms/",
        "/api/v1/vms/a/b",
        "/api/v2/vms",
        "/favicon.ico",
        "/api/v1/%ff",
    ] {
        Reply::of(admin.raw(Method::GET, path))
            .await
            .problem(404, "not_found");
    }
    for (method, path, allowed) in [
        (Method::POST, "/api/v1/vms", "GET,HEAD"),
        (Method::DELETE, "/api/v1/users", "GET,HEAD,POST"),
        (Method::PUT, "/api/v1/sessions", "POST,GET,HEAD"),
        (Method::OPTIONS, "/api/v1/me", "GET,HEAD"),
        (Method::TRACE, "/api/v1/me", "GET,HEAD"),
    ] {
        let reply = Reply::of(admin.raw(method, path)).await;
        reply.problem(405, "method_not_allowed");
        assert_eq!(reply.header("allow"), Some(allowed), "{path}");
    }
    let head = Reply::of(admin.raw(Method::HEAD, "/api/v1/me")).await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert!(head.header("x-request-id").is_some());
    assert_eq!(head.header("cache-control"), Some("no-store"));
    assert_eq!(head.header("x-content-type-options"), Some("nosniff"));
}

#[tokio::test]
async fn gateway_serves_openapi_document_and_its_page() {
    let stack = stack().start().await;
    let anonymous = Api::of(stack.gateway(0));
    let document = Reply::of(anonymous.raw(Method::GET, "/api/openapi.json")).await;
    assert_eq!(
        (document.status, document.header("content-type")),
        (200, Some("application/json"))
    );
    let golden: Value = serde_json::from_str(include_str!("../../../gateway/openapi.json")).unwrap();
    assert_eq!(document.json(), golden);
    assert_eq!(golden["openapi"], "3.1.0");

    let moved = Reply::of(anonymous.raw(Method::GET, "/api/docs")).await;
    assert_eq!(
        (moved.status, moved.header("location")),
        (303, Some("/api/docs/"))
    );
    let page = Reply::of(anonymous.raw(Method::GET, "/api/docs/")).await;
    assert_eq!(page.status, 200, "{page:?}");
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.contains("default-src 'none'") && policy.contains("script-src 'self'"),
        "{policy}"
    );
    assert!(
        !page.body.contains("http://") && !page.body.contains("https://"),
        "{}",
        page.body
    );
    let mut files = 0;
    for part in page.body.split(['"', '\'']) {
        let Some(file) = part.strip_prefix("./") else {
            continue;
        };
        let reply = Reply::of(anonymous.raw(Method::GET, &format!("/api/docs/{file}"))).await;
        assert_eq!(reply.status, 200, "{file}");
        files += 1;
    }
    assert!(files >= 4, "{}", page.body);
    let start = Reply::of(anonymous.raw(Method::GET, "/api/docs/swagger-initializer.js")).await;
    assert!(start.body.contains("/api/openapi.json"), "{start:?}");
}

/// Requests that are refused because of a limit or an unreachable service get a `Retry-After` header.
#[tokio::test]
async fn refused_requests_get_retry_after() {
    let stack = stack()
        .set(Program::Auth, "VMWATCH_LOCKOUT_FAILURES", "2")
        .start()
        .await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let wrong = json!({ "user_name": "mallory", "password": "a guess" });
    for _ in 0..2 {
        anonymous
            .post("/sessions", wrong.clone())
            .await
            .problem(401, "unauthenticated");
    }
    anonymous.post("/sessions", wrong).await.problem(429, "throttled");

    stack.replica(Program::Auth, 0).process.kill9();
    eventually("NATS detects the killed replica", PATIENCE, async || {
        let reply = admin.get("/users").await;
        (reply.status == 503)
            .then_some(())
            .ok_or_else(|| format!("{reply:?}"))
    })
    .await;
    admin.get("/users").await.problem(503, "unavailable");
    stack.nats.server.pause();
    eventually("the gateway detects the NATS outage", PATIENCE, async || {
        let reply = admin.get("/vms").await;
        if reply.status == 503 {
            Ok(())
        } else {
            Err(format!("{reply:?}"))
        }
    })
    .await;
    admin.get("/vms").await.problem(503, "unavailable");
    stack.nats.server.resume();
    eventually("the gateway is connected to NATS again", PATIENCE, async || {
        let reply = admin.get("/vms").await;
        if reply.status == 200 {
            Ok(())
        } else {
            Err(format!("{reply:?}"))
        }
    })
    .await;

    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.pause();
    let late = admin.get("/vms/vm-1/samples").await;
    late.problem(504, "timeout");
    metrics.process.resume();
    tokio::time::timeout(Duration::from_secs(10), admin.get("/vms/vm-1/samples"))
        .await
        .unwrap();
}

/// If a user has the maximum number of requests in progress, further requests of the user are refused at once.
#[tokio::test]
async fn requests_of_a_user_above_the_limit_are_refused_at_once() {
    let stack = stack()
        .set(Program::Gateway, "VMWATCH_MAX_CHEAP_READS", "8")
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "3s")
        .start()
        .await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.pause();
    // No request completes before all have arrived.
    let hanging = (0..6).map(|_| admin.get("/vms/vm-1/processes"));
    let replies = futures::future::join_all(hanging).await;
    let shed: Vec<_> = replies.iter().filter(|reply| reply.status == 429).collect();
    assert_eq!(shed.len(), 4, "{replies:?}");
    for reply in shed {
        reply.problem(429, "throttled");
    }
    let late = replies.iter().filter(|reply| reply.status == 504);
    assert_eq!(late.count(), 2, "{replies:?}");
    metrics.process.resume();
    assert_eq!(admin.get("/me").await.status, 200);
}
