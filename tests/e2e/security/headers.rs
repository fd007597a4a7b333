//! Tests that every answer of every HTTP route has the security headers, whatever its status.

use reqwest::{Method, header::HeaderMap};
use serde_json::{Value, json};
use testkit::{ADMIN, MACHINES, Program, codes};
use vmwatch_api::{Role, Scope};

use crate::rest::client::{Api, Reply, stack};

/// Headers that every answer must have, with their values.
const ALWAYS: [(&str, &str); 4] = [
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
];
/// The `Cache-Control` of files whose names contain a hash of their content. All other answers have `no-store`.
const KEPT: &str = "public, max-age=31536000, immutable";

fn check(what: &str, headers: &HeaderMap, kept: &str) {
    let value = |name: &str| {
        let values: Vec<_> = headers.get_all(name).iter().collect();
        assert_eq!(values.len(), 1, "{what}: {name} in {headers:?}");
        values[0].to_str().unwrap().to_owned()
    };
    for (name, expected) in ALWAYS {
        assert_eq!(value(name), expected, "{what}: {name}");
    }
    assert!(value("permissions-policy").contains("camera=()"), "{what}");
    assert!(
        value("content-security-policy").contains("default-src 'none'"),
        "{what}"
    );
    assert_eq!(value("cache-control"), kept, "{what}");
    let encrypted = headers.get("strict-transport-security");
    assert_eq!(encrypted, None, "{what}: this header is only sent over TLS");
}

/// Sends a request, asserts the security headers of its answer, and returns its status.
async fn status(api: &Api, method: Method, path: &str, body: Option<String>) -> u16 {
    let mut request = api.raw(method.clone(), path);
    if let Some(body) = body {
        request = request.header("content-type", "application/json").body(body);
    }
    // The body is not read, because the body of the event stream never ends.
    let response = request.send().await.unwrap();
    check(
        &format!("{method} {path}: {}", response.status()),
        response.headers(),
        "no-store",
    );
    response.status().as_u16()
}

/// Returns the method and path of every documented route, with an existing VM.
fn routes() -> Vec<(Method, String)> {
    let golden: Value = serde_json::from_str(include_str!("../../../gateway/openapi.json")).unwrap();
    let mut routes = Vec::new();
    for (path, item) in golden["paths"].as_object().unwrap() {
        let path = path
            .replace("{instance_id}", MACHINES[0].0)
            .replace("{operation_id}", "00000000000000000000000000000000")
            .replace("{join_token_id}", "0000000000000000")
            .replace("{id}", "00000000000000000000000000000000")
            .replace("{user_name}", "nobody");
        for method in item.as_object().unwrap().keys() {
            routes.push((method.to_uppercase().parse().unwrap(), path.clone()));
        }
    }
    assert!(routes.len() > 20, "{routes:?}");
    routes
}

#[tokio::test]
async fn every_http_response_has_security_headers() {
    let stack = stack()
        .set(Program::Gateway, "VMWATCH_TRUSTED_PROXIES", "127.0.0.1")
        .start()
        .await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let viewer = Api::with(&stack, Role::Viewer, Scope::All).await;
    let mut seen = Vec::new();
    for api in [&anonymous, &viewer, &admin] {
        for (method, path) in routes() {
            // This route is last because it ends the session.
            if !path.ends_with("/sessions/current") {
                seen.push(status(api, method, &path, None).await);
            }
        }
    }
    seen.extend(odd_requests(&admin).await);
    seen.extend(documented(&anonymous).await);
    pages(&anonymous).await;
    behind_a_proxy(&anonymous).await;

    // Without NATS every call of a service fails.
    stack.nats.server.kill9();
    let login = json!({ "method": codes::LOGIN, "data": { "user_name": "a", "password": "b" } });
    seen.push(status(&admin, Method::GET, "/api/v1/users", None).await);
    seen.push(status(&anonymous, Method::POST, "/wsgi_app.py", Some(login.to_string())).await);
    for expected in [200, 400, 401, 403, 404, 405, 413, 415, 503] {
        assert!(
            seen.contains(&expected),
            "no answer had the status {expected}: {seen:?}"
        );
    }
}

/// Sends requests that no route accepts.
async fn odd_requests(api: &Api) -> Vec<u16> {
    let large = " ".repeat(64 * 1024 + 1);
    let mut seen = Vec::new();
    for (method, path, body) in [
        (Method::GET, "/nothing", None),
        (Method::GET, "/api/v1/nothing", None),
        (Method::GET, "/assets/nothing.js", None),
        (Method::GET, "/install.sh", None),
        (Method::GET, "/packages/vmwatch-agent.deb", None),
        (Method::PATCH, "/api/v1/vms", None),
        (Method::TRACE, "/", None),
        (Method::OPTIONS, "/api/v1/vms", None),
        (Method::HEAD, "/api/v1/me", None),
        (Method::GET, "/api/v1/vms?limit=none", None),
        (Method::POST, "/api/v1/users", Some("{".to_owned())),
        (Method::POST, "/api/v1/users", Some(large.clone())),
        (Method::GET, "/wsgi_app.py", None),
        (Method::POST, "/wsgi_app.py", Some("[]".to_owned())),
        (Method::POST, "/wsgi_app.py", Some(large)),
    ] {
        seen.push(status(api, method, path, body).await);
    }
    let form = api.request(Method::POST, "/users").body("name=a");
    let reply = Reply::of(form).await;
    check("a form", &reply.headers, "no-store");
    seen.push(reply.status);
    seen
}

/// Sends requests of the documented API, including a login.
async fn documented(api: &Api) -> Vec<u16> {
    let data = json!({ "user_name": ADMIN.0, "password": ADMIN.1, "instance_id": MACHINES[0].0 });
    let mut seen = Vec::new();
    for method in [codes::LOGIN, codes::VM, codes::PROCESSES, codes::START, 1] {
        let request = json!({ "method": method, "data": data });
        seen.push(status(api, Method::POST, "/wsgi_app.py", Some(request.to_string())).await);
    }
    seen
}

/// Requests the page and its files, and the OpenAPI document and its page.
async fn pages(api: &Api) {
    let get = async |path: &str, kept: &str| {
        let reply = Reply::of(api.raw(Method::GET, path).header("accept", "text/html")).await;
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        check(path, &reply.headers, kept);
        reply
    };
    let page = get("/", "no-store").await;
    let files = page.body.split('"').filter(|text| text.starts_with("/assets/"));
    for file in files {
        get(file, KEPT).await;
    }
    for path in [
        "/vms/vm-1",
        "/api/openapi.json",
        "/api/docs/",
        "/api/docs/index.html",
    ] {
        get(path, "no-store").await;
    }
}

/// The gateway learns from a trusted proxy whether its client used TLS.
async fn behind_a_proxy(api: &Api) {
    for (said, expected) in [
        ("https", Some("max-age=31536000")),
        ("http", None),
        ("https, http", None),
    ] {
        for (method, path) in [
            (Method::GET, "/"),
            (Method::POST, "/wsgi_app.py"),
            (Method::GET, "/api/v1/me"),
        ] {
            let reply = Reply::of(api.raw(method, path).header("x-forwarded-proto", said)).await;
            assert_eq!(
                reply.header("strict-transport-security"),
                expected,
                "{path} over {said}"
            );
        }
    }
}
