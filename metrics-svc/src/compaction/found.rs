//! What is stored of one VM, one kind and one hour.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use bson::{Bson, DateTime, Document, RawDocument, RawDocumentBuf, doc};
use metrics::counter;
use mongodb::Cursor;
use tracing::warn;
use vmwatch_blocks::{Block, BlockError, Limits, MAX_ROWS, RowId};

use crate::{
    MetricsError,
    blocks::{AHEAD, VmHour},
    database::find,
    reads::MAX_DECODED,
    store::{RowKind, RowStore},
};

/// Maximum number of blocks, rows and bytes that are merged or deleted together, besides the newest generation.
const BATCH_BLOCKS: usize = 4096;
const BATCH_ROWS: usize = 262_144;
const BATCH_BYTES: usize = 4 << 20;
/// Time limit of a query.
const QUERY_LIMIT: Duration = Duration::from_secs(30);
/// How much of a block is decoded.
pub(super) const LIMITS: Limits = Limits {
    rows: MAX_ROWS,
    bytes: MAX_DECODED,
};

/// The rows of one VM and one kind in one hour.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Group {
    pub(super) kind: RowKind,
    pub(super) of: VmHour,
}

/// A block of level 1, without its rows.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) id: String,
    pub(super) generation: i64,
    pub(super) number: i32,
    pub(super) parts: i32,
    pub(super) rows: usize,
    pub(super) expires: Option<DateTime>,
    /// Whether its sources existed after it was stored.
    pub(super) confirmed: bool,
}

/// The blocks of level 1 of a group, by generation.
#[derive(Debug, Default)]
pub(super) struct Generations(BTreeMap<i64, Vec<Part>>);

/// A block with its bytes.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) id: Bson,
    pub(super) is_level1: bool,
    pub(super) rows: usize,
    pub(super) expires: DateTime,
    pub(super) data: Vec<u8>,
}

/// Blocks to merge or delete, and whether there are more of them.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) sources: Vec<Source>,
    pub(super) more: bool,
    rows: usize,
    bytes: usize,
}

impl Group {
    /// The beginning of the `_id`s of the group's blocks of level 1; `None` if the hour has no such `_id`.
    fn prefix(&self) -> Option<String> {
        let (kind, instance, hour) = (self.kind.name(), &self.of.instance, self.of.hour_text()?);
        Some(format!("{kind}/{instance}/{hour}"))
    }

    /// The `_id` of a block of level 1.
    pub(super) fn id(&self, generation: i64, part: usize) -> Option<String> {
        Some(format!("{}/{generation:010}/{part:05}", self.prefix()?))
    }

    fn blocks(&self) -> Document {
        let date = |micros: i64| DateTime::from_millis(micros.div_euclid(1000));
        doc! {
            "instance_id": &self.of.instance,
            "kind": self.kind.name(),
            "from": { "$gte": date(self.of.hour), "$lt": date(self.of.end()) },
        }
    }

    /// Reads the blocks of level 1, without their rows.
    pub(super) async fn generations(&self, store: &RowStore) -> Result<Generations, MetricsError> {
        let mut generations = Generations::default();
        let Some(prefix) = self.prefix() else {
            return Ok(generations);
        };
        // The character `0` follows the character `/`.
        let query = store
            .blocks()
            .find(doc! { "_id": { "$gte": format!("{prefix}/"), "$lt": format!("{prefix}0") } })
            .projection(doc! { "data": 0 })
            .max_time(QUERY_LIMIT);
        let mut cursor = find(store.blocks(), query).await?;
        while cursor.advance().await? {
            if let Some(part) = Part::from_document(cursor.current()) {
                generations.0.entry(part.generation).or_default().push(part);
            }
        }
        Ok(generations)
    }

    /// Opens a cursor over all blocks of the group.
    pub(super) async fn open(&self, store: &RowStore) -> Result<Cursor<RawDocumentBuf>, MetricsError> {
        // Blocks of level 1 begin with the hour, so they mostly come last.
        let query = store
            .blocks()
            .find(self.blocks())
            .sort(doc! { "from": -1 })
            .batch_size(32)
            .max_time(QUERY_LIMIT);
        find(store.blocks(), query).await
    }

    /// Reads blocks that are not part of the generation `current`: first those of level 1, then those of level 0.
    pub(super) async fn others(
        &self,
        store: &RowStore,
        generations: &Generations,
        current: Option<i64>,
    ) -> Result<Batch, MetricsError> {
        let mut batch = Batch::default();
        for part in generations.0.values().flatten() {
            if Some(part.generation) == current {
                continue;
            }
            if batch.is_full() {
                batch.more = true;
                return Ok(batch);
            }
            batch.push(part.read(store).await?);
        }
        let mut cursor = self.open(store).await?;
        while cursor.advance().await? {
            let document = cursor.current();
            if !document.get_i32("level").is_ok_and(|level| level == 0) {
                continue;
            }
            if batch.is_full() {
                batch.more = true;
                break;
            }
            batch.push(Source::from_document(document));
        }
        Ok(batch)
    }

    /// Returns the `_id`s of all blocks of the group, as bytes.
    pub(super) async fn ids(&self, store: &RowStore) -> Result<HashSet<Vec<u8>>, MetricsError> {
        let query = store
            .blocks()
            .find(self.blocks())
            .projection(doc! { "_id": 1 })
            .max_time(QUERY_LIMIT);
        let mut cursor = find(store.blocks(), query).await?;
        let mut ids = HashSet::new();
        while cursor.advance().await? {
            let id = cursor.current().get("_id")?.map(Bson::try_from).transpose()?;
            ids.extend(id.map(|id| id_bytes(&id)));
        }
        Ok(ids)
    }
}

/// The bytes of a block's `_id`.
pub(super) fn id_bytes(id: &Bson) -> Vec<u8> {
    match id {
        Bson::Binary(binary) => binary.bytes.clone(),
        Bson::String(text) => text.clone().into_bytes(),
        _ => Vec::new(),
    }
}

impl Part {
    fn from_document(document: &RawDocument) -> Option<Self> {
        Some(Self {
            id: document.get_str("_id").ok()?.to_owned(),
            generation: document.get_i64("generation").ok()?,
            number: document.get_i32("part").ok()?,
            parts: document.get_i32("parts").ok()?,
            rows: usize::try_from(document.get_i32("rows").ok()?).ok()?,
            expires: document.get_datetime("expires").ok(),
            confirmed: document.get("unconfirmed").ok()?.is_none(),
        })
    }

    /// Reads the block; `None` if it was deleted meanwhile.
    pub(super) async fn read(&self, store: &RowStore) -> Result<Option<Source>, MetricsError> {
        let query = store.blocks().find_one(doc! { "_id": &self.id });
        let document = find(store.blocks(), query.max_time(QUERY_LIMIT)).await?;
        Ok(document.and_then(|document| Source::from_document(&document)))
    }
}

impl Generations {
    /// The highest number of a generation; 0 if there is none.
    pub(super) fn highest(&self) -> i64 {
        self.0.keys().next_back().copied().unwrap_or(0)
    }

    /// The parts of a generation, in their order.
    pub(super) fn parts(&self, generation: i64) -> Vec<Part> {
        let mut parts = self.0.get(&generation).cloned().unwrap_or_default();
        parts.sort_unstable_by_key(|part| part.number);
        parts
    }

    /// Whether all parts of a generation are stored.
    pub(super) fn is_complete(&self, generation: i64) -> bool {
        let parts = self.parts(generation);
        let numbered = (0..).zip(&parts).all(|(number, part)| part.number == number);
        let count = i32::try_from(parts.len()).unwrap_or(0);
        count > 0 && numbered && parts.iter().all(|part| part.parts == count)
    }

    /// The highest generation that is complete and confirmed. Its rows are those of all blocks that were merged.
    pub(super) fn current(&self) -> Option<i64> {
        let confirmed = |parts: &[Part]| parts.iter().all(|part| part.confirmed);
        let mut newest_first = self.0.iter().rev();
        newest_first
            .find(|(generation, parts)| self.is_complete(**generation) && confirmed(parts))
            .map(|(generation, _)| *generation)
    }
}

impl Source {
    /// Decodes a document; `None` if compaction leaves the block as it is. Blocks of undated rows never expire, blocks with
    /// the field `ahead` must stay findable by it, and readers report blocks that lack a field.
    fn from_document(document: &RawDocument) -> Option<Self> {
        let is_ahead = document.get(AHEAD).ok()?.is_some();
        let is_dated = document.get_datetime("expires").is_ok();
        Self::of_any(document).filter(|_| is_dated && !is_ahead)
    }

    /// Decodes any block.
    pub(super) fn of_any(document: &RawDocument) -> Option<Self> {
        Some(Self {
            id: Bson::try_from(document.get("_id").ok()??).ok()?,
            is_level1: document.get_i32("level").ok()? != 0,
            rows: usize::try_from(document.get_i32("rows").ok()?).ok()?,
            expires: document.get_datetime("expires").unwrap_or(DateTime::MAX),
            data: document.get_binary("data").ok()?.bytes.to_vec(),
        })
    }

    /// The `_id` and effective date of each row.
    pub(super) fn ids(&self, instance: &str) -> Result<Vec<(RowId, i64)>, BlockError> {
        let mut block = Block::open(&self.data, LIMITS)?;
        let ids = block.ids(instance)?;
        Ok((0..block.len())
            .map(|row| (ids.get(row), block.effective(row)))
            .collect())
    }

    /// Counts and logs a block that cannot be read, and is therefore left as it is.
    pub(super) fn note_unreadable(&self, group: &Group, error: BlockError) {
        counter!("vmwatch_compaction_blocks_unreadable_total").increment(1);
        warn!(
            instance_id = group.of.instance, kind = group.kind.name(), block = ?self.id, %error,
            "a block of stored rows is unreadable; compaction leaves it as it is"
        );
    }
}

impl Batch {
    fn push(&mut self, source: Option<Source>) {
        if let Some(source) = source {
            self.rows += source.rows;
            self.bytes += source.data.len();
            self.sources.push(source);
        }
    }

    const fn is_full(&self) -> bool {
        self.sources.len() >= BATCH_BLOCKS || self.rows >= BATCH_ROWS || self.bytes >= BATCH_BYTES
    }
}
