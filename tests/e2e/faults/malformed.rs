//! Tests malformed request bodies: both APIs refuse them as documented, and no program fails.

use reqwest::{Method, header};
use serde_json::{Value, json};
use testkit::{MACHINES, Program, Stack, codes, failure, figure};
use vmwatch_api::{Role, Scope, lifecycle::MachineState};

use super::{
    answers,
    corpus::{NO_JSON, ODD_VALUES},
    session, size,
};
use crate::rest::client::{Api, Reply};

/// Asserts by the gateway's metrics that no answer was a server error (5xx), and that no VM was started. The harness
/// checks for panics when each program ends.
async fn no_failure_of_ours(stack: &Stack, sent: usize, what: &str) {
    let metrics = stack.replica(Program::Gateway, 0).metrics().await;
    let failures = metrics
        .lines()
        .filter(|line| line.starts_with("vmwatch_http_requests_total{") && line.contains("status=\"5"));
    let failures: Vec<_> = failures.collect();
    figure(&format!("faults_malformed_{what}_bodies"), sent as f64);
    figure(&format!("faults_malformed_{what}_5xx"), failures.len() as f64);
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(stack.machine_state(MACHINES[0].0).await, MachineState::ShutOff);
}

/// Returns pseudo-random bytes that are the same in each run.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    // This is Marsaglia's xorshift generator.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    });
    next.take(length).collect()
}

/// The documented API answers 400 if the body is not a JSON object and 413 if it is too large. Any other invalid value
/// in a field is refused in the method's envelope.
#[tokio::test]
async fn documented_api_refuses_malformed_bodies_as_documented() {
    let stack = Stack::builder()
        .without_login_limit()
        // The long deadline prevents timeouts on a busy machine.
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "30s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    let mut sent = 0;
    let unreadable = failure(3, &Value::Null, "", "'the body must be one JSON object'");
    let refused = async |body: Vec<u8>| {
        let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        let answer = gateway.post_text(body).await;
        assert_eq!((answer.http, &answer.body), (400, &unreadable), "{shown}");
    };
    let noise = (0..size(200, 20_000)).map(|seed| noise(seed, usize::try_from(seed % 997).unwrap()));
    for body in NO_JSON.iter().map(|body| body.to_vec()).chain(noise) {
        refused(body).await;
        sent += 1;
    }
    let too_large = failure(3, &Value::Null, "", "'the body must be at most 64 KiB'");
    for body in [
        "[".repeat(100_000),
        "{\"a\":".repeat(100_000),
        "x".repeat(3 << 20),
    ] {
        let answer = gateway.post_text(body).await;
        assert_eq!((answer.http, &answer.body), (413, &too_large));
        sent += 1;
    }

    let fields = [
        "method",
        "data",
        "session_id",
        "limit",
        "proc_name",
        "message_id",
        "format",
    ];
    let inside = ["instance_id", "proc_name", "user_name", "password"];
    let good = json!({ "method": codes::VM, "session_id": session,
        "data": { "instance_id": "vm-1", "user_name": "x", "password": "x" } });
    let positions = fields.map(|field| ("", field)).into_iter();
    let positions = positions.chain(inside.map(|field| ("/data", field)));
    for (position, method) in positions.flat_map(|position| {
        [codes::VM, codes::PROCESSES_BY_NAME, codes::START, codes::LOGIN].map(|method| (position, method))
    }) {
        let mut request = good.clone();
        request["method"] = json!(method);
        request.pointer_mut(position.0).unwrap()[position.1] = json!("@@");
        let request = request.to_string();
        let (before, after) = request.split_once("\"@@\"").unwrap();
        for value in NO_JSON.iter().chain(ODD_VALUES) {
            let body = [before.as_bytes(), value, after.as_bytes()].concat();
            let shown = String::from_utf8_lossy(&body).into_owned();
            let answer = gateway.post_text(body).await;
            let json = answer.json();
            assert!(matches!(answer.http, 200 | 400 | 429), "{shown}: {answer:?}");
            let status = json["status_code"].as_u64();
            assert!(
                status == Some(3) || (answer.http, status) == (200, Some(1)),
                "{shown}: {answer:?}"
            );
            assert!(
                answer.http != 400 || answer.body == unreadable,
                "{shown}: {answer:?}"
            );
            sent += 1;
        }
    }
    answers(gateway, &session).await;
    no_failure_of_ours(&stack, sent, "documented").await;
}

/// Resolves a schema reference of the OpenAPI document.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(reference) => &document.pointer(&reference[1..]).unwrap()["properties"],
        None => &schema["properties"],
    }
}

async fn refused(api: &Api, method: &Method, path: &str, body: Vec<u8>) -> Reply {
    let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
    let request = api.raw(method.clone(), path).body(body);
    let reply = Reply::of(request.header(header::CONTENT_TYPE, "application/json")).await;
    assert!(
        (400..500).contains(&reply.status),
        "{method} {path} {shown}: {reply:?}"
    );
    let problem: Value = serde_json::from_str(&reply.body).unwrap();
    assert_eq!(
        problem["status"], reply.status,
        "{method} {path} {shown}: {reply:?}"
    );
    reply
}

/// The REST API answers each odd value, in each body field of each operation, with a problem document and a 4xx status.
#[tokio::test]
async fn rest_api_answers_malformed_bodies_with_client_errors() {
    let stack = Stack::builder().without_login_limit().start().await;
    let session = session(&stack).await;
    answers(stack.gateway(0), &session).await;
    let api = Api::with(&stack, Role::Admin, Scope::All).await;
    let document = Reply::of(api.raw(Method::GET, "/api/openapi.json")).await;
    let document: Value = serde_json::from_str(&document.body).unwrap();
    let (mut sent, mut fields) = (0, 0);
    for (path, operations) in document["paths"].as_object().unwrap() {
        let path = path.replace(['{', '}'], "");
        for (verb, operation) in operations.as_object().unwrap() {
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            if schema.is_null() {
                continue;
            }
            let method = Method::from_bytes(verb.to_uppercase().as_bytes()).unwrap();
            for body in NO_JSON {
                let reply = refused(&api, &method, &path, body.to_vec()).await;
                assert!(
                    !reply.body.contains("passwd"),
                    "the answer must not repeat the input: {reply:?}"
                );
                sent += 1;
            }
            for body in ["[".repeat(100_000), "x".repeat(3 << 20), "[".repeat(60_000)] {
                refused(&api, &method, &path, body.into()).await;
                sent += 1;
            }
            for seed in 0..size(20, 2_000) {
                refused(&api, &method, &path, noise(seed, 300)).await;
                sent += 1;
            }
            for field in resolved(&document, schema).as_object().unwrap().keys() {
                fields += 1;
                // No field accepts an object with these keys or a list of lists.
                for value in [json!({ "$gt": "" }), json!([[[]]]), json!({ "": { "": 0 } })] {
                    let body = json!({ field: value }).to_string();
                    refused(&api, &method, &path, body.into()).await;
                    sent += 1;
                }
            }
        }
    }
    assert!(
        fields > 5,
        "the OpenAPI document has only {fields} fields in request bodies"
    );
    answers(stack.gateway(0), &session).await;
    no_failure_of_ours(&stack, sent, "rest").await;
}
