//! Tests which requests a token may send: every route of the OpenAPI document, with every restriction. The expectation
//! is written by hand, independently of the code.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, figure};

use super::{created, stack};
use crate::rest::client::Api;

/// The requests that no API token may send, because they change tokens, users, passwords, join tokens, channels or
/// sessions.
const CLOSED: [&str; 15] = [
    "GET /sessions",
    "DELETE /sessions/current",
    "DELETE /sessions/{session_id}",
    "POST /tokens",
    "DELETE /tokens/{token_id}",
    "POST /users",
    "PATCH /users/{user_name}",
    "DELETE /users/{user_name}",
    "PUT /users/{user_name}/password",
    "POST /join-tokens",
    "DELETE /join-tokens/{join_token_id}",
    "POST /alert-channels",
    "PUT /alert-channels/{id}",
    "DELETE /alert-channels/{id}",
    "POST /alert-channels/{id}/test",
];

/// The requests that need no credential; an API token has no effect on them.
const OPEN: [&str; 2] = ["POST /sessions", "POST /agents"];

/// Returns the method and path of every route of the OpenAPI document.
fn routes() -> Vec<(Method, String)> {
    let golden: Value = serde_json::from_str(include_str!("../../../gateway/openapi.json")).unwrap();
    let mut routes = Vec::new();
    for (path, item) in golden["paths"].as_object().unwrap() {
        let path = path.strip_prefix("/api/v1").unwrap();
        for method in item.as_object().unwrap().keys() {
            routes.push((method.to_uppercase().parse().unwrap(), path.to_owned()));
        }
    }
    assert!(routes.len() > 50, "{routes:?}");
    routes
}

/// Sends a request without a body. Returns the status and the body of the answer.
async fn send(api: &Api, method: &Method, path: &str) -> (u16, String) {
    let path = path
        .replace("{instance_id}", "vm-1")
        .replace("{join_token_id}", "0000000000000000")
        .replace("{token_id}", "0000000000000000")
        .replace("{operation_id}", &"0".repeat(32))
        .replace("{session_id}", &"0".repeat(32))
        .replace("{id}", &"0".repeat(32))
        .replace("{user_name}", "nobody");
    let response = api.request(method.clone(), &path).send().await.unwrap();
    let status = response.status().as_u16();
    // The stream of events has no end, so only refusals are read.
    let body = if status < 400 {
        String::new()
    } else {
        response.text().await.unwrap()
    };
    (status, body)
}

#[tokio::test]
async fn every_rest_route_enforces_the_restrictions_of_tokens() {
    let stack = stack().start().await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let mut tokens = Vec::new();
    for access in ["full", "read_only", "metrics_only"] {
        let token = created(
            &admin,
            json!({ "name": access, "role": "admin", "access": access }),
        )
        .await;
        tokens.push(admin.holding(token["token"].as_str().unwrap()));
    }
    let [full, read_only, metrics_only] = &tokens[..] else {
        unreachable!()
    };
    let mut met = BTreeSet::new();
    let mut checks = 0_u32;
    for (method, path) in routes() {
        let what = format!("{method} {path}");
        if OPEN.contains(&&*what) {
            continue;
        }
        let closed = CLOSED.contains(&&*what);
        if closed {
            met.insert(what.clone());
        }
        let (status, body) = send(full, &method, &path).await;
        assert_eq!(status == 403, closed, "{what} with full access: {status} {body}");
        assert_ne!(status, 401, "{what}: {body}");
        let reads = method == Method::GET;
        let (status, body) = send(read_only, &method, &path).await;
        assert_eq!(
            status == 403,
            closed || !reads,
            "{what} read-only: {status} {body}"
        );
        let (status, body) = send(metrics_only, &method, &path).await;
        let is_metrics = what == "GET /metrics";
        assert_eq!(status == 403, !is_metrics, "{what} metrics only: {status} {body}");
        if !is_metrics {
            assert!(
                body.contains("may only read the metrics of VMs"),
                "{what}: {body}"
            );
        }
        checks += 3;
    }
    let closed: BTreeSet<_> = CLOSED.iter().map(|&route| route.to_owned()).collect();
    assert_eq!(met, closed, "every closed route is in the document");
    // HEAD requests are those of GET.
    assert_eq!(send(read_only, &Method::HEAD, "/me").await.0, 200);
    assert_eq!(send(metrics_only, &Method::HEAD, "/me").await.0, 403);
    figure("access_checks_of_api_tokens", f64::from(checks));
}
