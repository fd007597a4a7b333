//! The rollups in the database: a collection for each resolution, one document a bucket.
//!
//! ```text
//! vm_samples_5m   { _id: "vm-1/2017-01-01T13:35", sampled_at: its start, sums: { n: 30, cpu_util: [count, total, min, max], … } }
//! ```
//!
//! A bucket is only ever written whole, and only over one of fewer samples: `$max` compares documents by their first
//! field, and that is the number of samples. So it does not matter who writes it how often or in which order, and a
//! bucket outlives the rows that it was made of.

use std::{collections::BTreeMap, time::Duration};

use bson::{DateTime, Document, RawDocumentBuf, doc};
use mongodb::{Collection, error::ErrorKind, options::InsertManyOptions};
use shared::{
    api::{InstanceId, history::Resolution},
    time::{CreateDate, UtcOffset},
};

use super::sums::Sums;
use crate::{
    MetricsError,
    config::RollupSettings,
    database::{find, update},
    documents::SAMPLED_AT,
    retention,
    store::{DUPLICATE_KEY, RowStore},
};

/// A bucket of a VM.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Bucket {
    /// Which VM.
    pub(crate) instance: InstanceId,
    /// Its first millisecond.
    pub(crate) start_ms: u64,
}

impl Bucket {
    /// Sorts by VM and time. The separator occurs in no instance id; minutes are fine enough for every resolution.
    fn key(&self) -> String {
        let date = CreateDate::at_millis(self.start_ms, UtcOffset::UTC);
        let minute = date.as_str().get(..16).unwrap_or_default();
        format!("{}/{minute}", self.instance)
    }
}

/// The rollups in the database.
pub(crate) struct Rollups {
    five_minutes: Collection<RawDocumentBuf>,
    hours: Collection<RawDocumentBuf>,
    days: Collection<RawDocumentBuf>,
    keep: RollupSettings,
}

impl Rollups {
    /// The collections beside the rows.
    pub(crate) fn beside(rows: &RowStore, keep: RollupSettings) -> Self {
        Self {
            five_minutes: rows.beside("5m"),
            hours: rows.beside("1h"),
            days: rows.beside("1d"),
            keep,
        }
    }

    /// Fits the retention to the settings.
    pub(crate) async fn prepare(&self, rows: &RowStore) -> Result<(), MetricsError> {
        let database = rows.database();
        retention::apply(database, &self.five_minutes, self.keep.five_minutes).await?;
        retention::apply(database, &self.hours, self.keep.hours).await?;
        retention::apply(database, &self.days, self.keep.days).await
    }

    /// How long buckets are kept.
    pub(crate) const fn keep(&self) -> &RollupSettings {
        &self.keep
    }

    /// The collection of a resolution; rows have none here.
    const fn of(&self, resolution: Resolution) -> &Collection<RawDocumentBuf> {
        match resolution {
            Resolution::Raw | Resolution::FiveMinutes => &self.five_minutes,
            Resolution::Hour => &self.hours,
            Resolution::Day => &self.days,
        }
    }

    /// Reads the buckets of a VM that start in a range of time, in order.
    pub(crate) async fn read(
        &self,
        resolution: Resolution,
        from: Bucket,
        to_ms: u64,
        limit: Duration,
        mut each: impl FnMut(u64, Sums),
    ) -> Result<(), MetricsError> {
        let end = Bucket {
            start_ms: to_ms,
            ..from.clone()
        };
        let buckets = self.of(resolution);
        let query = buckets
            .find(doc! { "_id": { "$gte": from.key(), "$lt": end.key() } })
            .sort(doc! { "_id": 1 })
            .max_time(limit);
        let mut cursor = find(buckets, query).await?;
        while cursor.advance().await? {
            let document = cursor.current();
            let start_ms = document.get_datetime(SAMPLED_AT)?.timestamp_millis();
            let sums = Sums::of(document.get_document("sums")?)?;
            each(u64::try_from(start_ms).unwrap_or(0), sums);
        }
        Ok(())
    }

    /// Writes buckets, each over one of fewer samples only.
    pub(crate) async fn write(
        &self,
        resolution: Resolution,
        buckets: &BTreeMap<Bucket, Sums>,
    ) -> Result<(), MetricsError> {
        let statements = buckets
            .iter()
            .filter(|(_, sums)| sums.samples() > 0)
            .map(|(bucket, sums)| {
                doc! {
                    "q": { "_id": bucket.key() },
                    "u": {
                        "$max": { "sums": sums.to_document() },
                        "$setOnInsert": { SAMPLED_AT: start(bucket) },
                    },
                    "upsert": true,
                }
            });
        update(self.of(resolution), &statements.collect::<Vec<_>>()).await
    }

    /// As [`Rollups::write`], for buckets that are rarely there already: the rows of an old database.
    pub(crate) async fn fill(
        &self,
        resolution: Resolution,
        buckets: &BTreeMap<Bucket, Sums>,
    ) -> Result<(), MetricsError> {
        let buckets: Vec<_> = buckets.iter().filter(|(_, sums)| sums.samples() > 0).collect();
        let documents = buckets.iter().map(|(bucket, sums)| {
            doc! { "_id": bucket.key(), SAMPLED_AT: start(bucket), "sums": sums.to_document() }
        });
        let documents: Vec<_> = documents.collect();
        if documents.is_empty() {
            return Ok(());
        }
        let unordered = InsertManyOptions::builder().ordered(false).build();
        let into = self.of(resolution).clone_with_type::<Document>();
        let Err(error) = into.insert_many(&documents).with_options(unordered).await else {
            return Ok(());
        };
        let present = match *error.kind {
            ErrorKind::InsertMany(ref failed) if failed.write_concern_error.is_none() => {
                let errors = failed.write_errors.as_deref().unwrap_or_default();
                let only_present = errors.iter().all(|write| write.code == DUPLICATE_KEY);
                only_present.then(|| errors.iter().map(|write| write.index).collect::<Vec<_>>())
            }
            _ => None,
        };
        let Some(present) = present else {
            return Err(error.into());
        };
        let again = present.into_iter().filter_map(|index| buckets.get(index));
        let again = again.map(|&(bucket, sums)| (bucket.clone(), *sums));
        self.write(resolution, &again.collect()).await
    }
}

fn start(bucket: &Bucket) -> DateTime {
    DateTime::from_millis(i64::try_from(bucket.start_ms).unwrap_or(i64::MAX))
}
