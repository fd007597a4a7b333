//! Tests the methods of alert-svc over REST: roles, scopes, conflicts, limits and the audit.

use mongodb::bson::{Document, doc, serialize_to_document};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::{MACHINES, PATIENCE, Program, Stack, StackBuilder, eventually};
use vmwatch_api::{InstanceId, Role, Scope, alerts::evaluation::WATCHED_BUCKET, time::unix_millis};

use crate::rest::{
    client::{Api, Reply, rfc3339},
    events::Follower,
};

/// The id of a record that does not exist.
const NOBODY: &str = "00000000000000000000000000000000";

pub(super) fn stack() -> StackBuilder {
    Stack::builder()
        .with_permissions()
        .replicas(Program::Alert, 1)
        .set(Program::Lifecycle, "VMWATCH_STATE_INTERVAL", "500ms")
}

pub(super) fn only(ids: &[&str]) -> Scope {
    let ids = ids.iter().map(|id| id.parse::<InstanceId>().unwrap());
    Scope::Only(ids.collect())
}

fn rule(name: &str) -> Value {
    let threshold = json!({ "direction": "above", "limit": 95, "clear": 90 });
    json!({
        "name": name, "enabled": true, "for_seconds": 60, "severity": "warning",
        "condition": { "kind": "measure", "measure": "cpu_util", "threshold": threshold },
    })
}

pub(super) fn webhook(name: &str) -> Value {
    let target = json!({ "kind": "webhook", "url": "https://10.0.0.9/secret-path" });
    json!({ "spec": { "name": name, "enabled": true, "target": target } })
}

pub(super) async fn put(api: &Api, path: &str, body: Value) -> Reply {
    api.send(Method::PUT, path, body).await
}

/// Creates a record and returns it.
pub(super) async fn created(api: &Api, path: &str, body: Value) -> Value {
    let reply = api.post(path, body).await;
    assert_eq!(reply.status, 201, "{path}: {reply:?}");
    let record = reply.json();
    let location = format!("/api/v1{path}/{}", record["id"].as_str().unwrap());
    assert_eq!(reply.header("location"), Some(location.as_str()));
    record
}

/// The names of the rules in a list.
async fn names(api: &Api) -> Vec<String> {
    let list = api.read("/alert-rules").await;
    let rules = list["rules"].as_array().unwrap().iter();
    rules
        .map(|rule| rule["spec"]["name"].as_str().unwrap().to_owned())
        .collect()
}

/// The audit records of an action that have this result.
async fn audited(admin: &Api, action: &str, result: &str) -> Vec<Value> {
    let audit = admin.read(&format!("/audit?action={action}")).await;
    let mut records = audit["records"].as_array().unwrap().clone();
    records.retain(|record| record["result"] == result);
    records
}

/// Waits until rules are evaluated. From then on, alert-svc leaves alerts as they are that tests store for unknown rules.
pub(super) async fn evaluates(stack: &Stack) {
    let stream = format!("KV_{WATCHED_BUCKET}");
    eventually("rules are evaluated", PATIENCE, async || {
        let info = stack.bus.stream_info(&stream, PATIENCE).await;
        let written = info.map(|info| info.state.messages);
        matches!(written, Ok(1..))
            .then_some(())
            .ok_or(format!("{written:?}"))
    })
    .await;
}

/// Stores an alert, as the engine does.
pub(super) async fn store_alert(
    stack: &Stack,
    id: char,
    vm: Option<&str>,
    state: &str,
    since_ms: u64,
) -> String {
    let id = id.to_string().repeat(32);
    let mut alert = json!({
        "id": id, "rule_id": NOBODY, "rule_name": "CPU above 95 %", "severity": "warning", "labels": { "a.b": "c" },
        "condition": rule("x")["condition"], "subject": "", "culprits": { "from_ms": 0, "to_ms": 1 }, "state": state, "since_ms": since_ms, "revision": 1,
    });
    if let Some(vm) = vm {
        alert["instance_id"] = vm.into();
    }
    if state == "resolved" {
        alert["resolved_ms"] = (since_ms + 1000).into();
    }
    let document = serialize_to_document(&json!({
        "_id": id, "alert": alert, "open": state != "resolved", "unnotified": false,
    }));
    let document = document.unwrap();
    let alerts = stack.database.handle().collection::<Document>("alerts");
    alerts.insert_one(document).await.unwrap();
    id
}

fn ids(list: &Value) -> Vec<&str> {
    let alerts = list["alerts"].as_array().unwrap().iter();
    alerts.map(|alert| alert["id"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn rules_are_changed_by_revision_and_audited() {
    let stack = stack().start().await;
    let operator = Api::with(&stack, Role::Operator, Scope::All).await;
    let viewer = Api::with(&stack, Role::Viewer, Scope::All).await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let made = created(&operator, "/alert-rules", rule("busy")).await;
    assert_eq!(
        (&made["revision"], &made["active"], &made["problem"]),
        (&json!(1), &json!(0), &Value::Null)
    );
    assert_eq!(made["changed_by"], Stack::user_of(Role::Operator, &Scope::All));
    let path = format!("/alert-rules/{}", made["id"].as_str().unwrap());
    assert_eq!(viewer.read(&path).await, made);

    viewer
        .post("/alert-rules", rule("x"))
        .await
        .problem(403, "forbidden");
    let mut calm = rule("calm");
    calm["for_seconds"] = 0.into();
    let change = json!({ "revision": 1, "spec": calm });
    put(&viewer, &path, change.clone())
        .await
        .problem(403, "forbidden");
    let changed = put(&operator, &path, change.clone()).await;
    assert_eq!(changed.status, 200, "{changed:?}");
    let changed = changed.json();
    assert_eq!(
        (&changed["revision"], &changed["spec"]["name"]),
        (&json!(2), &json!("calm"))
    );
    let detail = put(&operator, &path, change).await.problem(409, "conflict");
    assert!(detail.contains("read it again"), "{detail}");
    // The same rule again changes nothing.
    let same = json!({ "revision": 2, "spec": changed["spec"] });
    assert_eq!(put(&operator, &path, same).await.json(), changed);

    operator.delete(&path).await.problem(400, "invalid");
    operator
        .delete(&format!("{path}?revision=1"))
        .await
        .problem(409, "conflict");
    let removed = operator.delete(&format!("{path}?revision=2")).await;
    assert_eq!((removed.status, removed.body.as_str()), (204, ""));
    viewer.get(&path).await.problem(404, "not_found");
    operator
        .delete(&format!("{path}?revision=3"))
        .await
        .problem(404, "not_found");

    for (method, detail) in [
        ("create", "busy"),
        ("update", "calm: name (was busy), duration"),
        ("remove", "calm"),
    ] {
        let action = format!("alert.rules.{method}");
        let requested = audited(&admin, &action, "requested").await;
        assert_eq!(requested.len(), 1, "{action}: {requested:?}");
        assert_eq!(
            (&requested[0]["detail"], &requested[0]["target"]),
            (&json!(detail), &made["id"]),
            "{action}"
        );
        assert_eq!(audited(&admin, &action, "succeeded").await.len(), 1, "{action}");
    }
    assert_eq!(audited(&admin, "alert.rules", "refused").await.len(), 2);
}

#[tokio::test]
async fn removed_starter_rule_is_not_created_again() {
    let stack = stack().start().await;
    let operator = Api::with(&stack, Role::Operator, Scope::All).await;
    let before = names(&operator).await;
    assert_eq!(before.len(), 8, "{before:?}");
    let list = operator.read("/alert-rules").await;
    let silent = list["rules"].as_array().unwrap().iter();
    let silent = silent
        .clone()
        .find(|rule| rule["spec"]["name"] == "Agent is silent")
        .unwrap();
    assert_eq!(
        (&silent["spec"]["for_seconds"], &silent["changed_by"]),
        (&json!(300), &json!(""))
    );
    let path = format!("/alert-rules/{}", silent["id"].as_str().unwrap());
    assert_eq!(operator.delete(&format!("{path}?revision=1")).await.status, 204);
    let mut others = list["rules"].as_array().unwrap().iter();
    let kept = others.find(|rule| rule["id"] != silent["id"]).unwrap();
    let mut renamed = kept["spec"].clone();
    renamed["name"] = "A renamed rule".into();
    let kept = format!("/alert-rules/{}", kept["id"].as_str().unwrap());
    let change = json!({ "revision": 1, "spec": renamed });
    assert_eq!(put(&operator, &kept, change).await.status, 200);

    let alert = stack.replica(Program::Alert, 0);
    alert.process.kill9();
    alert.restart().await;
    let after = names(&operator).await;
    assert_eq!(after.len(), 7, "{after:?}");
    assert!(after.contains(&"A renamed rule".to_owned()), "{after:?}");
    operator.get(&path).await.problem(404, "not_found");
}

#[tokio::test]
async fn changes_need_the_scope_of_all_vms() {
    let stack = stack().start().await;
    let [(mine, _), (other, _), _] = MACHINES;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let limited = Api::with(&stack, Role::Admin, only(&[mine])).await;
    let channel = created(&admin, "/alert-channels", webhook("ops")).await;
    let mut spec = rule("of two VMs");
    spec["vms"] = json!({ "ids": [mine, other] });
    let both = created(&admin, "/alert-rules", spec).await;
    let mut spec = rule("of another VM");
    spec["vms"] = json!({ "ids": [other] });
    let hidden = created(&admin, "/alert-rules", spec).await;
    let soon = |matchers: Value| json!({ "matchers": matchers, "to": rfc3339(unix_millis() + 3_600_000) });
    created(&admin, "/alert-silences", soon(json!({ "instance_id": other }))).await;
    let general = created(&admin, "/alert-silences", soon(json!({ "env": "test" }))).await;

    let rule_path = format!("/alert-rules/{}", both["id"].as_str().unwrap());
    let channel_path = format!("/alert-channels/{}", channel["id"].as_str().unwrap());
    let silence_path = format!("/alert-silences/{}", general["id"].as_str().unwrap());
    for (method, path, body) in [
        (Method::POST, "/alert-rules", rule("x")),
        (
            Method::PUT,
            &rule_path,
            json!({ "revision": 1, "spec": rule("x") }),
        ),
        (Method::POST, "/alert-silences", soon(json!({ "a": "b" }))),
        (Method::POST, "/alert-channels", webhook("x")),
        (
            Method::PUT,
            &channel_path,
            json!({ "revision": 1, "spec": webhook("x")["spec"] }),
        ),
    ] {
        let detail = limited.send(method, path, body).await.problem(403, "forbidden");
        assert!(detail.contains("all VMs"), "{path}: {detail}");
    }
    for path in [
        format!("{rule_path}?revision=1"),
        format!("{channel_path}?revision=1"),
        silence_path,
    ] {
        limited.delete(&path).await.problem(403, "forbidden");
    }
    let test = format!("{channel_path}/test");
    Reply::of(limited.request(Method::POST, &test))
        .await
        .problem(403, "forbidden");
    limited.get("/alert-channels").await.problem(403, "forbidden");
    limited.get("/alert-messages").await.problem(403, "forbidden");

    // A user with a limited scope sees no ids of other VMs, and all names of channels.
    let seen = limited.read(&rule_path).await;
    assert_eq!(seen["spec"]["vms"]["ids"], json!([mine]));
    let hidden = format!("/alert-rules/{}", hidden["id"].as_str().unwrap());
    limited.get(&hidden).await.problem(404, "not_found");
    for path in ["/alert-rules", "/alert-silences", "/alert-channels/names"] {
        let reply = limited.get(path).await;
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        assert!(!reply.body.contains(other), "{path}: {reply:?}");
    }
    let silences = limited.read("/alert-silences").await;
    assert_eq!(silences["silences"].as_array().unwrap().len(), 1, "{silences}");
    let refused = audited(&admin, "alert", "refused").await;
    assert_eq!(refused.len(), 9, "{refused:?}");
}

#[tokio::test]
async fn invalid_rules_are_refused() {
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let changed = |field: &str, value: Value| {
        let mut rule = rule("x");
        rule[field] = value;
        rule
    };
    let threshold = json!({ "direction": "above", "limit": 95 });
    let operator = json!({ "$gt": "" });
    for (rule, status, text) in [
        (changed("name", " x".into()), 422, "without space"),
        (changed("name", "x\n".into()), 422, "control characters"),
        (changed("name", "é".repeat(65).into()), 422, "128 bytes"),
        (changed("name", operator.clone()), 400, "name"),
        (changed("for_seconds", 86_401.into()), 400, "86400"),
        (changed("severity", "fatal".into()), 400, "severity"),
        (changed("recipients", json!([NOBODY])), 422, "there is no channel"),
        (changed("recipients", json!([operator])), 400, "recipients"),
        (changed("recipients", json!(vec![NOBODY; 11])), 422, "at most 10"),
        (
            changed("vms", json!({ "ids": ["a b"] })),
            400,
            "1 to 64 characters",
        ),
        (changed("vms", json!({ "labels": ["=x"] })), 422, "key=value"),
        (changed("vms", json!({ "$where": "1" })), 400, "unknown field"),
        (
            changed("condition", json!({ "kind": "gpu" })),
            400,
            "unknown variant",
        ),
        (
            changed("condition", json!({ "kind": "agent_silent", "name": "x" })),
            400,
            "unknown field",
        ),
        (
            changed(
                "condition",
                json!({ "kind": "measure", "measure": "$cpu", "threshold": threshold }),
            ),
            422,
            "name of a measure",
        ),
        (
            changed(
                "condition",
                json!({ "kind": "process_count", "name": operator, "threshold": threshold }),
            ),
            400,
            "string",
        ),
        (
            changed(
                "condition",
                json!({ "kind": "filesystem", "threshold": { "direction": "above", "limit": 90, "clear": 91 } }),
            ),
            422,
            "on its other side",
        ),
    ] {
        let what = rule.to_string();
        let reply = admin.post("/alert-rules", rule).await;
        assert_eq!(reply.status, status, "{what}: {reply:?}");
        assert!(
            reply.json()["detail"].as_str().unwrap().contains(text),
            "{what}: {reply:?}"
        );
    }
}

#[tokio::test]
async fn invalid_silences_and_channels_are_refused() {
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let operator = json!({ "$gt": "" });
    let soon = rfc3339(unix_millis() + 3_600_000);
    for (silence, status, text) in [
        (json!({ "matchers": {}, "to": soon }), 422, "1 to 16"),
        (json!({ "matchers": { "": "x" }, "to": soon }), 422, "1 to 16"),
        (
            json!({ "matchers": { "a": operator }, "to": soon }),
            400,
            "matchers",
        ),
        (
            json!({ "matchers": { "a": "b" }, "to": "2017-01-01T00:00:00Z", "from": "2016-01-01T00:00:00Z" }),
            422,
            "future",
        ),
        (
            json!({ "matchers": { "a": "b" }, "to": soon, "from": soon }),
            422,
            "before",
        ),
        (
            json!({ "matchers": { "a": "b" }, "to": "2999-01-01T00:00:00Z" }),
            422,
            "366 days",
        ),
        (
            json!({ "matchers": { "a": "b" }, "to": soon, "comment": "é".repeat(513) }),
            422,
            "1024 bytes",
        ),
    ] {
        let what = silence.to_string();
        let reply = admin.post("/alert-silences", silence).await;
        assert_eq!(reply.status, status, "{what}: {reply:?}");
        assert!(
            reply.json()["detail"].as_str().unwrap().contains(text),
            "{what}: {reply:?}"
        );
    }
    let mail = |tls: &str, to: Value| json!({ "kind": "email", "server": "mail:25", "tls": tls, "from": "a@b", "to": to, "user": "x" });
    for (target, status, text) in [
        (
            json!({ "kind": "webhook", "url": "ftp://x" }),
            422,
            "http or https",
        ),
        (
            json!({ "kind": "webhook", "url": "https://user:pass@x/" }),
            422,
            "without user name",
        ),
        (json!({ "kind": "webhook", "url": operator }), 400, "string"),
        (mail("none", json!(["a@b"])), 422, "encrypted"),
        (mail("tls", json!([])), 422, "1 to 20"),
        (mail("tls", json!(["a@b\r\nBcc: c@d"])), 422, "e-mail address"),
    ] {
        let body = json!({ "spec": { "name": "x", "enabled": true, "target": target } });
        let reply = admin.post("/alert-channels", body).await;
        assert_eq!(reply.status, status, "{target}: {reply:?}");
        assert!(
            reply.json()["detail"].as_str().unwrap().contains(text),
            "{target}: {reply:?}"
        );
    }
    // The keys of labels may be any text, also operators of the database and a zero byte.
    let odd = json!({ "$where": "sleep(1)", "a.b": "$gt", "zero\u{0}": "" });
    let silence = json!({ "matchers": odd, "to": soon });
    let made = created(&admin, "/alert-silences", silence).await;
    assert_eq!(made["matchers"], odd);
    let listed = admin.read("/alert-silences").await;
    assert_eq!(listed["silences"], json!([made]));
    for path in [
        "/alerts/$ne",
        "/alert-rules/x",
        "/alerts?rule_id[$ne]=x",
        "/alerts?cursor=x",
    ] {
        admin.get(path).await.problem(400, "invalid");
    }
}

#[tokio::test]
async fn alerts_are_listed_and_acknowledged_within_the_scope() {
    let stack = stack().start().await;
    let [(mine, _), (other, _), _] = MACHINES;
    let all = Api::with(&stack, Role::Operator, Scope::All).await;
    let limited = Api::with(&stack, Role::Operator, only(&[mine])).await;
    let viewer = Api::with(&stack, Role::Viewer, Scope::All).await;
    evaluates(&stack).await;
    let mut follower = Follower::of(&limited, "?kind=alert", None).await;
    follower.expect("ready").await;
    let first = store_alert(&stack, 'a', Some(mine), "firing", 1000).await;
    let elsewhere = store_alert(&stack, 'b', Some(other), "firing", 2000).await;
    let global = store_alert(&stack, 'c', None, "firing", 3000).await;
    let pending = store_alert(&stack, 'd', Some(mine), "pending", 3000).await;
    let resolved = store_alert(&stack, 'e', Some(mine), "resolved", 500).await;

    let list = viewer.read("/alerts").await;
    assert_eq!(ids(&list), [&global, &pending, &elsewhere, &first]);
    assert_eq!(list["active"], json!({ "info": 0, "warning": 3, "critical": 0 }));
    assert_eq!(
        (&list["has_recipients"], &list["next"]),
        (&json!(false), &Value::Null)
    );
    assert_eq!(list["alerts"][3]["labels"], json!({ "a.b": "c" }));
    let few = limited.read("/alerts").await;
    assert_eq!(ids(&few), [&pending, &first]);
    assert_eq!(few["active"]["warning"], 1);
    for (query, found) in [
        ("state=resolved".to_owned(), vec![&resolved]),
        (format!("instance_id={other}"), vec![&elsewhere]),
        ("severity=critical".to_owned(), vec![]),
        (format!("rule_id={NOBODY}&state=pending"), vec![&pending]),
        ("to=1970-01-01T00:00:02Z".to_owned(), vec![&first]),
        (
            "state=resolved&from=1970-01-01T00:00:01Z".to_owned(),
            vec![&resolved],
        ),
        ("state=resolved&from=1970-01-01T00:00:02Z".to_owned(), vec![]),
    ] {
        assert_eq!(
            ids(&viewer.read(&format!("/alerts?{query}")).await),
            found,
            "{query}"
        );
    }
    // Pages, also between two alerts that began at the same time.
    let mut query = "limit=1".to_owned();
    for expected in [&global, &pending, &elsewhere, &first] {
        let page = viewer.read(&format!("/alerts?{query}")).await;
        assert_eq!(ids(&page), [expected]);
        query = format!("limit=1&cursor={}", page["next"].as_str().unwrap_or("none"));
    }
    assert!(query.ends_with("none"), "{query}");

    for hidden in [&elsewhere, &global, NOBODY] {
        let path = format!("/alerts/{hidden}");
        limited.get(&path).await.problem(404, "not_found");
        put(&limited, &format!("{path}/acknowledgement"), json!({}))
            .await
            .problem(404, "not_found");
    }
    let path = format!("/alerts/{first}/acknowledgement");
    let send = |api: &Api, path: &str| Reply::of(api.request(Method::PUT, path));
    send(&viewer, &path).await.problem(403, "forbidden");
    for (alert, reason) in [(&pending, "does not fire"), (&resolved, "is resolved")] {
        let detail = send(&all, &format!("/alerts/{alert}/acknowledgement")).await;
        let detail = detail.problem(409, "conflict");
        assert!(detail.contains(reason), "{detail}");
    }
    let acknowledged = send(&limited, &path).await;
    assert_eq!(acknowledged.status, 200, "{acknowledged:?}");
    let acknowledged = acknowledged.json();
    assert_eq!(
        (&acknowledged["state"], &acknowledged["revision"]),
        (&json!("acknowledged"), &json!(2))
    );
    let user = Stack::user_of(Role::Operator, &only(&[mine]));
    assert_eq!(acknowledged["acknowledged_by"], user);
    // Another user's repetition changes nothing.
    assert_eq!(send(&all, &path).await.json(), acknowledged);
    assert_eq!(viewer.read(&format!("/alerts/{first}")).await, acknowledged);
    assert_eq!(follower.expect("alert").await.data, acknowledged);
    // An alert outside the scope causes no event.
    assert_eq!(
        send(&all, &format!("/alerts/{elsewhere}/acknowledgement"))
            .await
            .status,
        200
    );
    let f = store_alert(&stack, 'f', Some(mine), "firing", 4000).await;
    assert_eq!(
        send(&all, &format!("/alerts/{f}/acknowledgement")).await.status,
        200
    );
    assert_eq!(follower.expect("alert").await.data["id"], f);

    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let done = audited(&admin, "alert.alerts.acknowledge", "succeeded").await;
    assert_eq!(done.len(), 3, "{done:?}");
    let requested = audited(&admin, "alert.alerts.acknowledge", "requested").await;
    let detail = format!("CPU above 95 % of VM {mine}");
    assert_eq!(
        (&requested[2]["target"], &requested[2]["detail"]),
        (&json!(first), &json!(detail))
    );
}

#[tokio::test]
async fn channels_keep_their_secret_for_one_receiver_and_leave_no_traces() {
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let operator = Api::with(&stack, Role::Operator, Scope::All).await;
    operator.get("/alert-channels").await.problem(403, "forbidden");
    operator
        .post("/alert-channels", webhook("x"))
        .await
        .problem(403, "forbidden");
    let made = created(&admin, "/alert-channels", webhook("ops")).await;
    assert_eq!(
        (&made["has_secret"], &made["waiting"], &made["delivered_at"]),
        (&json!(false), &json!(0), &Value::Null)
    );
    let id = made["id"].as_str().unwrap();
    let names = operator.read("/alert-channels/names").await;
    let name = json!({ "id": id, "name": "ops", "kind": "webhook", "enabled": true });
    assert_eq!(names["channels"], json!([name]));

    let mut spec = rule("notifies ops");
    spec["recipients"] = json!([id]);
    let rule = created(&operator, "/alert-rules", spec).await;
    eventually(
        "the list of alerts says that somebody is notified",
        PATIENCE,
        async || {
            let list = operator.read("/alerts").await;
            (list["has_recipients"] == true)
                .then_some(())
                .ok_or_else(|| list.to_string())
        },
    )
    .await;

    let path = format!("/alert-channels/{id}");
    let test = Reply::of(admin.request(Method::POST, &format!("{path}/test"))).await;
    assert_eq!(test.status, 202, "{test:?}");
    let message = test.json();
    assert_eq!(
        (&message["purpose"], &message["channel_id"]),
        (&json!("test"), &json!(id))
    );
    let listed = admin.read(&format!("/alert-messages?channel_id={id}")).await;
    assert_eq!(listed["messages"][0]["id"], message["id"]);
    assert_eq!(
        admin.read(&format!("/alert-messages?alert_id={NOBODY}")).await["messages"],
        json!([])
    );
    operator.get("/alert-messages").await.problem(403, "forbidden");

    let mut off = webhook("ops");
    off["spec"]["enabled"] = false.into();
    let change = json!({ "revision": 1, "spec": off["spec"] });
    let changed = put(&admin, &path, change.clone()).await;
    assert_eq!(
        (changed.status, &changed.json()["revision"]),
        (200, &json!(2)),
        "{changed:?}"
    );
    put(&admin, &path, change).await.problem(409, "conflict");
    Reply::of(admin.request(Method::POST, &format!("{path}/test")))
        .await
        .problem(409, "conflict");

    assert_eq!(admin.delete(&format!("{path}?revision=2")).await.status, 204);
    let rule = operator
        .read(&format!("/alert-rules/{}", rule["id"].as_str().unwrap()))
        .await;
    assert_eq!(
        (&rule["spec"]["recipients"], &rule["revision"]),
        (&json!([]), &json!(2))
    );
    let waiting = stack.database.handle().collection::<Document>("alert_messages");
    let waiting = waiting
        .count_documents(doc! { "due_ms": { "$exists": true } })
        .await;
    assert_eq!(waiting.unwrap(), 0);
    let audit = admin.get("/audit?action=alert.channels").await;
    assert!(!audit.body.contains("secret-path"), "{audit:?}");
}

#[tokio::test]
async fn numbers_of_rules_and_silences_are_limited() {
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let database = stack.database.handle();
    let rules = database.collection::<Document>("alert_rules");
    let stored = rules.find_one(doc! {}).await.unwrap().unwrap();
    let copies = (8..500).map(|number| {
        let mut copy = stored.clone();
        copy.insert("_id", format!("{number:032x}"));
        copy
    });
    rules.insert_many(copies).await.unwrap();
    let detail = admin.post("/alert-rules", rule("one too many")).await;
    let detail = detail.problem(409, "conflict");
    assert!(detail.contains("500 rules"), "{detail}");
    assert_eq!(names(&admin).await.len(), 500);

    // Rules that list many VMs are limited in their total size, so that the list fits into one message.
    rules.delete_many(doc! { "_id": { "$lt": "1" } }).await.unwrap();
    let ids: Vec<_> = (0..1000).map(|number| format!("{number:060}")).collect();
    let mut large = rule("large");
    large["vms"] = json!({ "ids": ids });
    for _ in 0..20 {
        let reply = admin.post("/alert-rules", large.clone()).await;
        if reply.status == 201 {
            continue;
        }
        let detail = reply.problem(409, "conflict");
        assert!(detail.contains("768 KiB"), "{detail}");
        assert!(names(&admin).await.len() >= 10);
        return;
    }
    panic!("20 rules with 1,000 ids each were stored");
}

#[tokio::test]
async fn unreadable_rule_is_listed_and_can_be_removed() {
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let limited = Api::with(&stack, Role::Admin, only(&["vm-1"])).await;
    let rules = stack.database.handle().collection::<Document>("alert_rules");
    let mut newer = rules.find_one(doc! {}).await.unwrap().unwrap();
    let id = "9".repeat(32);
    newer.insert("_id", &id);
    newer.insert("revision", 4_i64);
    let spec = newer.get_document_mut("spec").unwrap();
    spec.insert("name", "of a newer version");
    spec.insert("condition", doc! { "kind": "gpu" });
    rules.insert_one(newer).await.unwrap();

    let list = admin.read("/alert-rules").await;
    assert_eq!(list["rules"].as_array().unwrap().len(), 8);
    let unreadable = &list["unreadable"][0];
    assert_eq!(
        (&unreadable["id"], &unreadable["revision"], &unreadable["name"]),
        (&json!(id), &json!(4), &json!("of a newer version"))
    );
    assert!(
        unreadable["problem"].as_str().unwrap().contains("cannot read"),
        "{unreadable}"
    );
    assert_eq!(limited.read("/alert-rules").await["unreadable"], json!([]));
    let removed = admin.delete(&format!("/alert-rules/{id}?revision=4")).await;
    assert_eq!(removed.status, 204, "{removed:?}");
    assert_eq!(admin.read("/alert-rules").await["unreadable"], json!([]));
}
