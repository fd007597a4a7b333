//! Tests `VMWATCH_RETENTION_RULES`: the labels of a VM determine how long its rows are kept.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use mongodb::bson::doc;
use testkit::{MACHINES, PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    Principal, Role, Scope,
    labels::{LabelsChange, LabelsGet, LabelsSet},
    lifecycle::Target,
};
use vmwatch_bus::Context;

use crate::{
    ingest_support::{Publisher, drained, stack},
    rows::blocks,
};

const DAY_MS: i64 = 86_400_000;

/// The number of blocks of a VM and kind by their retention in days.
async fn retention(stack: &Stack, instance: &str, kind: &str) -> BTreeMap<i64, usize> {
    let filter = doc! { "instance_id": instance, "kind": kind };
    let found = blocks(&stack.database).find(filter).await.unwrap();
    let documents: Vec<_> = found.try_collect().await.unwrap();
    let mut counts = BTreeMap::new();
    for document in documents {
        let millis = |key| document.get_datetime(key).unwrap().timestamp_millis();
        *counts
            .entry((millis("expires") - millis("to")) / DAY_MS)
            .or_default() += 1;
    }
    counts
}

/// Sets the only label of a VM.
async fn set_label(stack: &Stack, instance: &str, key: &str, value: &str) {
    let principal = Principal {
        user: "test".to_owned(),
        role: Role::Operator,
        scope: Scope::All,
    };
    let context = Context::new(PATIENCE).as_principal(principal);
    let instance_id = instance.parse().unwrap();
    let target = Target { instance_id };
    let revision = stack
        .bus
        .call::<LabelsGet>(&context, &target)
        .await
        .unwrap()
        .revision;
    let labels = BTreeMap::from([(key.to_owned(), value.to_owned())]);
    let change = LabelsChange {
        instance_id: target.instance_id,
        labels: labels.try_into().unwrap(),
        revision,
    };
    stack.bus.call::<LabelsSet>(&context, &change).await.unwrap();
}

/// Publishes samples until the rows of a VM are kept for these times in days: those of the VM and those of its processes.
async fn kept_for(stack: &Stack, publisher: &mut Publisher, instance: &str, vm: i64, process: i64) {
    let what = format!("rows of {instance} are kept for {vm} days, those of its processes for {process}");
    eventually(&what, PATIENCE, async || {
        publisher.publish().await;
        drained(&stack.bus).await;
        let (vms, processes) = (
            retention(stack, instance, "vm").await,
            retention(stack, instance, "process").await,
        );
        let is_applied = vms.contains_key(&vm) && processes.contains_key(&process);
        is_applied
            .then_some(())
            .ok_or_else(|| format!("VM: {vms:?}, processes: {processes:?}"))
    })
    .await;
}

#[tokio::test]
async fn label_of_vm_determines_retention_of_rows_written_from_then_on() {
    let rules = "env=prod:365d, env=test:process:7d, hv/title=Ledger:90d";
    let stack = stack()
        .replicas(Program::Lifecycle, 1)
        .set(Program::Metrics, "VMWATCH_RETENTION_RULES", rules)
        .start()
        .await;
    let mut publisher = Publisher::new(&stack, "vm-1", 2);
    kept_for(&stack, &mut publisher, "vm-1", 30, 30).await;
    set_label(&stack, "vm-1", "env", "prod").await;
    kept_for(&stack, &mut publisher, "vm-1", 365, 365).await;

    // Blocks that are written already keep their retention.
    let before = retention(&stack, "vm-1", "process").await;
    set_label(&stack, "vm-1", "env", "test").await;
    kept_for(&stack, &mut publisher, "vm-1", 30, 7).await;
    let after = retention(&stack, "vm-1", "process").await;
    assert!(
        after[&365] >= before[&365] && after[&30] == before[&30],
        "{before:?} {after:?}"
    );
    let of_vm: Vec<_> = retention(&stack, "vm-1", "vm").await.into_keys().collect();
    assert_eq!(of_vm, [30, 365]);

    // The label of a hypervisor, and a VM that matches two rules: the first of them applies.
    let [(ledger, _), ..] = MACHINES;
    let mut publisher = Publisher::new(&stack, ledger, 1);
    kept_for(&stack, &mut publisher, ledger, 90, 90).await;
    set_label(&stack, ledger, "env", "test").await;
    kept_for(&stack, &mut publisher, ledger, 90, 7).await;

    // An invalid rule is refused at the start.
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.terminate(PATIENCE).await;
    metrics
        .process
        .set("VMWATCH_RETENTION_RULES", "env=prod:365d,env=test");
    metrics.process.start_again();
    let ended = eventually("metrics-svc refuses to start", PATIENCE, async || {
        metrics.process.ended().ok_or("it is running".to_owned())
    })
    .await;
    assert_eq!(ended.code(), Some(64));
    let log = metrics.process.log();
    let refusal = "VMWATCH_RETENTION_RULES: `env=prod:365d,env=test` is invalid: the rule `env=test` must be";
    assert!(log.contains(refusal), "{log}");
}

/// While the labels are unknown, no row expires earlier than its VM's labels may require.
#[tokio::test]
async fn longest_retention_applies_while_labels_are_unknown() {
    // The KV bucket of labels does not exist, because lifecycle-svc has never run.
    let stack = stack()
        .set(
            Program::Metrics,
            "VMWATCH_RETENTION_RULES",
            "env=prod:365d,env=test:vm:7d",
        )
        .start()
        .await;
    let mut publisher = Publisher::new(&stack, "vm-1", 1);
    kept_for(&stack, &mut publisher, "vm-1", 365, 365).await;
    let log = stack.replica(Program::Metrics, 0).process.log();
    assert!(log.contains("the labels of VMs have not been read yet"), "{log}");
}
