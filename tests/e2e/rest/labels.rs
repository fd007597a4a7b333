//! Tests labels of VMs and the removal of VMs over REST.

use std::sync::Arc;

use mongodb::bson::{DateTime, Document, doc};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::{MACHINES, MongoProxy, PATIENCE, Program, Stack, eventually};
use vmwatch_api::{InstanceId, Role, Scope, time::unix_millis};
use vmwatch_store::MONGODB_URI;

use super::{
    client::{Api, Reply, process, publish, report, sample, stack},
    events::Follower,
};

const MINUTE: u64 = 60_000;

fn numbered(count: usize) -> Value {
    (0..count)
        .map(|number| (format!("key-{number}"), json!("x")))
        .collect()
}

async fn set(api: &Api, id: &str, labels: Value, revision: u64) -> Reply {
    let body = json!({ "labels": labels, "revision": revision });
    api.send(Method::PUT, &format!("/vms/{id}/labels"), body).await
}

#[tokio::test]
async fn labels_are_set_within_their_limits_and_conflicts_are_refused() {
    let stack = stack().start().await;
    let operator = Api::with(&stack, Role::Operator, Scope::All).await;
    let viewer = Api::with(&stack, Role::Viewer, Scope::All).await;
    // A VM that only its hypervisor knows, and one that only its agent knows.
    report(&stack, &operator, &[("bare-metal", 1.0)]).await;
    let [(listed, _), (other, _), _] = MACHINES;
    for id in [listed, "bare-metal"] {
        let path = format!("/vms/{id}/labels");
        let title = json!({ "hv/title": "Ledger" });
        let hypervisor = if id == listed { title } else { json!({}) };
        let none = json!({ "labels": {}, "hypervisor_labels": hypervisor, "revision": 0 });
        assert_eq!(viewer.read(&path).await, none);
        let labels = json!({ "team": "storage", "rack": "" });
        let changed = set(&operator, id, labels.clone(), 0).await;
        assert_eq!((changed.status, &changed.json()["labels"]), (200, &labels));
        assert_eq!(viewer.read(&path).await, changed.json());
        let detail = set(&operator, id, json!({}), 0).await.problem(409, "conflict");
        assert!(detail.contains("read them again"), "{detail}");
        let revision = changed.json()["revision"].as_u64().unwrap();
        set(&viewer, id, json!({}), revision)
            .await
            .problem(403, "forbidden");
        assert_eq!(viewer.read(&path).await, changed.json());
    }
    // The list of VMs has labels of both kinds, and can be searched and filtered by them.
    for (query, ids) in [
        ("label=team=storage", [listed, "bare-metal"].as_slice()),
        ("label=rack", &[listed, "bare-metal"]),
        ("label=team=other", &[]),
        ("label=hv/title=Ledger&q=STORAGE", &[listed]),
    ] {
        let what = format!("the list is filtered by {query}");
        eventually(&what, PATIENCE, async || {
            let list = viewer.read(&format!("/vms?{query}")).await;
            let vms = list["vms"].as_array().unwrap();
            let found: Vec<_> = vms.iter().map(|vm| vm["instance_id"].as_str().unwrap()).collect();
            (found == ids).then_some(()).ok_or_else(|| list.to_string())
        })
        .await;
    }
    for (labels, rule) in [
        (numbered(33), "at most 32 labels"),
        (numbered(3000), "at most 32 labels"),
        (json!({ "k".repeat(64): "" }), "1 to 63 characters"),
        (json!({ "": "" }), "1 to 63 characters"),
        (json!({ "hv/os": "x" }), "not begin with hv/"),
        (json!({ "a=b": "x" }), "must be 1 to 63 characters"),
        (json!({ "a": "v".repeat(256) }), "at most 255 bytes"),
        (json!({ "a": "\u{0}" }), "without control characters"),
    ] {
        let detail = set(&operator, listed, labels, 1).await.problem(422, "labels");
        assert!(
            detail.starts_with("body: labels: ") && detail.contains(rule),
            "{rule}: {detail}"
        );
    }
    for labels in [json!({ "a": 1 }), json!([]), json!(null)] {
        let detail = set(&operator, listed, labels, 1).await.problem(400, "invalid");
        assert!(detail.starts_with("body: labels"), "{detail}");
    }
    set(&operator, listed, numbered(10_000), 1)
        .await
        .problem(413, "invalid");
    let read = viewer.read(&format!("/vms/{listed}/labels")).await;
    let revision = read["revision"].as_u64().unwrap();
    let most: Value = (0..32)
        .map(|number| (format!("{number:063}"), json!("\"".repeat(255))))
        .collect();
    let changed = set(&operator, listed, most.clone(), revision).await;
    assert_eq!((changed.status, &changed.json()["labels"]), (200, &most));

    // A VM that does not exist and a VM outside of the scope look the same.
    let scope = Scope::Only(vec![listed.parse::<InstanceId>().unwrap()]);
    let limited = Api::with(&stack, Role::Operator, scope).await;
    for id in [other, "unknown"] {
        limited
            .get(&format!("/vms/{id}/labels"))
            .await
            .problem(404, "not_found");
        set(&limited, id, json!({}), 0).await.problem(404, "not_found");
    }
    operator
        .get("/vms/unknown/labels")
        .await
        .problem(404, "not_found");
    set(&operator, "unknown", json!({ "a": "b" }), 0)
        .await
        .problem(404, "not_found");

    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let audit = admin.read("/audit?action=lifecycle.labels.set").await;
    let records = audit["records"].as_array().unwrap();
    let detail = |detail: &str| records.iter().any(|record| record["detail"] == detail);
    assert!(detail("set rack=, team=storage"), "{audit}");
    let refused = records.iter().filter(|record| record["result"] == "refused");
    assert!(refused.count() >= 2, "{audit}");
}

/// The number of documents of each collection of rows that belong to this VM.
async fn documents(stack: &Stack, id: &str) -> Vec<(&'static str, u64)> {
    let database = stack.database.handle();
    let mut found = Vec::new();
    let of_vm = doc! { "instance_id": id };
    let rollups = doc! { "_id": { "$gte": format!("{id}/"), "$lt": format!("{id}0") } };
    for (collection, filter) in [
        ("blocks", &of_vm),
        ("vm_samples", &of_vm),
        ("process_samples", &of_vm),
        ("vm_samples_dirty_buckets", &of_vm),
        ("vm_samples_5m", &rollups),
        ("vm_samples_1h", &rollups),
        ("vm_samples_1d", &rollups),
        ("vm_samples_instances", &doc! { "_id": id }),
    ] {
        let documents = database.collection::<Document>(collection);
        let count = documents.count_documents(filter.clone()).await.unwrap();
        found.push((collection, count));
    }
    found
}

/// Publishes rows of some minutes, and waits until the rollups contain them.
async fn report_history(stack: &Stack, id: &str) {
    let now = unix_millis();
    for minute in (0..30).rev() {
        let mut sample = sample(id, now - minute * MINUTE, 1.0);
        sample.processes = (1..5)
            .map(|pid| process("init", pid, 0.5, now - 60 * MINUTE))
            .collect();
        publish(stack, &sample).await;
    }
    eventually("the rollups contain the rows", PATIENCE, async || {
        let found = documents(stack, id).await;
        let counts: Vec<_> = found.iter().map(|(_, count)| *count).collect();
        let is_complete = counts[0] == 60 && counts[3] == 0 && counts[4] >= 6 && counts[7] == 1;
        is_complete.then_some(()).ok_or_else(|| format!("{found:?}"))
    })
    .await;
}

#[tokio::test]
async fn removed_vm_loses_its_history_and_labels_until_it_reports_again() {
    let stack = stack().replicas(Program::Metrics, 2).start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let operator = Api::with(&stack, Role::Operator, Scope::All).await;
    let mut follower = Follower::of(&admin, "?kind=removed", None).await;
    follower.expect("ready").await;
    let [(listed, _), _, _] = MACHINES;
    report_history(&stack, "gone").await;
    // The ids of these VMs surround the keys of the removed one's rollups.
    report(&stack, &admin, &[("gone-2", 1.0), ("gone0", 1.0)]).await;
    assert_eq!(set(&operator, "gone", json!({ "a": "b" }), 0).await.status, 200);

    operator
        .delete("/vms/gone?name=gone")
        .await
        .problem(403, "forbidden");
    for wrong in ["", "gone-2", "Gone"] {
        let refused = admin.delete(&format!("/vms/gone?name={wrong}")).await;
        let detail = refused.problem(409, "conflict");
        assert!(detail.contains("wrong name"), "{detail}");
    }
    admin.delete("/vms/gone").await.problem(400, "invalid");
    let detail = admin
        .delete(&format!("/vms/{listed}?name={listed}"))
        .await
        .problem(409, "conflict");
    assert!(detail.contains("still has this VM"), "{detail}");

    let removed = admin.delete("/vms/gone?name=gone").await;
    assert_eq!((removed.status, removed.body.as_str()), (204, ""));
    let left = documents(&stack, "gone").await;
    assert!(left.iter().all(|(_, count)| *count == 0), "{left:?}");
    let event = follower.expect("removed").await;
    assert_eq!(event.data["instance_id"], "gone");
    eventually("no replica shows the removed VM", PATIENCE, async || {
        for path in ["/vms/gone", "/vms/gone/labels"] {
            let reply = admin.get(path).await;
            if reply.status != 404 {
                return Err(format!("{path}: {reply:?}"));
            }
        }
        let list = admin.read("/vms?q=gone").await;
        let ids = list["vms"]
            .as_array()
            .unwrap()
            .iter()
            .map(|vm| vm["instance_id"].as_str().unwrap());
        let ids: Vec<_> = ids.collect();
        (ids == ["gone-2", "gone0"])
            .then_some(())
            .ok_or_else(|| format!("{ids:?}"))
    })
    .await;
    let samples = admin.read("/vms/gone/samples").await;
    assert_eq!(samples["buckets"], json!([]), "{samples}");
    admin
        .delete("/vms/gone?name=gone")
        .await
        .problem(404, "not_found");

    report(&stack, &admin, &[("gone", 2.0)]).await;
    assert_eq!(documents(&stack, "gone").await[0], ("blocks", 1));
    assert_eq!(admin.read("/vms/gone/labels").await["labels"], json!({}));
    for action in ["metrics.history.remove", "lifecycle.removal.finish"] {
        let audit = admin.read(&format!("/audit?action={action}&target=gone")).await;
        let records = audit["records"].as_array().unwrap();
        assert!(
            records.iter().any(|record| record["result"] == "succeeded"),
            "{audit}"
        );
    }
}

#[tokio::test]
async fn interrupted_removal_is_continued_by_a_repeated_request() {
    const ROWS: u64 = 20_000;
    // The gateway waits until this deadline for the answer of the killed service.
    let stack = stack()
        .set(Program::Gateway, "VMWATCH_COMMAND_DEADLINE", "5s")
        .start()
        .await;
    let metrics = stack.replica(Program::Metrics, 0);
    let proxy = MongoProxy::start(stack.database.uri(), "process_samples").await;
    metrics.process.set(MONGODB_URI.name, proxy.uri());
    metrics.process.kill9();
    metrics.restart().await;
    let admin = Arc::new(Api::with(&stack, Role::Admin, Scope::All).await);
    report(&stack, &admin, &[("large", 1.0)]).await;
    let rows = stack.database.handle().collection::<Document>("process_samples");
    let row = doc! { "instance_id": "large", "create_date": "2026-11-01 00:00:00", "sampled_at": DateTime::now(), "cmd": "x" };
    for _ in 0..ROWS / 1000 {
        rows.insert_many(vec![row.clone(); 1000]).await.unwrap();
    }
    // One batch is deleted, and the deletion of the next one does not reach the database.
    proxy.hold("delete", 1);
    let removing = {
        let admin = Arc::clone(&admin);
        tokio::spawn(async move { admin.delete("/vms/large?name=large").await })
    };
    proxy.holds().await;
    metrics.process.kill9();
    proxy.drop_held();
    let interrupted = removing.await.unwrap();
    let left = documents(&stack, "large").await;
    assert_ne!(interrupted.status, 204, "the removal was not interrupted");
    assert!((1..ROWS).contains(&left[2].1), "{left:?}");
    // The VM is listed until the removal is complete.
    assert_eq!(left[7], ("vm_samples_instances", 1));
    proxy.release();
    metrics.restart().await;
    eventually("the removal is complete", PATIENCE, async || {
        let reply = admin.delete("/vms/large?name=large").await;
        (reply.status == 204)
            .then_some(())
            .ok_or_else(|| format!("{reply:?}"))
    })
    .await;
    let left = documents(&stack, "large").await;
    assert!(left.iter().all(|(_, count)| *count == 0), "{left:?}");
}
