//! Rows as an older reporter wrote them into the database.

use mongodb::bson::{Document, doc, oid::ObjectId};
use testkit::Stack;

/// Returns a VM row. Rows of the same date differ in `_id`; tests identify a row by its `proc`.
pub(crate) fn vm_row(instance: &str, create_date: &str, proc: i32) -> Document {
    doc! {
        "_id": ObjectId::new(), "instance_id": instance, "create_date": create_date, "proc": proc,
        "net_incoming": 0.6, "net_outgoing": 5.7, "disk_read": 0.0, "disk_write": 128.8, "mem": 8.6, "cpu_util": 0.0,
    }
}

/// Returns a process row.
pub(crate) fn process_row(instance: &str, create_date: &str, cmd: &str, pid: i32) -> Document {
    doc! {
        "_id": ObjectId::new(), "instance_id": instance, "create_date": create_date, "cmd": cmd, "pid": pid,
        "net_incoming": 0.6, "net_outgoing": 5.7, "disk_read": 0.0, "disk_write": 0.0, "mem": 0.1, "cpu_util": 0.0,
        "running_time": 1_482_236_516.07, "shutdown_time": null,
    }
}

/// Writes VM rows directly into the database.
pub(crate) async fn store_vms(stack: &Stack, rows: impl IntoIterator<Item = Document>) {
    stack
        .database
        .handle()
        .collection("vm_samples")
        .insert_many(rows)
        .await
        .unwrap();
}

/// Writes process rows directly into the database.
pub(crate) async fn store_processes(stack: &Stack, rows: impl IntoIterator<Item = Document>) {
    stack
        .database
        .handle()
        .collection("process_samples")
        .insert_many(rows)
        .await
        .unwrap();
}
