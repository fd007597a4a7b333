//! Rollups of VM rows in the database: one collection per resolution, with one document per time bucket.
//!
//! ```text
//! vm_samples_5m             { _id: "vm-1/2017-01-01T13:35", sampled_at: its start, sums: { n: 30, cpu_util: [count, total, min, max], …, rows } }
//! vm_samples_hypervisor_5m  likewise, of the rows that hypervisors measured
//! ```
//!
//! A rollup is always written as a whole, and replaces the stored rollup only if that has fewer samples: `$max`
//! compares documents by their first field, which is the number of samples. So the order and the number of writes do
//! not matter, and a rollup remains after its rows have expired. [`super::late`] handles rows that arrive when other
//! rows of their time bucket may have expired.

use std::collections::BTreeMap;

use bson::{Bson, DateTime, Document, RawDocumentBuf, doc};
use mongodb::{Collection, error::ErrorKind, options::InsertManyOptions};
use vmwatch_api::{
    InstanceId,
    history::Resolution,
    time::{CreateDate, UtcOffset},
};

use super::{late::ROW_TIMES, sums::Sums};
use crate::{
    MetricsError,
    config::RollupSettings,
    database::{find, update},
    deadline::Deadline,
    documents::SAMPLED_AT,
    retention,
    store::{DUPLICATE_KEY, RowKind, RowStore},
};

/// A time bucket of a VM.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Bucket {
    /// The VM whose rows the time bucket contains.
    pub(crate) instance: InstanceId,
    /// Start of the time bucket, in Unix milliseconds.
    pub(crate) start_ms: u64,
}

impl Bucket {
    /// The `_id` of the rollup, which sorts by VM and then by time. The separator does not occur in instance ids, and
    /// minutes are precise enough for every resolution.
    fn key(&self) -> String {
        let date = CreateDate::at_millis(self.start_ms, UtcOffset::UTC);
        let minute = date.as_str().get(..16).unwrap_or_default();
        format!("{}/{minute}", self.instance)
    }
}

/// The collections of rollups, one per resolution.
pub(crate) struct Rollups {
    five_minutes: Collection<RawDocumentBuf>,
    hours: Collection<RawDocumentBuf>,
    days: Collection<RawDocumentBuf>,
    /// The same collections, in the order five minutes, hours, days, with the read settings for requests.
    reading: [Collection<RawDocumentBuf>; 3],
    keep: RollupSettings,
}

impl Rollups {
    /// Opens the collections of rollups, which are in the same database as the rows.
    pub(crate) fn new(rows: &RowStore, keep: RollupSettings, kind: RowKind) -> Self {
        let suffixes = ["5m", "1h", "1d"].map(|suffix| kind.derived(suffix));
        let [five_minutes, hours, days] = suffixes.each_ref().map(|suffix| rows.beside(suffix));
        Self {
            five_minutes,
            hours,
            days,
            reading: suffixes.each_ref().map(|suffix| rows.reading_beside(suffix)),
            keep,
        }
    }

    /// Applies the retention settings to the collections of rollups.
    pub(crate) async fn prepare(&self, rows: &RowStore) -> Result<(), MetricsError> {
        let database = rows.database();
        retention::apply(database, &self.five_minutes, self.keep.five_minutes).await?;
        retention::apply(database, &self.hours, self.keep.hours).await?;
        retention::apply(database, &self.days, self.keep.days).await
    }

    /// Retention settings of the rollups.
    pub(crate) const fn keep(&self) -> &RollupSettings {
        &self.keep
    }

    /// The collections, with a filter for the rollups of a VM: those with a key that begins with its id and the
    /// separator.
    pub(super) fn documents(&self, instance: &InstanceId) -> [(&Collection<RawDocumentBuf>, Document); 3] {
        // The character after the separator `/` is `0`.
        let of_vm = doc! { "_id": { "$gte": format!("{instance}/"), "$lt": format!("{instance}0") } };
        [&self.five_minutes, &self.hours, &self.days].map(|rollups| (rollups, of_vm.clone()))
    }

    /// Returns the collection of a resolution; for raw rows, the collection of five-minute rollups.
    const fn collection(&self, resolution: Resolution) -> &Collection<RawDocumentBuf> {
        match resolution {
            Resolution::Raw | Resolution::FiveMinutes => &self.five_minutes,
            Resolution::Hour => &self.hours,
            Resolution::Day => &self.days,
        }
    }

    /// Reads the rollups of a VM that start in a time range, oldest first; used to answer requests.
    pub(crate) async fn read(
        &self,
        resolution: Resolution,
        from: Bucket,
        to_ms: u64,
        deadline: Deadline,
        each: impl FnMut(u64, Sums),
    ) -> Result<(), MetricsError> {
        let [five_minutes, hours, days] = &self.reading;
        let buckets = match resolution {
            Resolution::Raw | Resolution::FiveMinutes => five_minutes,
            Resolution::Hour => hours,
            Resolution::Day => days,
        };
        read(buckets, from, to_ms, deadline, each).await
    }

    /// Reads a VM's rollups like [`Rollups::read`], but from the primary, to compute coarser rollups from them.
    pub(crate) async fn read_durable(
        &self,
        resolution: Resolution,
        from: Bucket,
        to_ms: u64,
        deadline: Deadline,
        each: impl FnMut(u64, Sums),
    ) -> Result<(), MetricsError> {
        read(self.collection(resolution), from, to_ms, deadline, each).await
    }

    /// Writes rollups. A stored rollup is replaced only if it has fewer samples.
    pub(crate) async fn write(
        &self,
        resolution: Resolution,
        buckets: &BTreeMap<Bucket, Sums>,
    ) -> Result<(), MetricsError> {
        let filled = buckets.iter().filter(|(_, sums)| sums.samples() > 0);
        let statements = filled.map(|(bucket, sums)| statement(bucket, sums.document()));
        update(self.collection(resolution), &statements.collect::<Vec<_>>()).await
    }

    /// Writes five-minute rollups like [`Rollups::write`], with the times of their rows.
    pub(super) async fn write_five_minutes<'a>(
        &self,
        buckets: impl Iterator<Item = (&'a Bucket, Sums, Option<Bson>)>,
    ) -> Result<(), MetricsError> {
        let filled = buckets.filter(|(_, sums, _)| sums.samples() > 0);
        let statements =
            filled.map(|(bucket, sums, moments)| statement(bucket, with_row_times(&sums, moments)));
        update(&self.five_minutes, &statements.collect::<Vec<_>>()).await
    }

    /// Reads a stored five-minute rollup.
    pub(super) async fn five_minutes(&self, bucket: &Bucket) -> Result<Option<RawDocumentBuf>, MetricsError> {
        let query = self.five_minutes.find_one(doc! { "_id": bucket.key() });
        find(&self.five_minutes, query).await
    }

    /// Replaces a five-minute rollup if its stored form still has this number of samples.
    pub(super) async fn replace(
        &self,
        bucket: &Bucket,
        samples: u64,
        sums: &Sums,
        moments: Option<Bson>,
    ) -> Result<(), MetricsError> {
        let before = doc! { "_id": bucket.key(), "sums.n": i64::try_from(samples).unwrap_or(i64::MAX) };
        let sums = doc! { "$set": { "sums": with_row_times(sums, moments) } };
        let replaced = self.five_minutes.update_one(before, sums).await?;
        if replaced.matched_count == 1 {
            return Ok(());
        }
        // Because of this error the dirty bucket is kept, so the next update merges the rows into the rollup that the
        // other replica has written.
        Err(MetricsError::Write(
            "another replica changed the rollup meanwhile".to_owned(),
        ))
    }

    /// Writes rollups like [`Rollups::write`], but faster if most of them are not stored yet, as in the first rebuild
    /// of an old database.
    pub(crate) async fn fill(
        &self,
        resolution: Resolution,
        buckets: &BTreeMap<Bucket, Sums>,
    ) -> Result<(), MetricsError> {
        let buckets: Vec<_> = buckets.iter().filter(|(_, sums)| sums.samples() > 0).collect();
        let documents = buckets.iter().map(|(bucket, sums)| {
            doc! { "_id": bucket.key(), SAMPLED_AT: start(bucket), "sums": sums.document() }
        });
        let documents: Vec<_> = documents.collect();
        if documents.is_empty() {
            return Ok(());
        }
        let unordered = InsertManyOptions::builder().ordered(false).build();
        let into = self.collection(resolution).clone_with_type::<Document>();
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

/// Returns the statement that inserts a rollup, or replaces the stored rollup if that has fewer samples.
fn statement(bucket: &Bucket, sums: Document) -> Document {
    doc! {
        "q": { "_id": bucket.key() },
        "u": {
            "$max": { "sums": sums },
            "$setOnInsert": { SAMPLED_AT: start(bucket) },
        },
        "upsert": true,
    }
}

fn with_row_times(sums: &Sums, moments: Option<Bson>) -> Document {
    let mut document = sums.document();
    document.extend(moments.map(|moments| (ROW_TIMES.to_owned(), moments)));
    document
}

async fn read(
    buckets: &Collection<RawDocumentBuf>,
    from: Bucket,
    to_ms: u64,
    deadline: Deadline,
    mut each: impl FnMut(u64, Sums),
) -> Result<(), MetricsError> {
    let end = Bucket {
        start_ms: to_ms,
        ..from.clone()
    };
    let query = buckets
        .find(doc! { "_id": { "$gte": from.key(), "$lt": end.key() } })
        .sort(doc! { "_id": 1 })
        .max_time(deadline.left()?);
    let mut cursor = find(buckets, query).await?;
    while cursor.advance().await? {
        let document = cursor.current();
        let start_ms = document.get_datetime(SAMPLED_AT)?.timestamp_millis();
        let sums = Sums::from_document(document.get_document("sums")?)?;
        each(u64::try_from(start_ms).unwrap_or(0), sums);
    }
    Ok(())
}

fn start(bucket: &Bucket) -> DateTime {
    DateTime::from_millis(i64::try_from(bucket.start_ms).unwrap_or(i64::MAX))
}
