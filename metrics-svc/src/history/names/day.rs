//! Collects the process names of one VM and day from rows, part by part, and writes them.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
};

use bson::oid::ObjectId;
use vmwatch_api::InstanceId;

use super::super::History;
use crate::{
    MetricsError,
    blocks::Expires,
    deadline::Deadline,
    names::{Collector, DAY_MILLIS, NamesOfDay, day_of},
    reads::{Budget, Query, Scan, Step},
    store::RowKind,
};

/// Number of bytes of rows that are decoded together.
const DECODED: usize = 16 << 20;
/// Attempts to write a document that other replicas replace meanwhile.
const MAX_TRIES: u32 = 5;
/// The fields that are read to collect names.
const COLUMNS: [&str; 4] = ["cmd", "cpu_util", "mem", "processes"];
/// Time ranges of at most this length, in microseconds, are not split further.
const LEAST_MICROS: i64 = 1000;

/// Time ranges in Unix microseconds, by the day (Unix milliseconds) that contains them.
type Days = BTreeMap<i64, Vec<Range<i64>>>;

/// Time limits for reading rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// After this time no further part is read. The first part is read in any case, so that a repetition gets further.
    pub(super) turn: Deadline,
    pub(super) deadline: Deadline,
}

/// The rows of a day that were read, and their names.
#[derive(Debug, Default)]
pub(super) struct ReadOfDay {
    names: NamesOfDay,
    /// The ids of the rows that were read.
    pub(super) rows: HashSet<ObjectId>,
    /// Whether the time limit passed before all rows were read.
    pub(super) is_cut: bool,
}

impl History {
    /// Adds the names of the rows within ranges of one day.
    pub(super) async fn add_names(
        &self,
        instance: &InstanceId,
        day_ms: i64,
        ranges: &[Range<i64>],
        limits: Limits,
    ) -> Result<ReadOfDay, MetricsError> {
        let mut before = self.names.before(instance, day_ms, limits.deadline).await?;
        let read = self
            .collect(instance, day_ms, ranges, &before.names, limits)
            .await?;
        for _ in 0..MAX_TRIES {
            if self.names.add(instance, day_ms, &before, &read.names).await? {
                return Ok(read);
            }
            before = self.names.before(instance, day_ms, limits.deadline).await?;
        }
        Err(replaced_meanwhile())
    }

    /// Sets when the names of a day expire, after the internal dates of its rows were changed.
    pub(crate) async fn redate_names(
        &self,
        instance: &InstanceId,
        day_ms: i64,
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        let start = day_ms.saturating_mul(1000);
        let whole_day = start..start.saturating_add(DAY_MILLIS * 1000);
        let limits = Limits {
            turn: deadline,
            deadline,
        };
        for _ in 0..MAX_TRIES {
            // Rows that other replicas add meanwhile must count, so each attempt reads all rows.
            let before = self.names.before(instance, day_ms, deadline).await?;
            let ranges = std::slice::from_ref(&whole_day);
            let read = self
                .collect(instance, day_ms, ranges, &before.names, limits)
                .await?;
            if read.is_cut {
                return Err(MetricsError::DeadlinePassed);
            }
            if self.names.redate(instance, day_ms, &before, &read.names).await? {
                return Ok(());
            }
        }
        Err(replaced_meanwhile())
    }

    async fn collect(
        &self,
        instance: &InstanceId,
        day_ms: i64,
        ranges: &[Range<i64>],
        known: &NamesOfDay,
        limits: Limits,
    ) -> Result<ReadOfDay, MetricsError> {
        let mut names = Collector::new(day_ms, &known.names);
        let mut expires = Expires::NoRows;
        let (mut rows, mut is_cut, mut parts) = (HashSet::new(), false, 0_u32);
        'ranges: for range in ranges {
            let mut start = range.start;
            let mut end = range.end;
            while start < range.end {
                if parts > 0 && limits.turn.left().is_err() {
                    is_cut = true;
                    break 'ranges;
                }
                let query = Query {
                    time: start..end,
                    ..Query::new(RowKind::Process, instance, &COLUMNS)
                        .oldest_first()
                        .durable()
                };
                let budget = Budget::of_background_part(DECODED);
                let mut scan = Scan::open(&self.rows, query, budget, limits.deadline).await?;
                // Rows that are too many together are read in parts, which bounds the memory.
                scan.least_hours = 0;
                let ended = collect_from(&mut scan, &mut names, &mut rows).await;
                expires = expires
                    .max(scan.expires)
                    .max(self.expiry_of_flat(instance, scan.flat_date));
                match ended {
                    // Rows of several hours, or of a shorter time, may be few enough.
                    Ok(Some(hour)) if end - hour.max(start) > LEAST_MICROS => {
                        start = start.max(hour);
                        end = start + (end - start) / 2;
                    }
                    Ok(ended) => {
                        names.is_full |= ended.is_some();
                        start = end;
                        end = range.end;
                        parts += 1;
                    }
                    Err(MetricsError::DeadlinePassed) => {
                        names.forget_samples();
                        is_cut = true;
                        break 'ranges;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        let names = NamesOfDay {
            expires,
            ..names.finish()
        };
        Ok(ReadOfDay { names, rows, is_cut })
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

fn replaced_meanwhile() -> MetricsError {
    MetricsError::Write("other replicas changed the process names of a VM meanwhile".to_owned())
}

/// Collects the names of a scan's rows, and the ids of the rows of each hour that was read completely. Returns the start
/// of the first hour whose rows were not all read, if there were too many.
async fn collect_from(
    scan: &mut Scan<'_>,
    names: &mut Collector<'_>,
    rows: &mut HashSet<ObjectId>,
) -> Result<Option<i64>, MetricsError> {
    loop {
        let mut of_hour = Vec::new();
        let step = scan.hour(|row| {
            of_hour.extend(row.object_id());
            names.add_stored(row.effective, &row.create_date, &row.document);
        });
        match step.await? {
            Step::Hour(_) => {
                names.end_samples();
                rows.extend(of_hour);
            }
            Step::OverBudget(hour) => {
                names.forget_samples();
                return Ok(Some(hour));
            }
            Step::End => return Ok(None),
        }
    }
}

/// Splits time ranges into days, and joins those that overlap. Times before 1970 are left out.
pub(super) fn days(ranges: impl Iterator<Item = Range<i64>>) -> Days {
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
