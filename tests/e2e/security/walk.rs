//! Tests authorization: every documented method, every route of the REST API and every bus subject, for every role,
//! inside and outside of a scope. The tables of expected roles are written by hand, independently of the code. A
//! method, route or subject that is not in its table fails the test.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{MACHINES, PATIENCE, Program, Stack, codes, eventually, figure};
use vmwatch_api::{
    InstanceId, METHODS, MethodInfo, Principal, Role, Scope,
    time::unix_millis,
    wire::{Envelope, FaultKind},
};
use vmwatch_bus::Context;

use crate::{
    bus::ask_all,
    rest::client::{Api, Reply, report, rfc3339, stack},
};

/// The minimum role that a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Least {
    Anonymous,
    Viewer,
    Operator,
    Admin,
}
use Least::{Admin, Anonymous, Operator, Viewer};

const CALLERS: [(Least, Option<Role>); 4] = [
    (Anonymous, None),
    (Viewer, Some(Role::Viewer)),
    (Operator, Some(Role::Operator)),
    (Admin, Some(Role::Admin)),
];

/// A placeholder for the VM's id in the tables.
const ID: &str = "$ID";
const OPERATION: &str = "00000000000000000000000000000000";
/// The public key of an agent that does not exist.
const AGENT_KEY: &str = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4";
/// The id of a VM that does not exist.
const UNKNOWN: &str = "0b5c4c56-6d0f-4a0e-8a4f-000000000000";

/// Returns for each bus method its subject (without the prefix), its parameters and its minimum role. The requests
/// change nothing, except that two create join tokens and API tokens, because they name users, VMs and sessions that do
/// not exist.
fn subjects() -> Vec<(&'static str, Value, Least)> {
    let range = json!({ "from_ms": 0, "to_ms": 60_000 });
    let at = json!({ "instance_id": ID });
    let limit = json!({ "limit": 10 });
    let rows = json!({ "instance_id": ID, "kind": "vm", "range": range });
    let user = json!({ "name": "nobody" });
    let events = json!({ "instance_id": ID, "range": range, "limit": 10 });
    let search = json!({ "name": "x", "range": range });
    let history = json!({ "instance_id": ID, "range": range, "points": 10 });
    vec![
        (
            "auth.login",
            json!({ "user_name": "nobody", "password": "a guess" }),
            Anonymous,
        ),
        (
            "auth.logout",
            json!({ "session_id": "00000000-0000-0000-0000-000000000000" }),
            Viewer,
        ),
        ("auth.sessions.list", json!({}), Viewer),
        ("auth.sessions.end", json!({ "id": OPERATION }), Viewer),
        // Only gateways may publish to this subject (deploy/nats). Their messages have no principal.
        ("auth.sessions.used", json!({ "sessions": [] }), Anonymous),
        ("auth.users.get", user.clone(), Admin),
        ("auth.users.list", limit.clone(), Admin),
        (
            "auth.users.add",
            json!({ "name": "admin", "password": "long enough", "role": "viewer", "scope": "all" }),
            Admin,
        ),
        (
            "auth.users.update",
            json!({ "name": "nobody", "role": "viewer" }),
            Admin,
        ),
        ("auth.users.remove", user, Admin),
        // A viewer may change its own password; this request is for another user's password.
        (
            "auth.users.set_password",
            json!({ "name": "nobody", "password": "long enough" }),
            Admin,
        ),
        (
            "auth.tokens.create",
            json!({ "name": "x", "valid_seconds": 60, "role": "viewer", "scope": "all", "access": "full" }),
            Viewer,
        ),
        ("auth.tokens.list", limit.clone(), Viewer),
        ("auth.tokens.revoke", json!({ "id": "0000000000000000" }), Viewer),
        // Like `auth.sessions.used`.
        ("auth.tokens.used", json!({ "tokens": [] }), Anonymous),
        ("auth.audit.list", limit.clone(), Admin),
        ("metrics.process.latest", at.clone(), Viewer),
        ("metrics.vm.latest", at.clone(), Viewer),
        (
            "metrics.process.by_name",
            json!({ "instance_id": ID, "proc_name": "x" }),
            Viewer,
        ),
        ("metrics.vm.list", limit.clone(), Viewer),
        ("metrics.vm.get", at.clone(), Viewer),
        ("metrics.vm.current", json!({}), Viewer),
        ("metrics.vm.history", history.clone(), Viewer),
        ("metrics.vm.hypervisor_history", history, Viewer),
        ("metrics.process.at", at.clone(), Viewer),
        (
            "metrics.process.history",
            json!({ "instance_id": ID, "process": { "name": "x" }, "range": range, "points": 10 }),
            Viewer,
        ),
        ("metrics.process.events", events, Viewer),
        ("metrics.filesystem.at", at.clone(), Viewer),
        ("metrics.rows.export", rows, Viewer),
        ("metrics.process.search", search, Viewer),
        ("metrics.status", json!({}), Admin),
        ("lifecycle.start", at.clone(), Operator),
        ("lifecycle.state", at.clone(), Viewer),
        ("lifecycle.stop", at.clone(), Operator),
        ("lifecycle.force_stop", at.clone(), Operator),
        (
            "lifecycle.reboot",
            json!({ "instance_id": ID, "hard": false }),
            Operator,
        ),
        ("lifecycle.vm.list", limit.clone(), Viewer),
        ("lifecycle.vm.get", at.clone(), Viewer),
        (
            "lifecycle.operations.get",
            json!({ "operation_id": OPERATION }),
            Viewer,
        ),
        ("lifecycle.operations.list", limit, Viewer),
        ("lifecycle.labels.get", at, Viewer),
        (
            "lifecycle.labels.set",
            json!({ "instance_id": ID, "labels": {}, "revision": 0 }),
            Operator,
        ),
    ]
}

/// Like [`subjects`], for the methods that remove a VM.
fn removal_subjects() -> Vec<(&'static str, Value, Least)> {
    let of_vm = json!({ "instance_id": ID, "name": ID });
    vec![
        ("lifecycle.removal.check", of_vm.clone(), Admin),
        ("metrics.history.remove", json!({ "instance_id": ID }), Admin),
        ("lifecycle.removal.finish", of_vm, Admin),
    ]
}

/// Like [`subjects`], for the methods that show what changed in a VM.
fn change_subjects() -> Vec<(&'static str, Value, Least)> {
    let range = json!({ "from_ms": 0, "to_ms": 60_000 });
    vec![
        (
            "metrics.process.changes",
            json!({ "instance_id": ID, "moments": range }),
            Viewer,
        ),
        (
            "metrics.vm.starts",
            json!({ "instance_id": ID, "range": range }),
            Viewer,
        ),
    ]
}

/// Like [`subjects`], for the methods for join tokens and agents.
fn enrollment_subjects() -> Vec<(&'static str, Value, Least)> {
    vec![
        (
            "auth.join_tokens.create",
            json!({ "valid_seconds": 60, "uses": 1, "vms": "any", "replace": false }),
            Admin,
        ),
        ("auth.join_tokens.list", json!({}), Admin),
        (
            "auth.join_tokens.revoke",
            json!({ "id": "0000000000000000" }),
            Admin,
        ),
        (
            "auth.agents.enroll",
            json!({ "token": "a guess", "instance_id": "vm-1", "public_key": AGENT_KEY }),
            Anonymous,
        ),
        ("auth.agents.list", json!({ "limit": 10 }), Admin),
        ("auth.agents.revoke", json!({ "instance_id": ID }), Admin),
    ]
}

/// The body of a rule of alerts.
fn rule() -> Value {
    json!({
        "name": "x", "enabled": false, "condition": { "kind": "agent_silent" }, "for_seconds": 60, "severity": "info",
    })
}

/// The body of a channel of alerts.
fn channel() -> Value {
    let target = json!({ "kind": "webhook", "url": "https://10.0.0.9/" });
    json!({ "name": "x", "enabled": false, "target": target })
}

/// Like [`subjects`], for the methods for alerts. Some of the requests create rules, silences and channels.
fn alert_subjects() -> Vec<(&'static str, Value, Least)> {
    let id = json!({ "id": OPERATION });
    let revision = json!({ "id": OPERATION, "revision": 1 });
    let now = unix_millis();
    let range = json!({ "from_ms": now, "to_ms": now + 60_000 });
    let top = json!({ "from_ms": 0, "to_ms": 60_000 });
    vec![
        (
            "metrics.process.top",
            json!({ "instance_id": ID, "range": top, "limit": 5 }),
            Viewer,
        ),
        ("alert.alerts.list", json!({ "instance_id": ID }), Viewer),
        ("alert.alerts.get", id.clone(), Viewer),
        ("alert.alerts.acknowledge", id.clone(), Operator),
        ("alert.rules.list", json!({}), Viewer),
        ("alert.rules.get", id.clone(), Viewer),
        ("alert.rules.create", rule(), Operator),
        (
            "alert.rules.update",
            json!({ "id": OPERATION, "revision": 1, "spec": rule() }),
            Operator,
        ),
        ("alert.rules.remove", revision.clone(), Operator),
        ("alert.rules.preview", rule(), Viewer),
        ("alert.silences.list", json!({}), Viewer),
        (
            "alert.silences.create",
            json!({ "matchers": { "env": "test" }, "range": range }),
            Operator,
        ),
        ("alert.silences.end", id.clone(), Operator),
        ("alert.channels.list", json!({}), Admin),
        ("alert.channels.names", json!({}), Viewer),
        ("alert.channels.create", json!({ "spec": channel() }), Admin),
        (
            "alert.channels.update",
            json!({ "id": OPERATION, "revision": 1, "spec": channel() }),
            Admin,
        ),
        ("alert.channels.remove", revision, Admin),
        ("alert.channels.test", id, Admin),
        ("alert.messages.list", json!({ "limit": 10 }), Admin),
    ]
}

/// Whether a method or route of alerts concerns all VMs, so that a user with a limited scope may not use it.
fn needs_all_vms(name: &str) -> bool {
    let of_all = [
        "alert.rules.create",
        "alert.rules.update",
        "alert.rules.remove",
        "alert.silences.create",
        "alert.silences.end",
        "alert.channels.",
        "alert.messages.",
        "POST /alert-rules",
        "PUT /alert-rules",
        "DELETE /alert-rules",
        "POST /alert-silences",
        "DELETE /alert-silences",
        "POST /alert-channels",
        "PUT /alert-channels",
        "DELETE /alert-channels",
        "GET /alert-channels",
        "GET /alert-messages",
    ];
    let for_all = [
        "alert.channels.names",
        "GET /alert-channels/names",
        "POST /alert-rules/preview",
    ];
    of_all.iter().any(|prefix| name.starts_with(prefix)) && !for_all.contains(&name)
}

/// Returns for each route its method, its path as in the OpenAPI document, a body, and the minimum role.
type Route = (&'static str, &'static str, Value, Least);

fn routes() -> Vec<Route> {
    let none = Value::Null;
    let start = json!({ "action": "start" });
    vec![
        (
            "POST",
            "/sessions",
            json!({ "user_name": "nobody", "password": "a guess" }),
            Anonymous,
        ),
        ("GET", "/sessions", none.clone(), Viewer),
        ("DELETE", "/sessions/current", none.clone(), Viewer),
        ("DELETE", "/sessions/{session_id}", none.clone(), Viewer),
        ("GET", "/me", none.clone(), Viewer),
        ("GET", "/metrics", none.clone(), Viewer),
        ("GET", "/vms", none.clone(), Viewer),
        ("GET", "/vms/{instance_id}", none.clone(), Viewer),
        (
            "DELETE",
            "/vms/{instance_id}?name={instance_id}",
            none.clone(),
            Admin,
        ),
        ("GET", "/vms/{instance_id}/labels", none.clone(), Viewer),
        (
            "PUT",
            "/vms/{instance_id}/labels",
            json!({ "labels": {}, "revision": 0 }),
            Operator,
        ),
        ("GET", "/vms/{instance_id}/samples", none.clone(), Viewer),
        (
            "GET",
            "/vms/{instance_id}/rows?kind=process",
            none.clone(),
            Viewer,
        ),
        ("GET", "/vms/{instance_id}/processes", none.clone(), Viewer),
        (
            "GET",
            "/vms/{instance_id}/processes/history?name=x",
            none.clone(),
            Viewer,
        ),
        ("GET", "/vms/{instance_id}/processes/events", none.clone(), Viewer),
        ("GET", "/vms/{instance_id}/processes/top", none.clone(), Viewer),
        ("GET", "/vms/{instance_id}/changes", none.clone(), Viewer),
        ("GET", "/vms/{instance_id}/marks", none.clone(), Viewer),
        ("GET", "/vms/{instance_id}/filesystems", none.clone(), Viewer),
        ("GET", "/processes?name=x", none.clone(), Viewer),
        ("POST", "/vms/{instance_id}/actions", start.clone(), Operator),
        (
            "POST",
            "/actions",
            json!({ "action": "start", "instance_ids": [ID] }),
            Operator,
        ),
        ("GET", "/operations", none.clone(), Viewer),
        ("GET", "/operations/{operation_id}", none.clone(), Viewer),
        ("GET", "/events", none.clone(), Viewer),
        ("GET", "/status", none.clone(), Admin),
        ("GET", "/users", none.clone(), Admin),
        (
            "POST",
            "/users",
            json!({ "name": "admin", "password": "long enough", "role": "viewer" }),
            Admin,
        ),
        ("GET", "/users/{user_name}", none.clone(), Admin),
        ("PATCH", "/users/{user_name}", json!({ "role": "viewer" }), Admin),
        ("DELETE", "/users/{user_name}", none.clone(), Admin),
        (
            "PUT",
            "/users/{user_name}/password",
            json!({ "password": "long enough" }),
            Admin,
        ),
        ("GET", "/tokens", none.clone(), Viewer),
        ("POST", "/tokens", json!({ "name": "x" }), Viewer),
        ("DELETE", "/tokens/{token_id}", none.clone(), Viewer),
        ("POST", "/join-tokens", json!({}), Admin),
        ("GET", "/join-tokens", none.clone(), Admin),
        ("DELETE", "/join-tokens/{join_token_id}", none.clone(), Admin),
        (
            "POST",
            "/agents",
            json!({
                "token": "a guess",
                "instance_id": "vm-1",
                "public_key": "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4",
            }),
            Anonymous,
        ),
        ("GET", "/agents", none.clone(), Admin),
        ("DELETE", "/agents/{instance_id}", none.clone(), Admin),
        ("GET", "/audit", none, Admin),
    ]
}

/// Like [`routes`], for the routes for alerts.
fn alert_routes() -> Vec<Route> {
    let none = Value::Null;
    let change = json!({ "revision": 1, "spec": rule() });
    let channel_change = json!({ "revision": 1, "spec": channel() });
    let silence = json!({ "matchers": { "env": "test" }, "to": rfc3339(unix_millis() + 3_600_000) });
    vec![
        ("GET", "/alerts", none.clone(), Viewer),
        ("GET", "/alerts/{id}", none.clone(), Viewer),
        ("PUT", "/alerts/{id}/acknowledgement", none.clone(), Operator),
        ("GET", "/alert-rules", none.clone(), Viewer),
        ("POST", "/alert-rules", rule(), Operator),
        ("GET", "/alert-rules/{id}", none.clone(), Viewer),
        ("PUT", "/alert-rules/{id}", change, Operator),
        ("DELETE", "/alert-rules/{id}?revision=1", none.clone(), Operator),
        ("POST", "/alert-rules/preview", rule(), Viewer),
        ("GET", "/alert-silences", none.clone(), Viewer),
        ("POST", "/alert-silences", silence, Operator),
        ("DELETE", "/alert-silences/{id}", none.clone(), Operator),
        ("GET", "/alert-channels", none.clone(), Admin),
        ("POST", "/alert-channels", json!({ "spec": channel() }), Admin),
        ("GET", "/alert-channels/names", none.clone(), Viewer),
        ("PUT", "/alert-channels/{id}", channel_change, Admin),
        ("DELETE", "/alert-channels/{id}?revision=1", none.clone(), Admin),
        ("POST", "/alert-channels/{id}/test", none.clone(), Admin),
        ("GET", "/alert-messages", none, Admin),
    ]
}

/// The code of each documented method, and its minimum role.
const DOCUMENTED: [(u32, Least); 5] = [
    (codes::LOGIN, Anonymous),
    (codes::PROCESSES, Viewer),
    (codes::VM, Viewer),
    (codes::PROCESSES_BY_NAME, Viewer),
    (codes::START, Operator),
];

fn only(instance: &str) -> Scope {
    Scope::Only(vec![instance.parse::<InstanceId>().unwrap()])
}

/// Replaces the placeholder with the VM's id.
fn with(params: &Value, instance: &str) -> Value {
    serde_json::from_str(&params.to_string().replace(ID, instance)).unwrap()
}

/// Sends these parameters to a service unchanged, and returns its answer.
async fn ask(
    stack: &Stack,
    subject: &str,
    principal: Option<Principal>,
    params: &Value,
) -> Result<Value, FaultKind> {
    let method = METHODS.iter().find(|method| method.subject == subject).unwrap();
    let mut context = Context::new(PATIENCE).with_fresh_key();
    context.principal = principal;
    let reply = stack
        .bus
        .forward(method, &context, params.to_string().into())
        .await
        .unwrap();
    let envelope: Envelope<Value> = serde_json::from_slice(&reply).unwrap();
    envelope.into_result().map_err(|fault| fault.kind)
}

/// Returns the subjects that the services name in their answers to `$SRV.INFO`.
async fn served(stack: &Stack) -> BTreeSet<String> {
    let infos = ask_all(&stack.bus, "$SRV.INFO", 4).await;
    let endpoints = infos
        .iter()
        .flat_map(|info| info["endpoints"].as_array().unwrap());
    endpoints
        .map(|endpoint| endpoint["subject"].as_str().unwrap().to_owned())
        .collect()
}

fn principal(role: Role, scope: Scope) -> Principal {
    let user = "test".to_owned();
    Principal { user, role, scope }
}

#[tokio::test]
async fn every_bus_subject_enforces_roles_and_scopes() {
    // The test's own bus user has all permissions.
    let stack = stack().replicas(Program::Alert, 1).start().await;
    let rows = [
        subjects(),
        removal_subjects(),
        change_subjects(),
        enrollment_subjects(),
        alert_subjects(),
    ]
    .concat();
    let (walked, known) = (
        rows.iter().map(|row| row.0).collect::<BTreeSet<_>>(),
        METHODS
            .iter()
            .map(|method| method.subject)
            .collect::<BTreeSet<_>>(),
    );
    assert_eq!(
        walked, known,
        "every bus method must be in the table of this test"
    );
    assert_eq!(rows.len(), METHODS.len());
    let listed: BTreeSet<_> = METHODS.iter().map(MethodInfo::full_subject).collect();
    assert_eq!(served(&stack).await, listed, "METHODS lists each served method");
    let mut checks = 0;
    for (subject, params, least) in &rows {
        for (caller, role) in CALLERS {
            for scope in [Scope::All, only(MACHINES[0].0)] {
                let principal = role.map(|role| principal(role, scope.clone()));
                let answer = ask(&stack, subject, principal, &with(params, UNKNOWN)).await;
                let forbidden = answer == Err(FaultKind::Forbidden);
                let is_limited = scope != Scope::All && needs_all_vms(subject);
                assert_eq!(
                    forbidden,
                    caller < *least || is_limited,
                    "{subject} as {caller:?} in {scope:?}: {answer:?}"
                );
                assert_ne!(
                    answer,
                    Err(FaultKind::Invalid),
                    "{subject}: the parameters in the table are invalid"
                );
                checks += 1;
            }
        }
    }
    let (mine, other) = (MACHINES[0].0, MACHINES[1].0);
    let everything = Api::with(&stack, Role::Admin, Scope::All).await;
    report(&stack, &everything, &[(mine, 1.0), (other, 2.0)]).await;
    ask(
        &stack,
        "lifecycle.start",
        Some(principal(Role::Admin, Scope::All)),
        &json!({ "instance_id": other }),
    )
    .await
    .unwrap();
    for (subject, params, _) in &rows {
        let limited = || Some(principal(Role::Admin, only(mine)));
        let names_one = params.to_string().contains(ID);
        if names_one {
            let hidden = ask(&stack, subject, limited(), &with(params, other)).await;
            let unknown = ask(&stack, subject, limited(), &with(params, UNKNOWN)).await;
            assert_eq!(
                hidden, unknown,
                "{subject}: a VM outside the scope must be answered like one that does not exist"
            );
        } else if matches!(
            *subject,
            "metrics.vm.list" | "metrics.vm.current" | "lifecycle.vm.list" | "lifecycle.operations.list"
        ) {
            let all = ask(&stack, subject, Some(principal(Role::Viewer, Scope::All)), params)
                .await
                .unwrap();
            let some = ask(&stack, subject, limited(), params).await.unwrap();
            assert!(all.to_string().contains(other), "{subject}: {all}");
            assert!(!some.to_string().contains(other), "{subject}: {some}");
        } else {
            continue;
        }
        checks += 1;
    }
    figure("access_checks_on_the_bus", f64::from(checks));
}

/// Sends the request of a route.
async fn send(api: &Api, row: &Route, instance: &str) -> reqwest::Response {
    let (method, path, body, _) = row;
    let path = path
        .replace("{instance_id}", instance)
        .replace("{operation_id}", OPERATION)
        .replace("{session_id}", OPERATION)
        .replace("{join_token_id}", "0000000000000000")
        .replace("{token_id}", "0000000000000000")
        .replace("{id}", OPERATION)
        .replace("{user_name}", "nobody");
    let mut request = api.request(method.parse::<Method>().unwrap(), &path);
    if !body.is_null() {
        request = request.json(&with(body, instance));
    }
    // The stream of events has no end, so only the head of its answer is read.
    request.send().await.unwrap()
}

#[tokio::test]
async fn every_rest_route_enforces_roles_and_scopes() {
    let stack = stack()
        .replicas(Program::Alert, 1)
        .set(Program::Auth, "VMWATCH_LOCKOUT_FAILURES", "1000")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let golden: Value = serde_json::from_str(include_str!("../../../gateway/openapi.json")).unwrap();
    let mut described = BTreeSet::new();
    for (path, item) in golden["paths"].as_object().unwrap() {
        described.extend(
            item.as_object()
                .unwrap()
                .keys()
                .map(|method| format!("{} {path}", method.to_uppercase())),
        );
    }
    let rows = [routes(), alert_routes()].concat();
    let walked: BTreeSet<_> = rows
        .iter()
        .map(|(method, path, ..)| format!("{method} /api/v1{}", path.split('?').next().unwrap()))
        .collect();
    assert_eq!(walked, described, "every route must be in the table of this test");
    let mut checks = 0;
    for row in &rows {
        let (method, path, _, least) = row;
        for (caller, role) in CALLERS {
            for scope in [Scope::All, only(MACHINES[0].0)] {
                // Each request has its own session, because one of the routes ends its session.
                let api = match role {
                    Some(role) => Api::with(&stack, role, scope.clone()).await,
                    None => Api::of(gateway),
                };
                let response = send(&api, row, UNKNOWN).await;
                let status = response.status().as_u16();
                let what = format!("{method} {path} as {caller:?} in {scope:?}: {status}");
                let is_limited = scope != Scope::All && needs_all_vms(&format!("{method} {path}"));
                let is_login = *method == "POST" && ["/sessions", "/agents"].contains(path);
                if *method == "POST" && *path == "/actions" && caller == Viewer {
                    // `POST /actions` answers with one result per VM instead of one status.
                    let results = response.text().await.unwrap();
                    assert!(status == 403 || results.contains("forbidden"), "{what} {results}");
                } else if is_login || caller == Anonymous {
                    assert_eq!(status, 401, "{what}");
                } else if caller < *least || is_limited {
                    assert_eq!(status, 403, "{what}");
                } else {
                    assert!(![400, 401, 403].contains(&status) && status < 500, "{what}");
                }
                checks += 1;
            }
        }
    }
    checks += scopes_over_rest(&stack, &rows).await;
    figure("access_checks_over_rest", f64::from(checks));
}

/// Asserts that VMs outside the scope are answered like VMs that do not exist, and are in no list. Returns the number
/// of checks.
async fn scopes_over_rest(stack: &Stack, rows: &[Route]) -> u32 {
    let mut checks = 0;
    let (mine, other) = (MACHINES[0].0, MACHINES[1].0);
    let everything = Api::with(stack, Role::Admin, Scope::All).await;
    report(stack, &everything, &[(mine, 1.0), (other, 2.0)]).await;
    let started = everything
        .post(&format!("/vms/{other}/actions"), json!({ "action": "start" }))
        .await;
    assert_eq!(started.status, 202, "{started:?}");
    let limited = Api::with(stack, Role::Admin, only(mine)).await;
    for row in rows {
        let (method, path, body, _) = row;
        if path.contains("{instance_id}") || body.to_string().contains(ID) {
            let mut seen = Vec::new();
            for instance in [other, UNKNOWN] {
                let response = send(&limited, row, instance).await;
                let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
                // The export of rows is not JSON; of a VM without rows it is empty.
                let mut answer: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
                // Removes the values that differ between any two requests.
                if let Some(object) = answer.as_object_mut() {
                    object.retain(|name, _| !["request_id", "from", "to"].contains(&name.as_str()));
                }
                seen.push((status, answer.to_string().replace(instance, ID)));
            }
            assert_eq!(
                seen[0], seen[1],
                "{method} {path}: a VM outside the scope must be answered like one that does not exist"
            );
        } else if matches!(*path, "/vms" | "/metrics" | "/operations") {
            eventually("the list contains the VM", PATIENCE, async || {
                let reply = everything.get(path).await;
                if reply.body.contains(other) {
                    Ok(())
                } else {
                    Err(reply.body)
                }
            })
            .await;
            let Reply { body, .. } = limited.get(path).await;
            assert!(!body.contains(other), "{path}: {body}");
        } else {
            continue;
        }
        checks += 1;
    }
    checks
}

#[tokio::test]
async fn every_documented_method_enforces_roles() {
    let stack = Stack::builder()
        .set(Program::Auth, "VMWATCH_LOCKOUT_FAILURES", "1000")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let documented: BTreeSet<_> = gateway::legacy::TABLE.iter().map(|row| row.code).collect();
    assert_eq!(
        DOCUMENTED.map(|row| row.0).into_iter().collect::<BTreeSet<_>>(),
        documented
    );
    let mut checks = 0;
    for (code, least) in DOCUMENTED {
        for (caller, role) in CALLERS {
            for scope in [Scope::All, only(MACHINES[0].0)] {
                let session = match role {
                    Some(role) => stack.session(role, scope).await,
                    None => String::new(),
                };
                let data = json!({ "instance_id": UNKNOWN, "user_name": "nobody", "password": "a guess" });
                let answer = gateway
                    .post(&json!({ "method": code, "session_id": session, "data": data }))
                    .await;
                let expected = match (caller < least, caller, code) {
                    (true, Anonymous, _) => "'invalid or expired session'",
                    (true, ..) => "'this request requires the role operator'",
                    (_, _, codes::LOGIN) => "'wrong user name or password'",
                    (_, _, codes::START) => "'there is no VM with this instance_id'",
                    (_, _, codes::VM) => "'success query vm information'",
                    _ => "'success query proc information'",
                };
                assert_eq!(
                    (answer.http, answer.message().as_str()),
                    (200, expected),
                    "{code} as {caller:?}"
                );
                checks += 1;
            }
        }
    }
    figure("access_checks_of_documented_methods", f64::from(checks));
}
