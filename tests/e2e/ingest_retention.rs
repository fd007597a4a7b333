//! Tests the retention of rows: the database deletes rows that are older than the retention time, and a restart of
//! metrics-svc applies a changed retention time.

use futures::TryStreamExt;
use mongodb::bson::{Document, doc};
use testkit::{PATIENCE, Program, Stack, eventually};

use crate::{
    ingest_support::{Publisher, drained, stack},
    rows::{store_vms, stored_processes, stored_vms, vm_row},
};

/// Returns the retention time, in seconds, of each index of the collection that has a retention time.
async fn retention(stack: &Stack, collection: &str) -> Vec<u64> {
    let collection = stack.database.handle().collection::<Document>(collection);
    let indexes: Vec<_> = collection
        .list_indexes()
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    let kept = indexes
        .into_iter()
        .filter_map(|index| index.options?.expire_after);
    kept.map(|kept| kept.as_secs()).collect()
}

#[tokio::test]
async fn restart_of_metrics_svc_applies_changed_retention() {
    let stack = stack().start().await;
    let metrics = stack.replica(Program::Metrics, 0);
    // By default, MongoDB deletes expired rows once a minute; with this parameter, it deletes them once a second.
    let admin = doc! { "setParameter": 1, "ttlMonitorSleepSecs": 1 };
    let client = stack.database.handle().client().clone();
    client.database("admin").run_command(admin).await.unwrap();
    let mut publisher = Publisher::new(&stack, "vm-1", 5);
    publisher.publish_many(20).await;
    drained(&stack.bus).await;
    // This row lacks the internal date field by which rows expire, like the rows that older reporters wrote.
    store_vms(&stack, [vm_row("vm-1", "2017-01-01T21:37:59.001065", 95)]).await;
    assert_eq!(retention(&stack, "vm_samples").await, [30 * 86_400]);
    assert_eq!(retention(&stack, "blocks").await, [0]);
    assert_eq!(stored_vms(&stack.database).await.len(), 20);

    // The samples are ten minutes old. The changed retention applies to the rows that are stored from now on.
    metrics.process.set("VMWATCH_VM_RETENTION", "5m");
    metrics.process.kill9();
    metrics.restart().await;
    assert_eq!(retention(&stack, "vm_samples").await, [300]);
    assert_eq!(retention(&stack, "process_samples").await, [30 * 86_400]);
    publisher.publish_many(20).await;
    drained(&stack.bus).await;
    eventually(
        "the rows that are past their retention are deleted",
        3 * PATIENCE,
        async || {
            let stored = stored_vms(&stack.database).await.len();
            (stored == 20).then_some(()).ok_or(format!("{stored}"))
        },
    )
    .await;
    assert_eq!(stored_processes(&stack.database).await.len(), 200);
    let old = stack.database.handle().collection::<Document>("vm_samples");
    assert_eq!(old.count_documents(doc! {}).await.unwrap(), 1);
}
