//! What was stored and is not yet in the rollups: a document for each VM and five minutes that a batch touched.
//!
//! A mark is written *beside* the rows, not after them, so that ingestion waits no longer for it. It names the rows, and
//! is removed once they were seen in the database and counted. So whatever is killed between any two writes, a row that
//! is stored has a mark or is in the rollups: a batch whose acknowledgement was lost is written again, with its marks.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use bson::{Bson, DateTime, Document, RawBsonRef, RawDocument, RawDocumentBuf, doc, oid::ObjectId};
use futures::TryStreamExt;
use mongodb::{Collection, options::InsertManyOptions};
use vmwatch_api::{InstanceId, history::Resolution};

use super::{
    chart::{bucket_start, width_ms},
    rollups::Bucket,
};
use crate::{MetricsError, documents::SAMPLED_AT, store::RowStore};

/// Marks read at once.
pub(crate) const CHUNK: usize = 1000;
/// A mark whose rows never appear (the database refused them, or retention was faster) is given up then.
pub(crate) const GIVEN_UP: Duration = Duration::from_hours(1);

/// The marks in the database.
pub(crate) struct Marks {
    marks: Collection<RawDocumentBuf>,
    offset_ms: i64,
}

/// A mark.
#[derive(Debug)]
pub(crate) struct Mark {
    /// Its own id.
    pub(crate) id: ObjectId,
    /// What was touched.
    pub(crate) bucket: Bucket,
    /// When, by the clock of the replica that stored it.
    pub(crate) at: SystemTime,
    /// By which rows.
    pub(crate) rows: Vec<ObjectId>,
}

impl Marks {
    /// The collection beside the rows.
    pub(crate) fn beside(rows: &RowStore) -> Self {
        Self {
            marks: rows.beside("marks"),
            offset_ms: rows.offset().as_millis(),
        }
    }

    /// Marks what VM rows touch, as ingestion made them.
    pub(crate) async fn add(&self, vms: &[RawDocumentBuf]) -> Result<(), MetricsError> {
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
        let marks = touched.into_iter().map(|((instance, start), rows)| {
            let start = DateTime::from_millis(i64::try_from(start).unwrap_or(i64::MAX));
            doc! { "instance_id": instance, "start": start, "at": now, "rows": rows }
        });
        let unordered = InsertManyOptions::builder().ordered(false).build();
        let into = self.marks.clone_with_type::<Document>();
        into.insert_many(marks).with_options(unordered).await?;
        Ok(())
    }

    /// The oldest marks behind one.
    pub(crate) async fn read(&self, behind: Option<ObjectId>) -> Result<Vec<Mark>, MetricsError> {
        let filter = behind.map_or_else(Document::new, |id| doc! { "_id": { "$gt": id } });
        let limit = i64::try_from(CHUNK).unwrap_or(i64::MAX);
        let found = self
            .marks
            .find(filter)
            .sort(doc! { "_id": 1 })
            .limit(limit)
            .await?;
        found
            .map_err(MetricsError::from)
            .try_filter_map(async |mark| Mark::of(&mark))
            .try_collect()
            .await
    }

    /// Removes marks.
    pub(crate) async fn remove(&self, ids: Vec<ObjectId>) -> Result<(), MetricsError> {
        if !ids.is_empty() {
            self.marks.delete_many(doc! { "_id": { "$in": ids } }).await?;
        }
        Ok(())
    }
}

impl Mark {
    /// A stored mark.
    fn of(mark: &RawDocument) -> Result<Option<Self>, MetricsError> {
        // Written by us from an id that was checked; one of somebody else's is left alone.
        let Ok(instance) = mark.get_str("instance_id")?.parse::<InstanceId>() else {
            return Ok(None);
        };
        let start = mark.get_datetime("start")?.timestamp_millis();
        let rows = mark.get_array("rows")?.into_iter().filter_map(|row| match row {
            Ok(RawBsonRef::ObjectId(id)) => Some(id),
            _ => None,
        });
        Ok(Some(Self {
            id: mark.get_object_id("_id")?,
            bucket: Bucket {
                instance,
                start_ms: u64::try_from(start).unwrap_or(0),
            },
            at: mark.get_datetime("at")?.to_system_time(),
            rows: rows.collect(),
        }))
    }
}
