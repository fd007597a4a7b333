//! Tests that the audit names the API token with which a request was sent.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, MACHINES, PATIENCE, Program, eventually};
use vmwatch_api::time::unix_millis;

use super::{created, stack};
use crate::rest::client::{Api, rfc3339};

/// The audit records of the administrator as pairs of action and result, those of requests with the API token and those of
/// other requests.
fn pairs(records: &[Value], label: &Value) -> (BTreeSet<String>, BTreeSet<String>) {
    let pair = |record: &Value| {
        let text = |name: &str| record[name].as_str().unwrap().to_owned();
        format!("{} {}", text("action"), text("result"))
    };
    let (with_token, others): (Vec<_>, Vec<_>) =
        records.iter().partition(|record| record["api_token"] == *label);
    assert!(
        others.iter().all(|record| record["api_token"].is_null()),
        "{others:?}"
    );
    (
        with_token.into_iter().map(pair).collect(),
        others.into_iter().map(pair).collect(),
    )
}

#[tokio::test]
async fn audit_names_the_api_token_of_a_request() {
    let stack = stack()
        .replicas(Program::Metrics, 1)
        .replicas(Program::Alert, 1)
        .start()
        .await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let name = "夜间 \"CI\"";
    let answer = created(&admin, json!({ "name": name, "role": "admin" })).await;
    let token = answer["token"].as_str().unwrap();
    let label = json!({ "id": answer["api_token"]["id"], "name": name });
    let with_token = admin.holding(token);

    // Each service that writes audit records gets a request with the token; one fails, and one is refused.
    let vm = MACHINES[0].0;
    let act = format!("/vms/{vm}/actions");
    let started = with_token.post(&act, json!({ "action": "start" })).await;
    assert_eq!(started.status, 202, "{started:?}");
    let labels = json!({ "labels": { "team": "storage" }, "revision": 0 });
    let labelled = with_token
        .send(Method::PUT, &format!("/vms/{vm}/labels"), labels)
        .await;
    assert_eq!(labelled.status, 200, "{labelled:?}");
    let to = rfc3339(unix_millis() + 3_600_000);
    let silence = json!({ "matchers": { "team": "storage" }, "to": to, "comment": "" });
    let silenced = with_token.post("/alert-silences", silence).await;
    assert_eq!(silenced.status, 201, "{silenced:?}");
    with_token
        .delete("/agents/vm-unknown")
        .await
        .problem(404, "not_found");
    let stop = json!({ "action": "stop" });
    assert_eq!(admin.post(&act, stop).await.status, 202);

    let expected = [
        "alert.silences.create requested",
        "alert.silences.create succeeded",
        "auth.agents.revoke refused",
        "auth.agents.revoke requested",
        "lifecycle.labels.set requested",
        "lifecycle.labels.set succeeded",
        "lifecycle.start requested",
        "lifecycle.start succeeded",
    ];
    let expected: BTreeSet<_> = expected.map(str::to_owned).into();
    let others = eventually("both operations have ended", PATIENCE, async || {
        let audit = admin.read("/audit?user=admin").await;
        let (with_token, others) = pairs(audit["records"].as_array().unwrap(), &label);
        let has_ended = others.contains("lifecycle.stop succeeded");
        (has_ended && with_token == expected)
            .then_some(others)
            .ok_or_else(|| audit.to_string())
    })
    .await;
    assert!(others.contains("auth.tokens.create succeeded"), "{others:?}");

    // A request that a service refuses because of the role of the token.
    let viewer = created(&admin, json!({ "name": "reads", "role": "viewer" })).await;
    let reads = admin.holding(viewer["token"].as_str().unwrap());
    reads
        .post(&act, json!({ "action": "start" }))
        .await
        .problem(403, "forbidden");
    let audit = admin.read("/audit?action=lifecycle.start").await;
    let newest = &audit["records"][0];
    assert_eq!(
        (&newest["result"], &newest["user"], &newest["api_token"]["name"]),
        (&json!("refused"), &json!("admin"), &json!("reads"))
    );

    let whole = admin.read("/audit?limit=1000").await.to_string();
    let secret = token.rsplit('_').next().unwrap();
    assert!(
        !whole.contains(secret),
        "the audit contains the secret of the token"
    );
}
