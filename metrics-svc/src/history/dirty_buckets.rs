//! Collection of dirty buckets: five-minute time buckets of VMs with stored rows that the rollups, or the names of
//! processes, do not contain yet. Each batch of rows adds an entry for every time bucket that it touches.
//!
//! An entry is written concurrently with its rows, so that ingestion does not take longer. The entry names the rows,
//! and it is removed once all of them were read from the database and counted in the rollups. So after a crash at any
//! point, each stored row is named by an entry or counted in the rollups. A batch that was not acknowledged is written
//! again, with its entries.
//!
//! Of process rows, an entry names one row of each part, because the rows of a part are stored in one block, and the time
//! range of the samples.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    ops::Range,
    time::{Duration, SystemTime},
};

use bson::{Bson, DateTime, Document, RawBsonRef, RawDocument, RawDocumentBuf, doc, oid::ObjectId};
use futures::TryStreamExt;
use mongodb::{Collection, options::InsertManyOptions};
use vmwatch_api::{InstanceId, history::Resolution};

use super::rollups::Bucket;
use crate::{
    MetricsError,
    documents::{Documents, SAMPLED_AT},
    store::{DIRTY_BUCKETS, RowKind, RowStore},
    time_buckets::{bucket_start, width_ms},
};

/// Maximum number of entries that are read together; they take about 6 MB. The more entries a time bucket has among them,
/// the fewer times it is recomputed.
pub(super) const MAX_READ: usize = 20_000;
/// Age after which an entry is dropped even if some of its rows were not found, because the database refused the rows or
/// they expired.
pub(crate) const MAX_AGE: Duration = Duration::from_hours(1);
/// If a guest's clock is ahead, the parts of one sample have different effective dates. They arrive within this time.
const PARTS_MILLIS: i64 = 60_000;

/// The collection of dirty buckets.
pub(crate) struct DirtyBuckets {
    entries: Collection<RawDocumentBuf>,
    /// The kind of rows from which rollups are computed.
    kind: RowKind,
    offset_ms: i64,
}

/// An entry of the collection: a dirty bucket, and the rows that its rollup and the process names must contain.
#[derive(Debug)]
pub(crate) struct DirtyBucket {
    /// Id of the entry in the collection of dirty buckets.
    pub(crate) id: ObjectId,
    /// The time bucket whose rollup must be recomputed.
    pub(crate) bucket: Bucket,
    /// Time at which the rows were stored, by the clock of the replica that stored them.
    pub(crate) at: SystemTime,
    /// Ids of the VM rows that the rollup must contain.
    pub(crate) rows: Vec<ObjectId>,
    /// Process rows that the names must contain.
    pub(crate) processes: Option<ProcessRows>,
}

/// Process rows whose names must be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessRows {
    /// Their effective dates, Unix microseconds.
    pub(crate) time: Range<i64>,
    /// The id of one row of each part.
    pub(crate) rows: Vec<ObjectId>,
}

/// What an entry will contain.
#[derive(Default)]
struct NewEntry {
    rows: Vec<Bson>,
    /// The first and the last effective date of process rows, Unix milliseconds.
    processes: Option<(i64, i64)>,
    process_rows: Vec<Bson>,
}

impl DirtyBuckets {
    /// Opens the collection of dirty buckets, which is in the same database as the rows.
    pub(crate) fn new(rows: &RowStore, kind: RowKind) -> Self {
        Self {
            entries: rows.beside(&kind.derived(DIRTY_BUCKETS)),
            kind,
            offset_ms: rows.offset().as_millis(),
        }
    }

    /// Adds entries for the time buckets of new rows.
    pub(crate) async fn add(&self, samples: &[Cow<'_, Documents>]) -> Result<(), MetricsError> {
        let mut touched: BTreeMap<(&str, u64), NewEntry> = BTreeMap::new();
        for documents in samples {
            for row in documents.of(self.kind) {
                let (bucket, _) = self.bucket(row)?;
                let entry = touched.entry(bucket).or_default();
                entry.rows.push(Bson::ObjectId(row.get_object_id("_id")?));
            }
            // All rows of a part have the same dates.
            let processes: &[_] = match self.kind {
                RowKind::Vm => &documents.processes,
                _ => &[],
            };
            if let Some(row) = processes.first() {
                let (bucket, at_ms) = self.bucket(row)?;
                let entry = touched.entry(bucket).or_default();
                let id = row.get_object_id("_id")?;
                let is_ahead = documents.arrival.map(|arrival| arrival.div_euclid(1000)) == Some(at_ms);
                entry.add_processes(at_ms, id, if is_ahead { PARTS_MILLIS } else { 0 });
            }
        }
        if touched.is_empty() {
            return Ok(());
        }
        let now = DateTime::now();
        let entries = touched.into_iter().map(|((instance, start), new)| {
            let start = DateTime::from_millis(i64::try_from(start).unwrap_or(i64::MAX));
            let mut entry = doc! { "instance_id": instance, "start": start, "at": now, "rows": new.rows };
            if let Some((from, to)) = new.processes {
                let (from, to) = (DateTime::from_millis(from), DateTime::from_millis(to));
                entry.insert(
                    "processes",
                    doc! { "from": from, "to": to, "rows": new.process_rows },
                );
            }
            entry
        });
        let unordered = InsertManyOptions::builder().ordered(false).build();
        let into = self.entries.clone_with_type::<Document>();
        into.insert_many(entries).with_options(unordered).await?;
        Ok(())
    }

    /// The VM and the start of the time bucket of a row, and the effective date of the row in Unix milliseconds.
    fn bucket<'a>(&self, row: &'a RawDocumentBuf) -> Result<((&'a str, u64), i64), MetricsError> {
        let at_ms = row.get_datetime(SAMPLED_AT)?.timestamp_millis();
        let at = u64::try_from(at_ms).unwrap_or(0);
        let start = bucket_start(at, width_ms(Resolution::FiveMinutes), self.offset_ms);
        Ok(((row.get_str("instance_id")?, start), at_ms))
    }

    /// Reads the oldest dirty buckets that come after the given entry.
    pub(crate) async fn read(&self, after: Option<ObjectId>) -> Result<Vec<DirtyBucket>, MetricsError> {
        let filter = after.map_or_else(Document::new, |id| doc! { "_id": { "$gt": id } });
        let limit = i64::try_from(MAX_READ).unwrap_or(i64::MAX);
        let found = self
            .entries
            .find(filter)
            .sort(doc! { "_id": 1 })
            .limit(limit)
            .await?;
        found
            .map_err(MetricsError::from)
            .try_filter_map(async |entry| DirtyBucket::from_document(&entry))
            .try_collect()
            .await
    }

    /// The collection of dirty buckets.
    pub(crate) const fn documents(&self) -> &Collection<RawDocumentBuf> {
        &self.entries
    }

    /// Removes dirty buckets from the collection by the ids of their entries.
    pub(crate) async fn remove(&self, ids: Vec<ObjectId>) -> Result<(), MetricsError> {
        if !ids.is_empty() {
            self.entries.delete_many(doc! { "_id": { "$in": ids } }).await?;
        }
        Ok(())
    }
}

impl DirtyBucket {
    /// Decodes a stored dirty bucket; `None` if it has no valid instance id.
    fn from_document(entry: &RawDocument) -> Result<Option<Self>, MetricsError> {
        // This service writes only valid ids, so an entry with an invalid id comes from another program and is skipped.
        let Ok(instance) = entry.get_str("instance_id")?.parse::<InstanceId>() else {
            return Ok(None);
        };
        let start = entry.get_datetime("start")?.timestamp_millis();
        let processes = match entry.get("processes")? {
            Some(RawBsonRef::Document(rows)) => Some(ProcessRows {
                time: rows.get_datetime("from")?.timestamp_millis().saturating_mul(1000)
                    ..rows
                        .get_datetime("to")?
                        .timestamp_millis()
                        .saturating_add(1)
                        .saturating_mul(1000),
                rows: row_ids(rows)?,
            }),
            _ => None,
        };
        Ok(Some(Self {
            id: entry.get_object_id("_id")?,
            bucket: Bucket {
                instance,
                start_ms: u64::try_from(start).unwrap_or(0),
            },
            at: entry.get_datetime("at")?.to_system_time(),
            rows: row_ids(entry)?,
            processes,
        }))
    }
}

impl NewEntry {
    /// Adds the process rows of a part; `spread` is by how many milliseconds the dates of the other parts may differ.
    fn add_processes(&mut self, at_ms: i64, id: ObjectId, spread: i64) {
        let (first, last) = self.processes.unwrap_or((at_ms, at_ms));
        self.processes = Some((first.min(at_ms - spread), last.max(at_ms + spread)));
        self.process_rows.push(Bson::ObjectId(id));
    }
}

fn row_ids(document: &RawDocument) -> Result<Vec<ObjectId>, MetricsError> {
    let rows = document
        .get_array("rows")?
        .into_iter()
        .filter_map(|row| match row {
            Ok(RawBsonRef::ObjectId(id)) => Some(id),
            _ => None,
        });
    Ok(rows.collect())
}
