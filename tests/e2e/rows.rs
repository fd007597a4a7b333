//! Rows in the database: those that an older reporter wrote into flat collections, and those that vmwatch stored in
//! blocks.

use futures::TryStreamExt;
use mongodb::{
    Collection,
    bson::{Bson, DateTime, Document, doc, oid::ObjectId},
};
use testkit::{Database, Stack};
use vmwatch_blocks::{Block, Limits, MAX_ROWS, Value};

/// The documents of all blocks.
pub(crate) fn blocks(database: &Database) -> Collection<Document> {
    database.handle().collection("blocks")
}

/// Returns the VM rows in all blocks, each as often as it is stored.
pub(crate) async fn stored_vms(database: &Database) -> Vec<Document> {
    stored_rows(database, doc! { "kind": "vm" }).await.unwrap()
}

/// Returns the process rows in all blocks, each as often as it is stored.
pub(crate) async fn stored_processes(database: &Database) -> Vec<Document> {
    stored_rows(database, doc! { "kind": "process" }).await.unwrap()
}

/// Returns the rows in the blocks that match a filter. The internal date of a row, `sampled_at`, is its effective date.
pub(crate) async fn stored_rows(
    database: &Database,
    filter: Document,
) -> mongodb::error::Result<Vec<Document>> {
    let documents: Vec<Document> = blocks(database).find(filter).await?.try_collect().await?;
    let mut rows = Vec::new();
    for document in documents {
        let expected = usize::try_from(document.get_i32("rows").unwrap()).unwrap();
        let before = rows.len();
        decode(&document, &mut rows);
        assert_eq!(rows.len() - before, expected, "{document}");
    }
    Ok(rows)
}

fn decode(document: &Document, rows: &mut Vec<Document>) {
    let instance = document.get_str("instance_id").unwrap();
    let limits = Limits {
        rows: MAX_ROWS,
        bytes: 1 << 30,
    };
    let mut block = Block::open(document.get_binary_generic("data").unwrap(), limits).unwrap();
    let names: Vec<String> = block.names().map(str::to_owned).collect();
    let columns: Vec<_> = names
        .iter()
        .map(|name| (name, block.column(name).unwrap()))
        .collect();
    let ids = block.ids(instance).unwrap();
    for row in 0..block.len() {
        let mut decoded = doc! {
            "_id": ObjectId::from_bytes(ids.get(row)),
            "instance_id": instance,
            "create_date": block.create_date(row),
            "sampled_at": DateTime::from_millis(block.effective(row).div_euclid(1000)),
        };
        for (name, column) in &columns {
            let value = match column.get(row) {
                Value::Missing => continue,
                Value::Null => Bson::Null,
                Value::Bool(truth) => Bson::Boolean(truth),
                Value::Int32(number) => Bson::Int32(number),
                Value::Int64(number) => Bson::Int64(number),
                Value::Double(number) => Bson::Double(number),
                Value::Text(text) => Bson::String(text.to_owned()),
            };
            decoded.insert(name.as_str(), value);
        }
        rows.push(decoded);
    }
}

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
