//! Flat rows that were written into blocks: which of them are in readable blocks, and their deletion.

use std::collections::HashSet;

use bson::{DateTime, RawBsonRef, RawDocument, doc};
use vmwatch_api::InstanceId;
use vmwatch_blocks::{Block, BlockError, Limits, MAX_ROWS, RowId};

use crate::{
    MetricsError,
    blocks::{StoredBlock, hour_of},
    reads::MAX_DECODED,
    store::{RowKind, RowStore},
};

/// Number of rows that one database command deletes.
const BATCH: usize = 5000;
/// Number of blocks that the database returns together.
const BLOCKS: u32 = 8;

/// Consecutive flat rows of one VM that were written into blocks.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) kind: RowKind,
    pub(super) instance: InstanceId,
    /// `create_date` of the first and the last row.
    pub(super) dates: (String, String),
    /// Effective date of the first and the last row, Unix microseconds.
    pub(super) time: (i64, i64),
    /// Number of rows between them that were not written into blocks.
    pub(super) skipped: u64,
}

/// What became of the flat rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deleted {
    pub(super) rows: u64,
    /// Number of rows that stay flat, because they are in no readable block.
    pub(super) unread: u64,
}

impl Written {
    /// Deletes the flat rows that can be read from blocks.
    pub(super) async fn delete_flat(&self, store: &RowStore) -> Result<Deleted, MetricsError> {
        let readable = self.readable(store).await?;
        let Some(flat) = store.collection(self.kind) else {
            return Ok(Deleted { rows: 0, unread: 0 });
        };
        let (first, last) = &self.dates;
        let mut found = flat
            .find(doc! { "instance_id": self.instance.as_str(), "create_date": { "$gte": first, "$lte": last } })
            .projection(doc! { "_id": 1 })
            .batch_size(10_000)
            .await?;
        let (mut ids, mut others) = (Vec::new(), 0);
        while found.advance().await? {
            match found.current().get("_id")?.and_then(RawBsonRef::as_object_id) {
                Some(id) if readable.contains(&id.bytes()) => ids.push(id),
                _ => others += 1,
            }
        }
        let mut rows = 0;
        for ids in ids.chunks(BATCH) {
            let deleted = flat.delete_many(doc! { "_id": { "$in": ids } }).await?;
            rows += deleted.deleted_count;
        }
        Ok(Deleted {
            rows,
            unread: u64::saturating_sub(others, self.skipped),
        })
    }

    /// The `_id`s of the VM's rows of this time that can be read from blocks.
    async fn readable(&self, store: &RowStore) -> Result<HashSet<RowId>, MetricsError> {
        let millis = |micros: i64| DateTime::from_millis(micros.div_euclid(1000));
        let (first, last) = self.time;
        let mut blocks = store
            .blocks()
            .find(doc! {
                "instance_id": self.instance.as_str(),
                "kind": self.kind.name(),
                "from": { "$gte": millis(hour_of(first)), "$lte": millis(last) },
            })
            .projection(doc! { "from": 1, "to": 1, "data": 1 })
            .sort(doc! { "from": 1 })
            .batch_size(BLOCKS)
            .await?;
        let mut readable = HashSet::new();
        while blocks.advance().await? {
            // The rows of an unreadable block stay flat, unless another block has them.
            if let Ok(ids) = self.ids(blocks.current()) {
                readable.extend(ids);
            }
        }
        Ok(readable)
    }

    /// The `_id`s of the rows of this time in a block whose columns can all be read.
    fn ids(&self, document: &RawDocument) -> Result<Vec<RowId>, BlockError> {
        let stored = StoredBlock::from_document(document).ok_or(BlockError::Corrupt("a field is missing"))?;
        let (first, last) = self.time;
        if stored.to < first {
            return Ok(Vec::new());
        }
        let limits = Limits {
            rows: MAX_ROWS,
            bytes: MAX_DECODED,
        };
        let mut block = Block::open(stored.data, limits)?;
        let names: Vec<&str> = block.names().collect();
        for name in names {
            block.column(name)?;
        }
        let ids = block.ids(self.instance.as_str())?;
        let rows = block.rows_within(first..last.saturating_add(1));
        Ok(rows.into_iter().map(|row| ids.get(row)).collect())
    }
}
