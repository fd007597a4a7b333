//! Collection of dirty buckets: five-minute time buckets of VMs with stored rows that the rollups do not contain yet.
//! Each batch of rows adds an entry for every time bucket that it touches.
//!
//! An entry is written concurrently with its rows, so that ingestion does not take longer. The entry names the rows,
//! and it is removed once all of them were read from the database and counted in the rollups. So after a crash at any
//! point, each stored row is named by an entry or counted in the rollups. A batch that was not acknowledged is written
//! again, with its entries.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use bson::{Bson, DateTime, Document, RawBsonRef, RawDocument, RawDocumentBuf, doc, oid::ObjectId};
use futures::TryStreamExt;
use mongodb::{Collection, options::InsertManyOptions};
use vmwatch_api::{InstanceId, history::Resolution};

use super::rollups::Bucket;
use crate::{
    MetricsError,
    documents::SAMPLED_AT,
    store::RowStore,
    time_buckets::{bucket_start, width_ms},
};

/// Number of dirty buckets that are processed together; the rows of all their time buckets are in memory meanwhile.
pub(crate) const CHUNK: usize = 250;
/// Age after which an entry is dropped even if some of its rows never appeared, because the database refused the rows
/// or they expired.
pub(crate) const MAX_AGE: Duration = Duration::from_hours(1);

/// The collection of dirty buckets.
pub(crate) struct DirtyBuckets {
    dirty_buckets: Collection<RawDocumentBuf>,
    offset_ms: i64,
}

/// An entry of the collection: a dirty bucket, and rows that its rollup must contain.
#[derive(Debug)]
pub(crate) struct DirtyBucket {
    /// Id of the entry in the collection of dirty buckets.
    pub(crate) id: ObjectId,
    /// The time bucket whose rollup must be recomputed.
    pub(crate) bucket: Bucket,
    /// Time at which the rows were stored, by the clock of the replica that stored them.
    pub(crate) at: SystemTime,
    /// Ids of the rows that the rollup must contain.
    pub(crate) rows: Vec<ObjectId>,
}

impl DirtyBuckets {
    /// Opens the collection of dirty buckets, which is in the same database as the rows.
    pub(crate) fn new(rows: &RowStore) -> Self {
        Self {
            dirty_buckets: rows.beside("dirty_buckets"),
            offset_ms: rows.offset().as_millis(),
        }
    }

    /// Adds entries for the time buckets of new VM rows.
    pub(crate) async fn add(&self, vms: &[&RawDocumentBuf]) -> Result<(), MetricsError> {
        let mut touched: BTreeMap<(&str, u64), Vec<Bson>> = BTreeMap::new();
        for row in vms {
            let at = row.get_datetime(SAMPLED_AT)?.timestamp_millis();
            let at = u64::try_from(at).unwrap_or(0);
            let start = bucket_start(at, width_ms(Resolution::FiveMinutes), self.offset_ms);
            let bucket = (row.get_str("instance_id")?, start);
            touched
                .entry(bucket)
                .or_default()
                .push(Bson::ObjectId(row.get_object_id("_id")?));
        }
        if touched.is_empty() {
            return Ok(());
        }
        let now = DateTime::now();
        let entries = touched.into_iter().map(|((instance, start), rows)| {
            let start = DateTime::from_millis(i64::try_from(start).unwrap_or(i64::MAX));
            doc! { "instance_id": instance, "start": start, "at": now, "rows": rows }
        });
        let unordered = InsertManyOptions::builder().ordered(false).build();
        let into = self.dirty_buckets.clone_with_type::<Document>();
        into.insert_many(entries).with_options(unordered).await?;
        Ok(())
    }

    /// Reads the oldest dirty buckets that come after the given entry.
    pub(crate) async fn read(&self, after: Option<ObjectId>) -> Result<Vec<DirtyBucket>, MetricsError> {
        let filter = after.map_or_else(Document::new, |id| doc! { "_id": { "$gt": id } });
        let limit = i64::try_from(CHUNK).unwrap_or(i64::MAX);
        let found = self
            .dirty_buckets
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
        &self.dirty_buckets
    }

    /// Removes dirty buckets from the collection by the ids of their entries.
    pub(crate) async fn remove(&self, ids: Vec<ObjectId>) -> Result<(), MetricsError> {
        if !ids.is_empty() {
            self.dirty_buckets
                .delete_many(doc! { "_id": { "$in": ids } })
                .await?;
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
        let rows = entry.get_array("rows")?.into_iter().filter_map(|row| match row {
            Ok(RawBsonRef::ObjectId(id)) => Some(id),
            _ => None,
        });
        Ok(Some(Self {
            id: entry.get_object_id("_id")?,
            bucket: Bucket {
                instance,
                start_ms: u64::try_from(start).unwrap_or(0),
            },
            at: entry.get_datetime("at")?.to_system_time(),
            rows: rows.collect(),
        }))
    }
}
