//! Finds rows that were stored before with another effective date.
//!
//! The effective date of a row whose `create_date` is ahead is its arrival. If it arrives twice, in two messages, it
//! therefore has two effective dates, of which the first counts. A block of such rows has the field `ahead`, by which
//! the rows are found when they arrive again. Rows that are at most a minute ahead are not searched for: readers drop
//! rows with the same `_id`.

use std::collections::HashSet;

use bson::{RawDocumentBuf, doc};
use metrics::counter;
use vmwatch_blocks::{Block, BlockError, Limits, MAX_ROWS, RowId};

use crate::{
    MetricsError,
    blocks::{AHEAD, StoredBlock},
    documents::Documents,
    store::{RowKind, RowStore},
};

/// Maximum number of blocks that are searched. A sample has far fewer parts; only a guest that sends many samples with the
/// same date has more, and then some of its rows may be stored twice.
const MAX_BLOCKS: i64 = 256;
/// Maximum number of bytes that one block takes in memory while it is searched.
const BLOCK_BYTES: usize = 64 << 20;

/// Returns the documents without the rows that are stored already.
pub(super) async fn new_rows(store: &RowStore, documents: &Documents) -> Result<Documents, MetricsError> {
    let mut new = documents.clone();
    for (kind, rows) in new.each_mut() {
        let stored = stored(store, kind, rows).await?;
        let before = rows.len();
        rows.retain(|row| id(row).is_none_or(|id| !stored.contains(&id)));
        counter!("vmwatch_rows_stored_before_total").increment((before - rows.len()) as u64);
    }
    Ok(new)
}

fn id(row: &RawDocumentBuf) -> Option<RowId> {
    row.get_object_id("_id").ok().map(|id| id.bytes())
}

/// The value of the field [`AHEAD`] of a block with this row.
pub(super) fn ahead_key(kind: RowKind, row: &RawDocumentBuf) -> Result<String, MetricsError> {
    let (instance, date) = (row.get_str("instance_id")?, row.get_str("create_date")?);
    Ok(format!("{}/{instance}/{date}", kind.name()))
}

/// Returns the ids of the stored rows that have the VM and the date of these rows.
async fn stored(
    store: &RowStore,
    kind: RowKind,
    rows: &[RawDocumentBuf],
) -> Result<HashSet<RowId>, MetricsError> {
    let mut found = HashSet::new();
    let Some(first) = rows.first() else {
        return Ok(found);
    };
    let key = ahead_key(kind, first)?;
    let (instance, date) = (first.get_str("instance_id")?, first.get_str("create_date")?);
    let mut cursor = store
        .blocks()
        .find(doc! { AHEAD: key })
        .projection(doc! { "from": 1, "to": 1, "data": 1 })
        .limit(MAX_BLOCKS)
        .batch_size(32)
        .await?;
    while cursor.advance().await? {
        // A reader of the block reports it if it is unreadable.
        let Some(stored) = StoredBlock::from_document(cursor.current()) else {
            continue;
        };
        if let Ok(ids) = ids_of_date(stored.data, instance, date) {
            found.extend(ids);
        }
    }
    Ok(found)
}

fn ids_of_date(block: &[u8], instance: &str, date: &str) -> Result<Vec<RowId>, BlockError> {
    let limits = Limits {
        rows: MAX_ROWS,
        bytes: BLOCK_BYTES,
    };
    let mut block = Block::open(block, limits)?;
    let rows = block.rows_dated(date);
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let ids = block.ids(instance)?;
    Ok(rows.into_iter().map(|row| ids.get(row)).collect())
}
