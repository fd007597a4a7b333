//! Updates the process names from dirty buckets: reads the process rows that a dirty bucket stands for, and adds
//! their names to those of the VM and day (see [`crate::names`]).

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
    time::Duration,
};

use bson::oid::ObjectId;
use futures::{StreamExt, stream};
use metrics::counter;
use tracing::warn;
use vmwatch_api::InstanceId;

use super::{History, dirty_buckets::ProcessMark, follow::Touched};
use crate::{
    MetricsError,
    blocks::Expires,
    deadline::Deadline,
    names::{Collector, DAY_MILLIS, NamesOfDay, day_of},
    reads::{Budget, Query, Scan, Step},
    store::RowKind,
};

/// Number of VMs whose names are updated concurrently.
const MAX_CONCURRENT: usize = 2;
/// Time limit for the names of one chunk of dirty buckets. The names of the VMs that are left are updated in the next
/// pass, so that a VM with many names delays rollups only for a short time.
const TIME_LIMIT: Duration = Duration::from_secs(20);
/// Time limit for the names of one VM, so that it does not delay those of others.
const VM_TIME_LIMIT: Duration = Duration::from_secs(4);
/// Number of bytes of rows that are decoded together.
const DECODED: usize = 16 << 20;
/// Attempts to write a document that other replicas replace meanwhile.
const MAX_TRIES: u32 = 5;
/// The fields that names need.
const COLUMNS: [&str; 4] = ["cmd", "cpu_util", "mem", "processes"];
/// Rows of less than this time are not read in smaller parts.
const LEAST_MICROS: i64 = 1000;

/// Process rows of one VM in dirty buckets, with the ids of the entries.
type Marks = Vec<(ObjectId, ProcessMark)>;

/// Time ranges in Unix microseconds, by the day (Unix milliseconds) that contains them.
type Days = BTreeMap<i64, Vec<Range<i64>>>;

impl History {
    /// Adds the names of the process rows in dirty buckets. Returns the ids of the entries whose rows were all found and
    /// added.
    pub(super) async fn update_names(&self, touched: &Touched) -> HashSet<ObjectId> {
        let mut of_vms: BTreeMap<InstanceId, Marks> = BTreeMap::new();
        for entry in touched.values().flatten() {
            if let Some(mark) = &entry.processes {
                let of_vm = of_vms.entry(entry.bucket.instance.clone()).or_default();
                of_vm.push((entry.id, mark.clone()));
            }
        }
        let deadline = Deadline::after(TIME_LIMIT);
        let results: Vec<_> = stream::iter(of_vms)
            .map(async |(instance, marks)| {
                let deadline = deadline.at_most(VM_TIME_LIMIT);
                let added = self.names_of_marks(&instance, &marks, deadline).await;
                (instance, added)
            })
            .buffer_unordered(MAX_CONCURRENT)
            .collect()
            .await;
        let mut added = HashSet::new();
        let mut failed = (0_u64, None);
        for (instance, result) in results {
            match result {
                Ok(entries) => added.extend(entries),
                Err(error) => failed = (failed.0 + 1, Some((instance, error))),
            }
        }
        if let (vms, Some((instance, error))) = failed {
            counter!("vmwatch_process_names_failed_total").increment(vms);
            let cause = error.cause();
            warn!(
                vms,
                %instance, cause, "updating the process names of VMs failed; retrying; `instance` is the last of these VMs"
            );
        }
        added
    }

    /// Adds the names of one VM. Returns the ids of the entries whose rows were all found.
    async fn names_of_marks(
        &self,
        instance: &InstanceId,
        marks: &Marks,
        deadline: Deadline,
    ) -> Result<Vec<ObjectId>, MetricsError> {
        let mut missing = HashSet::new();
        for (_, mark) in marks {
            missing.extend(mark.rows.iter().copied());
        }
        let ranges = marks.iter().map(|(_, mark)| mark.time.clone());
        for (day_ms, ranges) in days(ranges) {
            self.add_names(instance, day_ms, &ranges, &mut missing, deadline)
                .await?;
        }
        let added = marks
            .iter()
            .filter(|(_, mark)| !mark.rows.iter().any(|row| missing.contains(row)));
        Ok(added.map(|(id, _)| *id).collect())
    }

    /// Adds the names of all process rows within a range of Unix microseconds.
    pub(crate) async fn rebuild_names(
        &self,
        instance: &InstanceId,
        time: Range<i64>,
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        for (day_ms, ranges) in days([time].into_iter()) {
            self.add_names(instance, day_ms, &ranges, &mut HashSet::new(), deadline)
                .await?;
        }
        Ok(())
    }

    /// Adds the names of the rows within ranges of one day, and removes the ids of these rows from `missing`.
    async fn add_names(
        &self,
        instance: &InstanceId,
        day_ms: i64,
        ranges: &[Range<i64>],
        missing: &mut HashSet<ObjectId>,
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        let mut before = self.names.before(instance, day_ms, deadline).await?;
        let found = self
            .collect(instance, day_ms, ranges, &before.names, missing, deadline)
            .await?;
        for _ in 0..MAX_TRIES {
            if self.names.add(instance, day_ms, &before, &found).await? {
                return Ok(());
            }
            before = self.names.before(instance, day_ms, deadline).await?;
        }
        Err(MetricsError::Write(
            "other replicas changed the process names of a VM meanwhile".to_owned(),
        ))
    }

    async fn collect(
        &self,
        instance: &InstanceId,
        day_ms: i64,
        ranges: &[Range<i64>],
        known: &NamesOfDay,
        missing: &mut HashSet<ObjectId>,
        deadline: Deadline,
    ) -> Result<NamesOfDay, MetricsError> {
        let mut names = Collector::new(day_ms, &known.names);
        let mut expires = Expires::NoRows;
        for range in ranges {
            let mut start = range.start;
            let mut end = range.end;
            while start < range.end {
                let query = Query {
                    time: start..end,
                    ..Query::new(RowKind::Process, instance, &COLUMNS)
                        .oldest_first()
                        .durable()
                };
                let budget = Budget::of_background_part(DECODED);
                let mut scan = Scan::open(&self.rows, query, budget, deadline).await?;
                // Rows that are too many together are read in parts, which bounds the memory.
                scan.least_hours = 0;
                let ended = collect_from(&mut scan, &mut names, missing).await?;
                expires = expires
                    .max(scan.expires)
                    .max(self.expiry_of_flat(instance, scan.flat_date));
                match ended {
                    // Rows of several hours, or of a shorter time, may be few enough.
                    Some(hour) if end - hour.max(start) > LEAST_MICROS => {
                        start = start.max(hour);
                        end = start + (end - start) / 2;
                    }
                    ended => {
                        names.is_full |= ended.is_some();
                        start = end;
                        end = range.end;
                    }
                }
            }
        }
        Ok(NamesOfDay {
            expires,
            ..names.finish()
        })
    }

    fn expiry_of_flat(&self, instance: &InstanceId, date: Expires) -> Expires {
        let keep = self.retention.of(RowKind::Process, instance);
        let keep = i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
        match date {
            Expires::At(at_ms) => Expires::At(at_ms.saturating_add(keep)),
            other => other,
        }
    }
}

/// Collects the names of a scan's rows. Returns the start of the first hour whose rows were not all read, if there were
/// too many.
async fn collect_from(
    scan: &mut Scan<'_>,
    names: &mut Collector<'_>,
    missing: &mut HashSet<ObjectId>,
) -> Result<Option<i64>, MetricsError> {
    loop {
        let step = scan.hour(|row| {
            if let Some(id) = row.object_id() {
                missing.remove(&id);
            }
            names.add_stored(row.effective, &row.create_date, &row.document);
        });
        match step.await? {
            Step::Hour(_) => names.end_samples(),
            Step::OverBudget(hour) => {
                names.forget_samples();
                return Ok(Some(hour));
            }
            Step::End => return Ok(None),
        }
    }
}

/// Splits time ranges into days, and joins those that overlap. Times before 1970 are left out.
fn days(ranges: impl Iterator<Item = Range<i64>>) -> Days {
    let mut sorted: Vec<_> = ranges.collect();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut days = Days::new();
    for range in sorted {
        let mut start = range.start.max(0);
        while start < range.end {
            let day_ms = day_of(start);
            let end = range.end.min((day_ms + DAY_MILLIS) * 1000);
            let of_day = days.entry(day_ms).or_default();
            match of_day.last_mut() {
                Some(last) if last.end >= start => last.end = last.end.max(end),
                _ => of_day.push(start..end),
            }
            start = end;
        }
    }
    days
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_time_ranges_are_joined_and_split_into_days() {
        const DAY: i64 = DAY_MILLIS * 1000;
        let ranges = [
            DAY - 5..DAY + 7,
            3..9,
            1..4,
            -9..2,
            2 * DAY + 5..2 * DAY + 6,
            12..13,
        ];
        let days = days(ranges.into_iter());
        let flat = days.iter().flat_map(|(day, ranges)| {
            let ranges = ranges.iter();
            ranges.map(|range| (*day / DAY_MILLIS, range.start, range.end))
        });
        assert_eq!(
            flat.collect::<Vec<_>>(),
            [
                (0, 0, 9),
                (0, 12, 13),
                (0, DAY - 5, DAY),
                (1, DAY, DAY + 7),
                (2, 2 * DAY + 5, 2 * DAY + 6)
            ]
        );
    }
}
