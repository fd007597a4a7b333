//! Helpers of the tests of the evaluation of rules: a stack with alert-svc alone, rules in the database, and evaluation
//! records as metrics-svc publishes them.

use std::{collections::BTreeMap, sync::Arc};

use async_nats::{HeaderMap, jetstream::stream::Config};
use futures::{StreamExt, TryStreamExt};
use mongodb::bson::{Document, deserialize_from_document, doc, serialize_to_document};
use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, StackBuilder, eventually};
use tokio::sync::Mutex;
use vmwatch_api::{
    Method, Service,
    alerts::{
        Alert, RecordId,
        evaluation::{EVALUATION_STREAM, EvaluationRecord, Source, evaluation_subject},
        rules::RuleSpec,
    },
    inventory::{INVENTORY_BUCKET, InventoryHypervisor, InventoryKey, InventoryVm},
    labels::LABELS_BUCKET,
    lifecycle::{MachineState, Operation, OperationPage, OperationsList},
    measures::VmValues,
    metrics::{SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX},
    time::unix_millis,
    wire::Envelope,
};
use vmwatch_bus::provision::{BucketConfig, ensure_stream};

pub(super) const CPU: &str =
    r#"{"kind":"measure","measure":"cpu_util","threshold":{"direction":"above","limit":90}}"#;

/// Builds a stack with NATS, the database and alert-svc alone.
pub(super) fn builder() -> StackBuilder {
    [
        Program::Gateway,
        Program::Auth,
        Program::Metrics,
        Program::Lifecycle,
    ]
    .into_iter()
    .fold(Stack::builder().with_permissions(), |builder, program| {
        builder.replicas(program, 0)
    })
    .replicas(Program::Alert, 1)
    .set(Program::Alert, "VMWATCH_ALERT_LEASE", "1s")
    .set(Program::Alert, "VMWATCH_AUDIT_REQUIRED", "false")
    // Tests wait for the line with the rules that are evaluated.
    .set(Program::Alert, "VMWATCH_LOG", "info,alert_svc::engine=debug")
}

/// Starts the stack, and creates the streams and KV buckets of the services that do not run.
pub(super) async fn start(builder: StackBuilder) -> Stack {
    let stack = builder.start().await;
    for (name, subjects) in [
        (EVALUATION_STREAM, "vmwatch.v1.evaluation.*".to_owned()),
        (SAMPLE_STREAM, format!("{SAMPLE_SUBJECT_PREFIX}*")),
    ] {
        let stream = Config {
            name: name.to_owned(),
            subjects: vec![subjects],
            ..Config::default()
        };
        ensure_stream(&stack.bus, Service::Metrics, &stream)
            .await
            .unwrap();
    }
    make_lifecycle_buckets(&stack).await;
    stack
}

/// Creates the KV buckets of lifecycle-svc, for stacks in which it does not run.
pub(super) async fn make_lifecycle_buckets(stack: &Stack) {
    for name in [INVENTORY_BUCKET, LABELS_BUCKET] {
        let bucket = BucketConfig {
            name,
            description: "",
            max_age: std::time::Duration::ZERO,
            max_bytes: 1 << 20,
            replicas: 1,
        };
        ensure_stream(&stack.bus, Service::Lifecycle, &bucket.into())
            .await
            .unwrap();
    }
}

/// Stores a rule, as the methods of alert-svc do, waits until alert-svc evaluates it, and returns its id.
pub(super) async fn add_rule(stack: &Stack, name: &str, condition: &str, for_seconds: u32) -> RecordId {
    let id = store_rule(stack, name, condition, for_seconds).await;
    rule_is_evaluated(stack, &id).await;
    id
}

/// Waits until alert-svc evaluates a rule.
pub(super) async fn rule_is_evaluated(stack: &Stack, id: &RecordId) {
    let alert_svc = stack.replica(Program::Alert, 0);
    eventually("the rule is evaluated", PATIENCE, async || {
        let log = alert_svc.process.log();
        let mut lines = log.lines().filter(|line| line.contains("evaluating these rules"));
        let is_evaluated = lines.any(|line| line.contains(id.as_str()));
        if is_evaluated { Ok(()) } else { Err(log) }
    })
    .await;
}

/// Stores a rule, as the methods of alert-svc do, and returns its id.
pub(super) async fn store_rule(stack: &Stack, name: &str, condition: &str, for_seconds: u32) -> RecordId {
    let spec = format!(
        r#"{{"name":"{name}","enabled":true,"condition":{condition},"for_seconds":{for_seconds},"severity":"warning"}}"#
    );
    let spec: RuleSpec = serde_json::from_str(&spec).unwrap();
    let id = RecordId::from_parts(&[name]);
    let rule = doc! {
        "_id": id.as_str(), "revision": 1_i64, "spec": serialize_to_document(&spec).unwrap(), "changed_by": "ann", "changed_ms": 0_i64,
    };
    let rules = stack.database.handle().collection("alert_rules");
    rules.insert_one(rule).await.unwrap();
    id
}

/// A record of a sample of an agent that arrived at once.
pub(super) fn record(vm: &str, at_ms: u64) -> EvaluationRecord {
    EvaluationRecord {
        instance_id: vm.parse().unwrap(),
        source: Source::Agent,
        at_ms,
        arrived_ms: at_ms,
        part: 0,
        vm: None,
        filesystems: Vec::new(),
        has_processes: false,
        processes: Vec::new(),
        watched_revision: 0,
    }
}

/// A record of a sample with this CPU usage.
pub(super) fn cpu(vm: &str, at_ms: u64, cpu_util: f64) -> EvaluationRecord {
    EvaluationRecord {
        vm: Some(VmValues {
            cpu_util: Some(cpu_util),
            ..VmValues::default()
        }),
        ..record(vm, at_ms)
    }
}

/// Publishes a record, as metrics-svc does.
pub(super) async fn publish(stack: &Stack, record: &EvaluationRecord) {
    let subject = evaluation_subject(&record.instance_id);
    let body = serde_json::to_vec(record).unwrap();
    let stored = stack
        .bus
        .publish_stored(subject, HeaderMap::new(), body.into(), PATIENCE);
    stored.await.unwrap();
}

/// All alerts of a rule, oldest first, then by VM and subject.
pub(super) async fn alerts(stack: &Stack, rule: &RecordId) -> Vec<Alert> {
    let collection = stack.database.handle().collection::<Document>("alerts");
    let found = collection
        .find(doc! { "alert.rule_id": rule.as_str() })
        .sort(doc! { "alert.since_ms": 1, "alert.instance_id": 1, "alert.subject": 1 });
    let found: Vec<Document> = found.await.unwrap().try_collect().await.unwrap();
    let decode = |stored: Document| {
        let alert = stored.get_document("alert").unwrap().clone();
        deserialize_from_document(alert).unwrap()
    };
    found.into_iter().map(decode).collect()
}

/// Waits until the rule has exactly these alerts, each as VM, subject and state.
pub(super) async fn has_alerts(stack: &Stack, rule: &RecordId, wanted: &[(&str, &str, &str)]) -> Vec<Alert> {
    eventually(&format!("the alerts are {wanted:?}"), PATIENCE, async || {
        let all = alerts(stack, rule).await;
        let found: Vec<_> = all
            .iter()
            .map(|alert| {
                let vm = alert.instance_id.as_ref().map_or("", |vm| vm.as_str());
                (vm, alert.subject.as_str(), alert.state.as_str())
            })
            .collect();
        if found == wanted {
            Ok(())
        } else {
            Err(format!("{found:?}"))
        }
    })
    .await;
    alerts(stack, rule).await
}

/// The sequence numbers of the newest record and of the newest acknowledged one.
async fn acknowledged(stack: &Stack) -> Result<(u64, u64), String> {
    let stream = stack.bus.stream_info(EVALUATION_STREAM, PATIENCE).await;
    let consumer = stack
        .bus
        .consumer_info(EVALUATION_STREAM, "evaluate", PATIENCE)
        .await;
    let newest = stream.map_err(|error| error.to_string())?.state.last_sequence;
    let consumer = consumer.map_err(|error| error.to_string())?;
    Ok((newest, consumer.ack_floor.stream_sequence))
}

/// Whether a record was not acknowledged yet.
pub(super) async fn has_unacknowledged(stack: &Stack) -> bool {
    acknowledged(stack)
        .await
        .is_ok_and(|(newest, floor)| floor < newest)
}

/// Waits until all records were evaluated and acknowledged.
pub(super) async fn evaluated(stack: &Stack) {
    eventually("all records are acknowledged", PATIENCE, async || {
        let (newest, floor) = acknowledged(stack).await?;
        if floor == newest {
            Ok(())
        } else {
            Err(format!("{floor} of {newest}"))
        }
    })
    .await;
}

/// Writes the state of a VM into the inventory, as lifecycle-svc does.
pub(super) async fn set_state(stack: &Stack, vm: &str, state: MachineState) {
    let now = unix_millis();
    let hypervisor = InventoryHypervisor {
        reachable: true,
        late: false,
        listed_at_ms: Some(now),
        interval_ms: 5000,
        keep_ms: None,
    };
    let listed = InventoryVm {
        name: format!("name-of-{vm}"),
        state,
        labels: BTreeMap::from([("os".to_owned(), "debian".to_owned())]),
        refused: vmwatch_api::actions::Refused::default(),
        changed_at_ms: now,
    };
    let key = InventoryKey::Vm("lab", vm.parse().unwrap()).to_string();
    let own = InventoryKey::Hypervisor("lab").to_string();
    let bucket = stack
        .bus
        .jetstream_for_tests()
        .get_key_value(INVENTORY_BUCKET)
        .await;
    let bucket = bucket.unwrap();
    let hypervisor = serde_json::to_vec(&hypervisor).unwrap();
    bucket.put(own, hypervisor.into()).await.unwrap();
    bucket
        .put(key, serde_json::to_vec(&listed).unwrap().into())
        .await
        .unwrap();
}

/// The operations that a stand-in for lifecycle-svc lists.
pub(super) type Operations = Arc<Mutex<Vec<Operation>>>;

/// Answers requests for operations, as lifecycle-svc does.
pub(super) async fn list_operations(stack: &Stack) -> Operations {
    let operations = Operations::default();
    let client = stack.bus.client_for_tests().clone();
    let mut requests = client
        .subscribe(OperationsList::INFO.full_subject())
        .await
        .unwrap();
    let listed = Arc::clone(&operations);
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let page = OperationPage {
                // Newest first, as from lifecycle-svc.
                operations: listed.lock().await.iter().rev().cloned().collect(),
                more: false,
            };
            let reply = serde_json::to_vec(&Envelope::success(page)).unwrap();
            client
                .publish(request.reply.unwrap(), reply.into())
                .await
                .unwrap();
        }
    });
    operations
}

/// A successful operation on a VM, which ended now.
pub(super) fn succeeded(vm: &str, verb: &str, machine: &str) -> Operation {
    operation(vm, verb, "succeeded", &json!(machine))
}

/// An operation on a VM, which ended now.
pub(super) fn operation(vm: &str, verb: &str, state: &str, machine: &Value) -> Operation {
    let now = unix_millis();
    let operation = json!({
        "id": format!("{now:032x}"), "verb": verb, "instance_id": vm, "user": "ann", "request_id": "1",
        "requested_at_ms": now, "deadline_ms": now, "finished_at_ms": now, "state": state, "machine": machine, "history": [],
    });
    serde_json::from_value(operation).unwrap()
}

/// Stores that the samples of VMs arrived at this time, and that vmwatch has received samples until now.
pub(super) async fn arrived(stack: &Stack, vms: &[String], arrived_ms: u64) {
    let signed = |number: u64| i64::try_from(number).unwrap();
    let database = stack.database.handle();
    for vm in vms {
        let progress = doc! { "_id": vm, "newest_ms": signed(arrived_ms), "arrived_ms": signed(arrived_ms) };
        database
            .collection("alert_progress")
            .insert_one(progress)
            .await
            .unwrap();
    }
    let standstills = json!({ "intervals": [], "checked_ms": unix_millis() }).to_string();
    let state = doc! { "_id": "engine", "standstills": standstills, "saved_sequence": 0_i64 };
    let states = database.collection::<Document>("alert_state");
    states
        .replace_one(doc! { "_id": "engine" }, state)
        .upsert(true)
        .await
        .unwrap();
}
