//! The list of VMs, which metrics-svc and lifecycle-svc answer from memory.
//!
//! ```text
//! KV bucket of the inventory ──> inventory ─┐
//! KV bucket of labels ─────────> labels ────┼─> list: scope, filter, order, page
//! newest rows (metrics-svc) ───> rows ──────┘
//! ```
//!
//! There are two tables of rows, those of agents and those of hypervisors. All tables are sorted by the id of the VM, so that a request merges them in one pass, without copies of rows
//! that are not on the page.

mod inventory;
mod labels;
mod list;
mod over_limit;
mod rows;
mod senders;
mod statuses;
mod unstored;

use async_nats::jetstream::kv::{Entry, Operation};
use metrics::counter;
use serde::de::DeserializeOwned;
use tracing::warn;

pub use self::{
    inventory::{InventoryTable, VmCopy},
    labels::LabelTable,
    list::{Measures, Vms},
    rows::{MAX_ROWS, Row, Rows},
    statuses::StatusTable,
};

/// Decodes a record of a KV bucket; `None` if it was deleted or cannot be decoded.
fn decode<T: DeserializeOwned>(entry: &Entry, bucket: &'static str) -> Option<T> {
    if entry.operation != Operation::Put {
        return None;
    }
    serde_json::from_slice(&entry.value)
        .inspect_err(|error| {
            counter!("vmwatch_broken_records_total", "bucket" => bucket).increment(1);
            warn!(%error, bucket, key = entry.key, "a record of a KV bucket could not be decoded");
        })
        .ok()
}
