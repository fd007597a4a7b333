//! Tests labels: those that hypervisors have, those that operators set, and the removal of VMs.

use async_nats::{HeaderMap, header::NATS_MESSAGE_TTL, jetstream};
use serde_json::json;
use testkit::{
    PATIENCE,
    cloud::{At, Cloud},
    eventually,
};
use vmwatch_api::{
    Role, Scope,
    audit::{AuditRecord, AuditResult},
    inventory::INVENTORY_BUCKET,
    labels::{LABELS_BUCKET, Labels, LabelsChange, LabelsGet, LabelsReply, LabelsSet},
    removal::{Removal, RemovalCheck, RemovalFinish},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Context, audit};

use crate::support::{Replica, USER, World, context, instance_id, operator, target};

const ONE: &str = "aaaaaaaa-1111-4111-8111-111111111111";
const TWO: &str = "bbbbbbbb-2222-4222-8222-222222222222";

async fn replica(world: &World, hypervisors: &str) -> Replica {
    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors),
        ("VMWATCH_STATE_INTERVAL", "300ms"),
        ("VMWATCH_HYPERVISOR_TIMEOUT", "2s"),
    ];
    world.replica("lifecycle", &settings).await
}

async fn labels_of(world: &World, id: &str) -> LabelsReply {
    world
        .bus
        .call::<LabelsGet>(&operator(), &target(id))
        .await
        .unwrap()
}

/// Waits until the hypervisor's labels of a VM are these, as `key=value` sorted by key.
async fn has_labels(world: &World, id: &str, expected: &[&str]) {
    eventually("the VM has the hypervisor's labels", PATIENCE, async || {
        let labels = labels_of(world, id).await.hypervisor;
        let labels = labels.iter().map(|(key, value)| format!("{key}={value}"));
        let labels: Vec<_> = labels.collect();
        (labels == expected)
            .then_some(())
            .ok_or_else(|| format!("{labels:?}"))
    })
    .await;
}

async fn is_listed(world: &World, id: &str, expected: bool) {
    eventually("the VM is listed or not", PATIENCE, async || {
        let labels = labels_of(world, id).await;
        (labels.listed == expected)
            .then_some(())
            .ok_or_else(|| format!("{labels:?}"))
    })
    .await;
}

async fn omitted(replica: &Replica) -> u64 {
    let metrics = replica.get("/metrics").await.unwrap();
    let lines = metrics.lines();
    let counts = lines.filter_map(|line| line.strip_prefix("vmwatch_hypervisor_labels_omitted_total{"));
    counts
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

async fn last_sequence(world: &World) -> u64 {
    let stream = format!("KV_{INVENTORY_BUCKET}");
    let info = world.bus.stream_info(&stream, PATIENCE).await.unwrap();
    info.state.last_sequence
}

fn labels(json: serde_json::Value) -> Labels {
    serde_json::from_value(json).unwrap()
}

async fn set(
    world: &World,
    context: &Context,
    id: &str,
    json: serde_json::Value,
    revision: u64,
) -> Result<LabelsReply, Fault> {
    let change = LabelsChange {
        instance_id: instance_id(id),
        labels: labels(json),
        revision,
    };
    world.bus.call::<LabelsSet>(context, &change).await
}

/// Returns the audit records of this action, oldest first.
async fn audited(world: &World, action: &str) -> Vec<AuditRecord> {
    let mut records = audit::newest(&world.bus, 1000).await.unwrap();
    records.retain(|record| record.action == action);
    records
}

#[tokio::test]
async fn nova_metadata_and_tags_become_labels() {
    let world = World::new().await;
    let cloud = Cloud::start(&[(ONE, "ACTIVE"), (TWO, "SHUTOFF")]).await;
    let long = "v".repeat(256);
    cloud.label(ONE, &[("owner", "ann"), ("long", &long)], &["web", "env=prod"]);
    let service = replica(&world, &cloud.entry(world.path(), "cloud")).await;
    has_labels(&world, ONE, &["env=prod", "owner=ann", "web="]).await;
    has_labels(&world, TWO, &[]).await;
    assert_eq!(omitted(&service).await, 1);

    let before = last_sequence(&world).await;
    let lists = cloud.lists();
    eventually("the cloud is listed again", PATIENCE, async || {
        let count = cloud.lists() - lists;
        (count >= 3).then_some(()).ok_or_else(|| count.to_string())
    })
    .await;
    assert_eq!(last_sequence(&world).await, before, "nothing has changed");
    assert_eq!(omitted(&service).await, 1);
    cloud.label(ONE, &[("owner", "bob")], &[]);
    has_labels(&world, ONE, &["owner=bob"]).await;
    assert_eq!(last_sequence(&world).await, before + 1);
}

#[cfg(feature = "libvirt")]
#[tokio::test]
async fn libvirt_title_and_metadata_become_labels() {
    let world = World::new().await;
    let node = format!(
        "<node><domain type='test'><name>one</name><uuid>{ONE}</uuid><title>Ledger</title><metadata>\
         <app:info xmlns:app='http://app.example/'><app:owner>ann</app:owner><app:two>a\nb</app:two></app:info>\
         </metadata><memory unit='MiB'>64</memory><os><type>hvm</type></os></domain></node>"
    );
    let file = world.path().join("node.xml");
    std::fs::write(&file, node).unwrap();
    let service = replica(&world, &format!("one=test://{}", file.display())).await;
    has_labels(&world, ONE, &["info.owner=ann", "title=Ledger"]).await;
    assert_eq!(omitted(&service).await, 1);
}

#[tokio::test]
async fn operators_set_labels_and_concurrent_change_conflicts() {
    let world = World::new().await;
    let cloud = Cloud::start(&[(ONE, "ACTIVE")]).await;
    cloud.label(ONE, &[("owner", "ann")], &[]);
    let service = replica(&world, &cloud.entry(world.path(), "cloud")).await;
    has_labels(&world, ONE, &["owner=ann"]).await;
    let first = labels_of(&world, ONE).await;
    assert_eq!((first.labels.len(), first.revision, first.listed), (0, 0, true));

    let ann = operator();
    let second = set(&world, &ann, ONE, json!({ "team": "storage", "rack": "" }), 0)
        .await
        .unwrap();
    assert_eq!(second.hypervisor["owner"], "ann");
    let bob = context("bob", Role::Operator, Scope::Only(vec![instance_id(ONE)]));
    let fault = set(&world, &bob, ONE, json!({ "team": "web" }), 0)
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Conflict, "{fault}");
    assert_eq!(labels_of(&world, ONE).await, second);
    // A change that changes nothing writes nothing.
    let same = json!({ "team": "storage", "rack": "" });
    assert_eq!(
        set(&world, &bob, ONE, same, second.revision).await.unwrap(),
        second
    );
    let third = set(&world, &bob, ONE, json!({ "team": "web" }), second.revision)
        .await
        .unwrap();
    assert_eq!(third.labels, labels(json!({ "team": "web" })));

    let viewer = context("eve", Role::Viewer, Scope::All);
    let fault = set(&world, &viewer, ONE, json!({}), third.revision)
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Forbidden);
    let elsewhere = context("eve", Role::Operator, Scope::Only(vec![instance_id(TWO)]));
    let fault = set(&world, &elsewhere, ONE, json!({}), third.revision)
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::NotFound);
    let read = world.bus.call::<LabelsGet>(&elsewhere, &target(ONE)).await;
    assert_eq!(read.unwrap_err().kind, FaultKind::NotFound);

    let records = audited(&world, "lifecycle.labels.set").await;
    let shown: Vec<_> = records
        .iter()
        .map(|record| (record.user.as_str(), record.result, record.detail.as_str()))
        .collect();
    let (requested, succeeded, refused) = (
        AuditResult::Requested,
        AuditResult::Succeeded,
        AuditResult::Refused,
    );
    assert_eq!(
        shown[..4],
        [
            (USER, requested, "set rack=, team=storage"),
            (USER, succeeded, "set rack=, team=storage"),
            ("bob", requested, "set team=web; removed rack"),
            ("bob", succeeded, "set team=web; removed rack"),
        ]
    );
    assert!(
        shown[4..]
            .iter()
            .all(|(user, result, _)| (*user, *result) == ("eve", refused)),
        "{shown:?}"
    );
    assert_eq!(shown.len(), 6);
    assert!(records.iter().all(|record| record.target.as_deref() == Some(ONE)));

    // The bucket has no key for a VM without labels, and the marker ends by itself.
    let fourth = set(&world, &bob, ONE, json!({}), third.revision).await.unwrap();
    let client = async_nats::connect(world.nats.url()).await.unwrap();
    let stream = jetstream::new(client)
        .get_stream(format!("KV_{LABELS_BUCKET}"))
        .await
        .unwrap();
    let subject = format!("$KV.{LABELS_BUCKET}.{ONE}");
    let marker = stream.get_last_raw_message_by_subject(&subject).await.unwrap();
    assert!(marker.headers.get(NATS_MESSAGE_TTL).is_some(), "{marker:?}");
    let fifth = set(&world, &bob, ONE, json!({ "a": "b" }), fourth.revision)
        .await
        .unwrap();

    // Labels that cannot be decoded count as none and can be replaced.
    let broken = world
        .bus
        .publish_stored(subject, HeaderMap::new(), "{".into(), PATIENCE);
    broken.await.unwrap();
    let sixth = labels_of(&world, ONE).await;
    assert!(sixth.labels.is_empty() && sixth.revision > fifth.revision);
    set(&world, &bob, ONE, json!({ "a": "b" }), sixth.revision)
        .await
        .unwrap();
    let metrics = service.get("/metrics").await.unwrap();
    let counter = format!("vmwatch_broken_records_total{{bucket=\"{LABELS_BUCKET}\"}}");
    assert!(metrics.contains(&counter), "{metrics}");
}

#[tokio::test]
async fn vm_is_removed_only_if_no_hypervisor_has_it_and_its_name_is_right() {
    let world = World::new().await;
    let cloud = Cloud::start(&[(ONE, "ACTIVE")]).await;
    let hung = Cloud::start(&[(TWO, "SHUTOFF")]).await;
    let hypervisors = [
        cloud.entry(world.path(), "cloud"),
        hung.entry(world.path(), "hung"),
    ];
    let _service = replica(&world, &hypervisors.join(",")).await;
    for id in [ONE, TWO] {
        is_listed(&world, id, true).await;
    }
    hung.hold(At::List);
    let name = format!("name of {TWO}");

    let admin = context("root", Role::Admin, Scope::All);
    let removal = |id: &str, name: &str| Removal {
        instance_id: instance_id(id),
        name: name.to_owned(),
    };
    eventually("the hung hypervisor is unreachable", PATIENCE, async || {
        let checked = world.bus.call::<RemovalCheck>(&admin, &removal(TWO, &name)).await;
        checked.map(drop).map_err(|fault| fault.to_string())
    })
    .await;
    let check = async |context: &Context, id: &str, name: &str| {
        let checked = world.bus.call::<RemovalCheck>(context, &removal(id, name)).await;
        let finished = world.bus.call::<RemovalFinish>(context, &removal(id, name)).await;
        let fault = checked.unwrap_err();
        assert_eq!(finished.unwrap_err().kind, fault.kind);
        fault
    };
    let fault = check(&admin, ONE, &format!("name of {ONE}")).await;
    assert_eq!(fault.kind, FaultKind::Conflict);
    assert!(fault.message.contains("cloud still has this VM"), "{fault}");
    for wrong in [TWO, "Name", ""] {
        let fault = check(&admin, TWO, wrong).await;
        assert!(
            fault.kind == FaultKind::Conflict && !fault.message.contains(&name),
            "{fault}"
        );
    }
    assert_eq!(check(&operator(), TWO, &name).await.kind, FaultKind::Forbidden);
    let elsewhere = context("root", Role::Admin, Scope::Only(vec![instance_id(ONE)]));
    assert_eq!(check(&elsewhere, TWO, &name).await.kind, FaultKind::NotFound);

    set(&world, &operator(), TWO, json!({ "a": "b" }), 0)
        .await
        .unwrap();
    world
        .bus
        .call::<RemovalCheck>(&admin, &removal(TWO, &name))
        .await
        .unwrap();
    let finish = async |name: &str| {
        let finished = world.bus.call::<RemovalFinish>(&admin, &removal(TWO, name)).await;
        finished.unwrap().records
    };
    assert_eq!(finish(&name).await, 2);
    is_listed(&world, TWO, false).await;
    assert!(labels_of(&world, TWO).await.labels.is_empty());
    // A VM without a name is confirmed by its id.
    assert_eq!(check(&admin, TWO, &name).await.kind, FaultKind::Conflict);
    assert_eq!(finish(TWO).await, 0);
    let records = audited(&world, "lifecycle.removal.finish").await;
    let succeeded = records
        .iter()
        .filter(|record| record.result == AuditResult::Succeeded);
    let details: Vec<_> = succeeded.map(|record| record.detail.as_str()).collect();
    // Both removals had one request id, so that the second one counts as a repetition of the first.
    assert_eq!(details, [format!("name: {name}")]);
    // A hypervisor that answers again lists its VM again.
    hung.release(At::List);
    is_listed(&world, TWO, true).await;
}
