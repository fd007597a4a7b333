//! Tests API tokens: what they permit, how soon a revocation takes effect, service accounts, and tokens that are
//! refused.

mod audited;
mod outages;
mod refused;
mod requests;

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, MACHINES, PATIENCE, Program, Stack, StackBuilder, eventually};
use vmwatch_api::api_tokens::API_TOKEN_BUCKET;

use crate::rest::{
    client::{Api, Reply},
    events::Follower,
};

/// A stack with the permissions of deploy/nats; its auth-svc deletes tokens of removed users at a short interval.
fn stack() -> StackBuilder {
    Stack::builder()
        .with_permissions()
        .replicas(Program::Metrics, 0)
        .set(Program::Auth, "VMWATCH_RECONCILE_INTERVAL", "500ms")
}

/// Creates a token and returns the answer.
async fn created(owner: &Api, token: Value) -> Value {
    let reply = owner.post("/tokens", token).await;
    assert_eq!(reply.status, 201, "{reply:?}");
    let answer = reply.json();
    let id = answer["api_token"]["id"].as_str().unwrap();
    assert_eq!(reply.header("location"), Some(&*format!("/api/v1/tokens/{id}")));
    assert!(
        answer["token"]
            .as_str()
            .unwrap()
            .starts_with(&format!("vmt_{id}_")),
        "{answer}"
    );
    answer
}

/// A client that sends a new token.
async fn with_token(owner: &Api, token: Value) -> Api {
    owner.holding(created(owner, token).await["token"].as_str().unwrap())
}

/// Adds a user and returns a client with a session of the user.
async fn add(admin: &Api, name: &str, role: &str) -> Api {
    let user = json!({ "name": name, "password": "long enough", "role": role });
    let added = admin.post("/users", user).await;
    assert_eq!(added.status, 201, "{added:?}");
    admin.log_in(name, "long enough").await
}

/// Waits until a request for the own user has this role and scope. Fails after a second, because vmwatch promises that
/// changes take effect within this time.
async fn becomes(api: &Api, role: &str, scope: &Value) {
    eventually(
        "the token has the new rights",
        Duration::from_secs(1),
        async || {
            let me = api.read("/me").await;
            let is_so = me["role"] == role && me["scope"] == *scope;
            is_so.then_some(()).ok_or_else(|| me.to_string())
        },
    )
    .await;
}

async fn listed(api: &Api, query: &str) -> Vec<Value> {
    let list = api.read(&format!("/tokens{query}")).await;
    list["tokens"].as_array().unwrap().clone()
}

#[tokio::test]
async fn token_permits_the_lesser_of_its_own_and_its_owners_rights() {
    let stack = stack()
        .replicas(Program::Gateway, 2)
        .replicas(Program::Auth, 2)
        .start()
        .await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let eve = add(&admin, "Eve", "operator").await;
    let vm = MACHINES[0].0;
    let refused = eve.post("/tokens", json!({ "name": "x", "role": "admin" })).await;
    let detail = refused.problem(403, "forbidden");
    assert!(detail.contains("Eve has the role operator"), "{detail}");

    let viewer = with_token(&eve, json!({ "name": "reads" })).await;
    let operator = with_token(
        &eve,
        json!({ "name": "acts", "role": "operator", "scope": { "only": [vm, "vm-2"] } }),
    )
    .await;
    // Both gateways accept a new token at once.
    for index in [0, 1] {
        let me = viewer.at(stack.gateway(index)).read("/me").await;
        assert_eq!(
            (&me["user_name"], &me["role"], &me["scope"]),
            (&json!("Eve"), &json!("viewer"), &json!("all"))
        );
    }
    let start = json!({ "action": "start" });
    let act = format!("/vms/{vm}/actions");
    let forbidden = viewer.post(&act, start.clone()).await.problem(403, "forbidden");
    assert!(forbidden.contains("requires the role operator"), "{forbidden}");
    assert_eq!(operator.post(&act, start.clone()).await.status, 202);
    let other = format!("/vms/{}/actions", MACHINES[1].0);
    operator.post(&other, start).await.problem(404, "not_found");

    // A change of the owner changes the token, although it ends the owner's sessions.
    let mut events = Follower::of(&operator, "", None).await;
    events.expect("ready").await;
    let change = json!({ "role": "viewer", "scope": { "only": [vm] } });
    let changed = admin.send(Method::PATCH, "/users/eve", change).await;
    assert_eq!(changed.status, 200, "{changed:?}");
    eve.is_over().await;
    for gateway in [0, 1].map(|index| stack.gateway(index)) {
        becomes(&operator.at(gateway), "viewer", &json!({ "only": [vm] })).await;
        becomes(&viewer.at(gateway), "viewer", &json!({ "only": [vm] })).await;
    }
    // The stream of events ends, so that the client connects again with the new scope.
    loop {
        match events.next().await {
            None => break,
            Some(event) => assert_ne!(event.name, "end", "the token is still valid"),
        }
    }

    assert_eq!(admin.delete("/users/eve").await.status, 204);
    for gateway in [0, 1].map(|index| stack.gateway(index)) {
        operator.at(gateway).is_over().await;
    }
    // A new user of the same name does not get the tokens of the old one.
    let eve = add(&admin, "eve", "admin").await;
    viewer.get("/me").await.problem(401, "unauthenticated");
    eventually(
        "the tokens of the removed user are deleted",
        PATIENCE,
        async || {
            let left = listed(&admin, "?all=true").await;
            left.is_empty().then_some(()).ok_or(format!("{left:?}"))
        },
    )
    .await;
    assert_eq!(eve.get("/me").await.status, 200);
    let log = stack.nats.server.log();
    assert!(!log.contains("Violation"), "{log}");
}

#[tokio::test]
async fn revoked_token_is_refused_within_a_second_and_audited() {
    let stack = stack().replicas(Program::Gateway, 2).start().await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let (eve, bob) = (
        add(&admin, "eve", "viewer").await,
        add(&admin, "bob", "viewer").await,
    );
    let first = created(&eve, json!({ "name": "first", "valid_seconds": 3600 })).await;
    let second = created(&eve, json!({ "name": "second", "access": "read_only" })).await;
    let of_bob = created(&bob, json!({ "name": "of bob" })).await;
    let path = |answer: &Value| format!("/tokens/{}", answer["api_token"]["id"].as_str().unwrap());
    let holding = |answer: &Value| eve.holding(answer["token"].as_str().unwrap());

    // Users see and revoke their own tokens, administrators those of all users.
    let names = |tokens: Vec<Value>| {
        let mut names: Vec<_> = tokens
            .iter()
            .map(|token| token["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(listed(&eve, "").await), ["first", "second"]);
    assert_eq!(names(listed(&admin, "").await), [""; 0]);
    assert_eq!(
        names(listed(&admin, "?all=true").await),
        ["first", "of bob", "second"]
    );
    eve.get("/tokens?all=true").await.problem(403, "forbidden");
    eve.delete(&path(&of_bob)).await.problem(404, "not_found");
    eve.delete("/tokens/0000000000000000")
        .await
        .problem(404, "not_found");
    eve.delete("/tokens/x").await.problem(400, "invalid");
    let page = admin.read("/tokens?all=true&limit=2").await;
    let next = page["next"].as_str().unwrap();
    let rest = admin.read(&format!("/tokens?all=true&after={next}")).await;
    assert_eq!(
        (
            page["tokens"].as_array().unwrap().len(),
            rest["tokens"].as_array().unwrap().len()
        ),
        (2, 1)
    );
    assert_eq!(rest["next"], Value::Null);

    // The last use is recorded with its source.
    let at_second = holding(&first).at(stack.gateway(1));
    assert_eq!(at_second.get("/me").await.status, 200);
    eventually("the use is recorded", PATIENCE, async || {
        let tokens = listed(&eve, "").await;
        let token = tokens.iter().find(|token| token["name"] == "first").unwrap();
        let used = token["last_source"] == "127.0.0.1" && token["last_used_at"].is_string();
        used.then_some(()).ok_or_else(|| token.to_string())
    })
    .await;
    let unused = listed(&eve, "").await;
    let unused = unused.iter().find(|token| token["name"] == "second").unwrap();
    assert_eq!(
        (&unused["last_used_at"], &unused["last_source"]),
        (&Value::Null, &Value::Null)
    );

    let mut events = Follower::of(&at_second, "", None).await;
    events.expect("ready").await;
    assert_eq!(eve.delete(&path(&first)).await.status, 204);
    holding(&first).is_over().await;
    at_second.is_over().await;
    assert_eq!(events.expect("end").await.data, json!({}));
    eve.delete(&path(&first)).await.problem(404, "not_found");
    assert_eq!(admin.delete(&path(&second)).await.status, 204);
    holding(&second).is_over().await;
    assert_eq!(
        bob.holding(of_bob["token"].as_str().unwrap())
            .get("/me")
            .await
            .status,
        200
    );

    for (action, count) in [("auth.tokens.create", 6), ("auth.tokens.revoke", 7)] {
        let audited = admin.read(&format!("/audit?action={action}")).await;
        let records = audited["records"].as_array().unwrap();
        assert_eq!(records.len(), count, "{audited}");
        let id = &first["api_token"]["id"];
        assert!(
            records
                .iter()
                .any(|record| record["target"] == *id && record["user"] == "eve")
        );
    }
    let audited = admin.read("/audit?action=auth.tokens.create").await.to_string();
    assert!(audited.contains("second of eve, role viewer"), "{audited}");
    let secret = first["token"].as_str().unwrap().rsplit('_').next().unwrap();
    assert!(!audited.contains(secret));
    is_stored_without_secret(&stack, &of_bob).await;
    let log = stack.nats.server.log();
    assert!(!log.contains("Violation"), "{log}");
}

/// Checks that the KV bucket holds only a hash of the secret of bob's token.
async fn is_stored_without_secret(stack: &Stack, created: &Value) {
    let jetstream = stack.bus.jetstream_for_tests();
    let bucket = jetstream.get_key_value(API_TOKEN_BUCKET).await.unwrap();
    let id = created["api_token"]["id"].as_str().unwrap();
    let stored = bucket.get(id).await.unwrap().unwrap();
    let stored = String::from_utf8(stored.to_vec()).unwrap();
    let secret = created["token"].as_str().unwrap().rsplit('_').next().unwrap();
    assert!(stored.contains("\"bob\"") && !stored.contains(secret), "{stored}");
}

#[tokio::test]
async fn service_account_acts_only_through_tokens_of_administrators() {
    let stack = stack().start().await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    let eve = add(&admin, "eve", "operator").await;
    let account = |name: &str, role: &str| json!({ "name": name, "role": role, "service_account": true });
    let added = admin.post("/users", account("grafana", "viewer")).await;
    assert_eq!(
        (added.status, &added.json()["service_account"]),
        (201, &json!(true))
    );
    for (wrong, status, code) in [
        (account("root", "admin"), 409, "conflict"),
        (json!({ "name": "ann", "role": "viewer" }), 422, "contradictory"),
        (
            json!({ "name": "ann", "role": "viewer", "service_account": true, "password": "long enough" }),
            422,
            "contradictory",
        ),
    ] {
        admin.post("/users", wrong).await.problem(status, code);
    }
    // It has no password, and a login fails like one with an unknown name.
    let login = async |name: &str| {
        let body = json!({ "user_name": name, "password": "long enough" });
        anonymous
            .post("/sessions", body)
            .await
            .problem(401, "unauthenticated")
    };
    assert_eq!(login("grafana").await, login("nobody").await);
    let password = json!({ "password": "long enough" });
    let set = admin.send(Method::PUT, "/users/grafana/password", password).await;
    set.problem(409, "conflict");
    let promoted = admin
        .send(Method::PATCH, "/users/grafana", json!({ "role": "admin" }))
        .await;
    promoted.problem(409, "conflict");

    let token = |account: &str, role: &str| json!({ "name": "x", "role": role, "service_account": account });
    eve.post("/tokens", token("grafana", "viewer"))
        .await
        .problem(403, "forbidden");
    admin
        .post("/tokens", token("grafana", "operator"))
        .await
        .problem(403, "forbidden");
    for no_account in ["eve", "nobody"] {
        admin
            .post("/tokens", token(no_account, "viewer"))
            .await
            .problem(409, "conflict");
    }
    let created = created(&admin, token("Grafana", "viewer")).await;
    assert_eq!(
        (
            &created["api_token"]["owner"],
            &created["api_token"]["created_by"]
        ),
        (&json!("grafana"), &json!("admin"))
    );
    let grafana = admin.holding(created["token"].as_str().unwrap());
    assert_eq!(grafana.read("/me").await["user_name"], "grafana");
    assert_eq!(admin.delete("/users/grafana").await.status, 204);
    grafana.is_over().await;

    let printed = stack.command(Program::Auth, &["user", "add", "prometheus", "--service"], "");
    assert!(printed.contains("added prometheus as viewer"), "{printed}");
    let users = stack.command(Program::Auth, &["user", "list", "--json"], "");
    let users: Value = serde_json::from_str(&users).unwrap();
    let user = users
        .as_array()
        .unwrap()
        .iter()
        .find(|user| user["name"] == "prometheus")
        .unwrap();
    assert_eq!(user["service"], true);
    let prometheus = with_token(&admin, token("prometheus", "viewer")).await;
    assert_eq!(prometheus.get("/me").await.status, 200);
}

#[tokio::test]
async fn number_of_tokens_of_a_user_is_limited() {
    let stack = stack().start().await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let eve = add(&admin, "eve", "viewer").await;
    for _ in 0..100 {
        created(&eve, json!({ "name": "x" })).await;
    }
    // Further requests are refused, so they cannot evict older records from the audit either.
    for _ in 0..100 {
        let refused = eve.post("/tokens", json!({ "name": "x" })).await;
        let detail = refused.problem(409, "conflict");
        assert!(detail.contains("revoke"), "{detail}");
    }
    let refused = eve.post("/tokens", json!({ "name": "x" })).await;
    let detail = refused.problem(429, "throttled");
    assert!(detail.contains("ten minutes"), "{detail}");
    assert_eq!(refused.header("retry-after"), Some("600"));
    let id = listed(&eve, "").await[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(eve.delete(&format!("/tokens/{id}")).await.status, 204);
    created(&admin, json!({ "name": "x" })).await;
    for (field, bad) in [
        ("valid_seconds", json!(59)),
        ("valid_seconds", json!(31_536_001)),
        ("role", json!("root")),
        ("scope", json!("mine")),
        ("scope", json!({ "only": vec!["vm-1"; 101] })),
        ("access", json!("writes")),
        ("name", json!("")),
        ("name", json!("a\nb")),
    ] {
        let mut token = json!({ "name": "x" });
        token[field] = bad;
        let Reply { status, body, .. } = admin.post("/tokens", token.clone()).await;
        assert_eq!(status, 400, "{token}: {body}");
        assert!(body.contains(field), "{token}: {body}");
    }
}
