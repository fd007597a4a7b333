//! Tests which requests a token may send: every route of the OpenAPI document, with every restriction. The expectation
//! is written by hand, independently of the code, so a new route fails this test until it is listed here.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, figure};

use super::{created, stack};
use crate::rest::client::Api;

/// The requests that no API token may send, because they change tokens, users, passwords, join tokens, channels or
/// sessions.
const CLOSED: [&str; 15] = [
    "POST /alert-channels",
    "PUT /alert-channels/{id}",
    "DELETE /alert-channels/{id}",
    "POST /alert-channels/{id}/test",
    "POST /join-tokens",
    "DELETE /join-tokens/{join_token_id}",
    "GET /sessions",
    "DELETE /sessions/current",
    "DELETE /sessions/{session_id}",
    "POST /tokens",
    "DELETE /tokens/{token_id}",
    "POST /users",
    "DELETE /users/{user_name}",
    "PATCH /users/{user_name}",
    "PUT /users/{user_name}/password",
];

/// The requests that change something, which a token may send unless it is restricted.
const CHANGES: [&str; 12] = [
    "POST /actions",
    "DELETE /agents/{instance_id}",
    "POST /alert-rules",
    "POST /alert-rules/preview",
    "PUT /alert-rules/{id}",
    "DELETE /alert-rules/{id}",
    "POST /alert-silences",
    "DELETE /alert-silences/{id}",
    "PUT /alerts/{id}/acknowledgement",
    "DELETE /vms/{instance_id}",
    "POST /vms/{instance_id}/actions",
    "PUT /vms/{instance_id}/labels",
];

/// The requests that read, which every token may send except those for metrics only.
const READS: [&str; 32] = [
    "GET /agents",
    "GET /alert-channels",
    "GET /alert-channels/names",
    "GET /alert-messages",
    "GET /alert-rules",
    "GET /alert-rules/{id}",
    "GET /alert-silences",
    "GET /alerts",
    "GET /alerts/{id}",
    "GET /audit",
    "GET /events",
    "GET /join-tokens",
    "GET /me",
    "GET /operations",
    "GET /operations/{operation_id}",
    "GET /processes",
    "GET /status",
    "GET /tokens",
    "GET /users",
    "GET /users/{user_name}",
    "GET /vms",
    "GET /vms/{instance_id}",
    "GET /vms/{instance_id}/changes",
    "GET /vms/{instance_id}/filesystems",
    "GET /vms/{instance_id}/labels",
    "GET /vms/{instance_id}/marks",
    "GET /vms/{instance_id}/processes",
    "GET /vms/{instance_id}/processes/events",
    "GET /vms/{instance_id}/processes/history",
    "GET /vms/{instance_id}/processes/top",
    "GET /vms/{instance_id}/rows",
    "GET /vms/{instance_id}/samples",
];

/// The only request of a token for metrics only.
const METRICS: &str = "GET /metrics";

/// The requests that need no credential; an API token has no effect on them.
const OPEN: [&str; 2] = ["POST /agents", "POST /sessions"];

/// Returns the method and path of every route of the OpenAPI document, as in the lists above.
fn documented() -> BTreeSet<String> {
    let golden: Value = serde_json::from_str(include_str!("../../../gateway/openapi.json")).unwrap();
    let paths = golden["paths"].as_object().unwrap().iter();
    let routes = paths.flat_map(|(path, item)| {
        let path = path.strip_prefix("/api/v1").unwrap();
        let methods = item.as_object().unwrap().keys();
        methods.map(move |method| format!("{} {path}", method.to_uppercase()))
    });
    routes.collect()
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
    let listed = [&CLOSED[..], &CHANGES, &READS, &OPEN, &[METRICS]].concat();
    let listed: BTreeSet<_> = listed.into_iter().map(str::to_owned).collect();
    assert_eq!(
        documented(),
        listed,
        "each route must be in one of the lists above, which state what API tokens may do"
    );
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
    let mut checks = 0_u32;
    let expectations = CLOSED
        .iter()
        .map(|what| (*what, false, false))
        .chain(CHANGES.iter().map(|what| (*what, true, false)))
        .chain(READS.iter().map(|what| (*what, true, true)))
        .chain([(METRICS, true, true)]);
    for (what, with_full, with_read_only) in expectations {
        let (method, path) = what.split_once(' ').unwrap();
        let method: Method = method.parse().unwrap();
        for (api, allowed) in [
            (full, with_full),
            (read_only, with_read_only),
            (metrics_only, what == METRICS),
        ] {
            let (status, body) = send(api, &method, path).await;
            assert_eq!(status == 403, !allowed, "{what}: {status} {body}");
            assert!(allowed || body.contains("API token"), "{what}: {body}");
            assert_ne!(status, 401, "{what}: {body}");
            checks += 1;
        }
    }
    // HEAD requests are those of GET.
    assert_eq!(send(read_only, &Method::HEAD, "/me").await.0, 200);
    assert_eq!(send(metrics_only, &Method::HEAD, "/me").await.0, 403);
    figure("access_checks_of_api_tokens", f64::from(checks));
}
