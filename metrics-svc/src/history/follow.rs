//! Updates rollups, newest rows and process names from dirty buckets: the rows of a dirty bucket are read, and its
//! rollup is written, as a whole.
//!
//! ```text
//! dirty buckets ─> rows of five minutes ─> 5m ─> of the hour ─> 1h ─> of the day ─> 1d ─> remove the dirty buckets
//!                       └─> newest row and sparkline of the VM
//! dirty buckets ─> rows of processes ─> process names ─> remove the dirty buckets
//! ```
//!
//! Every replica does this. If two replicas process the same dirty bucket, they write the same result, which is
//! harmless (see [`super::rollups`]). The dirty bucket is removed last, so that after a crash at any point it is
//! processed again.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bson::oid::ObjectId;
use futures::{StreamExt, TryStreamExt, stream};
use metrics::{counter, gauge, histogram};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::{history::Resolution, measures::VM_MEASURES};

use super::{
    History,
    dirty_buckets::{DirtyBucket, MAX_AGE, MAX_READ},
    late::{self, RowTime},
    names::Named,
    rollups::Bucket,
    sums::Sums,
};
use crate::{
    MetricsError,
    deadline::Deadline,
    instances::Report,
    reads::{Budget, Query, Scan, micros},
    time_buckets::{bucket_start, width_ms},
    vm_row::{RESTRICTED, VmRow},
};

/// Maximum number of time buckets read concurrently. The limit leaves connections of the database pool to requests.
const MAX_CONCURRENT: usize = 4;
/// Number of time buckets that are recomputed together; the times of all their rows are in memory meanwhile.
const GROUP: usize = 250;
/// Time limit for recomputing one group of time buckets, and for reading dirty buckets.
const DEADLINE: Duration = Duration::from_mins(1);

/// Entries of the collection of dirty buckets, grouped by time bucket.
pub(super) type Touched = BTreeMap<Bucket, Vec<DirtyBucket>>;

/// A time bucket recomputed from its current rows.
struct Fresh {
    sums: Sums,
    rows: HashSet<ObjectId>,
    moments: Vec<RowTime>,
    report: Report,
}

impl History {
    /// Updates rollups from dirty buckets periodically until shutdown.
    pub(crate) async fn follow(self: Arc<Self>, interval: Duration, shutdown: CancellationToken) {
        while shutdown.run_until_cancelled(sleep(interval)).await.is_some() {
            let started = Instant::now();
            if let Err(error) = self.pass(&shutdown).await {
                warn!(cause = error.cause(), "updating rollups failed; retrying");
            }
            let took = started.elapsed().as_secs_f64();
            histogram!("vmwatch_rollup_pass_seconds", "rows" => self.kind.name()).record(took);
        }
        info!(rows = self.kind.name(), "rollup updates stopped");
    }

    /// Processes all dirty buckets, oldest first.
    async fn pass(self: &Arc<Self>, shutdown: &CancellationToken) -> Result<(), MetricsError> {
        let mut after = None;
        let mut left = 0_u32;
        loop {
            let this = Arc::clone(self);
            let entries = limited(async move { this.dirty_buckets.read(after).await }).await?;
            let is_last = entries.len() < MAX_READ;
            after = entries.last().map(|entry| entry.id);
            for group in groups(entries) {
                if shutdown.is_cancelled() {
                    return Ok(());
                }
                let this = Arc::clone(self);
                let remaining = limited(async move { this.update(&group).await }).await?;
                left = left.saturating_add(remaining);
            }
            if is_last {
                gauge!("vmwatch_dirty_buckets_left", "rows" => self.kind.name()).set(left);
                return Ok(());
            }
        }
    }

    /// Updates the rollups and names of a group of time buckets. Returns the number of entries that could not be removed.
    async fn update(&self, touched: &Touched) -> Result<u32, MetricsError> {
        // A part of a sample may have process rows only.
        let has_vm_rows = |entries: &Vec<DirtyBucket>| entries.iter().any(|entry| !entry.rows.is_empty());
        let with_vm_rows = touched.iter().filter(|(_, entries)| has_vm_rows(entries));
        let with_vm_rows: Vec<Bucket> = with_vm_rows.map(|(bucket, _)| bucket.clone()).collect();
        let fresh: BTreeMap<Bucket, Fresh> = stream::iter(with_vm_rows)
            .map(async |bucket| {
                let fresh = self.fresh(&bucket).await?;
                Ok::<_, MetricsError>((bucket, fresh))
            })
            .buffer_unordered(MAX_CONCURRENT)
            .try_collect()
            .await?;
        self.write_five_minutes(&fresh).await?;
        let hours = self.roll_up(fresh.keys(), Resolution::Hour).await?;
        self.roll_up(hours.keys(), Resolution::Day).await?;
        let named = self.update_names(touched).await;
        let done = done(touched, &fresh, &named);
        let reports = fresh.into_iter().map(|(bucket, fresh)| {
            let entries = touched.get(&bucket).into_iter().flatten();
            fresh.report.reported(entries.map(|entry| entry.at).max())
        });
        self.instances.note(&reports.collect::<Vec<_>>()).await?;
        let count: usize = touched.values().map(Vec::len).sum();
        let left = count - done.len();
        self.dirty_buckets.remove(done).await?;
        Ok(u32::try_from(left).unwrap_or(u32::MAX))
    }

    /// Recomputes a five-minute time bucket from its rows.
    async fn fresh(&self, bucket: &Bucket) -> Result<Fresh, MetricsError> {
        let mut fresh = Fresh {
            sums: Sums::default(),
            rows: HashSet::new(),
            moments: Vec::new(),
            report: Report::new(bucket.instance.clone()),
        };
        let end_ms = bucket.start_ms + width_ms(Resolution::FiveMinutes);
        let read = self.read_rows(bucket, end_ms, true, Deadline::after(DEADLINE), |at, row| {
            fresh.sums.add(row);
            fresh.rows.extend(row.id);
            fresh.moments.extend(moment(bucket, at, row));
            fresh.report.add(at, row);
        });
        if read.await?.is_some() {
            return Err(MetricsError::TooMuch);
        }
        Ok(fresh)
    }

    /// Writes recomputed five-minute rollups. If some rows of a time bucket may have expired, adds late rows to its
    /// stored rollup instead.
    async fn write_five_minutes(&self, fresh: &BTreeMap<Bucket, Fresh>) -> Result<(), MetricsError> {
        let mut whole = Vec::new();
        for (bucket, fresh) in fresh {
            if self.may_lack_rows(bucket) && self.add_late(bucket, &fresh.moments).await? {
                continue;
            }
            let micros: Vec<u32> = fresh.moments.iter().map(|moment| moment.micros).collect();
            whole.push((bucket, fresh.sums, late::encode(&micros)));
        }
        self.rollups.write_five_minutes(whole.into_iter()).await
    }

    /// Reads the VM rows of a time range, each with its effective date in Unix microseconds. `durable` says whether later
    /// writes depend on them. Returns the start of the first hour whose rows were not all read, if there were too many.
    pub(crate) async fn read_rows(
        &self,
        from: &Bucket,
        to_ms: u64,
        durable: bool,
        deadline: Deadline,
        mut each: impl FnMut(i64, &VmRow<'_>),
    ) -> Result<Option<i64>, MetricsError> {
        let measures = VM_MEASURES.into_array().into_iter();
        let names: Vec<_> = measures.map(|measure| measure.name).chain([RESTRICTED]).collect();
        let mut query = Query::new(self.kind, &from.instance, &names)
            .within_ms(from.start_ms, to_ms)
            .oldest_first();
        let mut budget = Budget::of_request(&self.rows);
        if durable {
            query = query.durable();
            budget = Budget::of_background();
        }
        let mut scan = Scan::open(&self.rows, query, budget, deadline).await?;
        let mut unreadable = None;
        let ended = scan
            .all(|row| match VmRow::from_document(&row.document) {
                Ok(values) => each(row.effective, &values),
                Err(error) => unreadable = Some(error),
            })
            .await?;
        unreadable.map_or(Ok(ended), Err)
    }

    /// Recomputes and returns the rollups of a coarser resolution whose time buckets contain the given time buckets.
    async fn roll_up(
        &self,
        finer: impl Iterator<Item = &Bucket>,
        into: Resolution,
    ) -> Result<BTreeMap<Bucket, Sums>, MetricsError> {
        let (from, width) = match into {
            Resolution::Day => (Resolution::Hour, width_ms(Resolution::Day)),
            _ => (Resolution::FiveMinutes, width_ms(Resolution::Hour)),
        };
        let coarser = finer.map(|bucket| Bucket {
            instance: bucket.instance.clone(),
            start_ms: bucket_start(bucket.start_ms, width, self.offset.as_millis()),
        });
        let coarser: BTreeSet<Bucket> = coarser.collect();
        let rolled: BTreeMap<Bucket, Sums> = stream::iter(coarser)
            .map(async |bucket| {
                let mut sums = Sums::default();
                let end_ms = bucket.start_ms + width;
                self.rollups
                    .read_durable(
                        from,
                        bucket.clone(),
                        end_ms,
                        Deadline::after(DEADLINE),
                        |_, part| {
                            sums.merge(&part);
                        },
                    )
                    .await?;
                Ok::<_, MetricsError>((bucket, sums))
            })
            .buffer_unordered(MAX_CONCURRENT)
            .try_collect()
            .await?;
        self.rollups.write(into, &rolled).await?;
        Ok(rolled)
    }
}

/// Returns the values of a row and its time relative to the start of its time bucket.
fn moment(bucket: &Bucket, at: i64, row: &VmRow<'_>) -> Option<RowTime> {
    Some(RowTime {
        micros: u32::try_from(at.checked_sub(micros(bucket.start_ms))?).ok()?,
        values: row.values,
    })
}

/// Runs work with a time limit, in a separate task, because dropping a call of the MongoDB driver half-way is not safe.
async fn limited<T: Send + 'static>(
    work: impl Future<Output = Result<T, MetricsError>> + Send + 'static,
) -> Result<T, MetricsError> {
    let done = timeout(DEADLINE, tokio::spawn(work)).await;
    let done = done.map_err(|_| MetricsError::Unanswered(DEADLINE))?;
    done.map_err(|panic| MetricsError::Io(panic.into()))?
}

/// Collects the entries of each time bucket, and groups the time buckets, those of a VM next to each other.
fn groups(entries: Vec<DirtyBucket>) -> Vec<Touched> {
    let mut touched = Touched::new();
    for entry in entries {
        touched.entry(entry.bucket.clone()).or_default().push(entry);
    }
    let mut groups = Vec::new();
    while let Some(next) = touched.keys().nth(GROUP).cloned() {
        let rest = touched.split_off(&next);
        groups.push(std::mem::replace(&mut touched, rest));
    }
    groups.push(touched);
    groups
}

/// Returns the ids of dirty-bucket entries that can be removed: rollup and names contain all rows of the entry, or some of
/// its rows have not been found for [`MAX_AGE`]. An entry whose names could not be read or written stays.
fn done(touched: &Touched, fresh: &BTreeMap<Bucket, Fresh>, named: &Named) -> Vec<ObjectId> {
    let now = SystemTime::now();
    let mut done = Vec::new();
    for (bucket, entries) in touched {
        let rolled_up = |row| fresh.get(bucket).is_some_and(|fresh| fresh.rows.contains(row));
        for entry in entries {
            let are_named = entry.processes.is_none() || named.added.contains(&entry.id);
            let counted = entry.rows.iter().all(rolled_up) && are_named;
            let are_missing = are_named || named.missing.contains(&entry.id);
            let is_given_up = are_missing && entry.at + MAX_AGE <= now;
            if !(counted || is_given_up) {
                continue;
            }
            if !counted {
                counter!("vmwatch_dirty_buckets_dropped_total").increment(1);
                warn!(instance_id = %bucket.instance, "gave up updating a rollup or the process names: some rows that they should contain do not exist");
            }
            done.push(entry.id);
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::dirty_buckets::ProcessRows;

    #[test]
    fn entries_of_a_time_bucket_are_in_one_group() {
        let entry = |number: usize| DirtyBucket {
            id: ObjectId::new(),
            bucket: Bucket {
                instance: format!("vm-{}", number % (GROUP + 1)).parse().unwrap(),
                start_ms: 0,
            },
            at: SystemTime::now(),
            rows: Vec::new(),
            processes: None,
        };
        let groups = groups((0..3 * (GROUP + 1)).map(entry).collect());
        let sizes: Vec<_> = groups.iter().map(BTreeMap::len).collect();
        assert_eq!(sizes, [GROUP, 1]);
        assert!(
            groups
                .iter()
                .flat_map(BTreeMap::values)
                .all(|entries| entries.len() == 3)
        );
    }

    #[test]
    fn entry_is_dropped_only_if_its_rows_do_not_exist() {
        let bucket = Bucket {
            instance: "vm-1".parse().unwrap(),
            start_ms: 0,
        };
        let processes = ProcessRows {
            time: 0..1,
            rows: vec![ObjectId::new()],
        };
        let entry = |age| DirtyBucket {
            id: ObjectId::new(),
            bucket: bucket.clone(),
            at: SystemTime::now() - age,
            rows: Vec::new(),
            processes: Some(processes.clone()),
        };
        let (recent, old) = (entry(Duration::ZERO), entry(2 * MAX_AGE));
        let (recent_id, old_id) = (recent.id, old.id);
        let touched = Touched::from([(bucket.clone(), vec![recent, old])]);
        let done = |named: &Named| done(&touched, &BTreeMap::new(), named);
        // Their names were not updated, because that failed or because other VMs came first.
        let mut named = Named::default();
        assert_eq!(done(&named), []);
        named.missing.extend([recent_id, old_id]);
        assert_eq!(done(&named), [old_id]);
        named.added.insert(recent_id);
        assert_eq!(done(&named), [recent_id, old_id]);
    }
}
