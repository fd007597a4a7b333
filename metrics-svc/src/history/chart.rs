//! Chooses the resolution and the bucket length for a chart.

use serde::Serialize;
use vmwatch_api::{
    first_page,
    history::{Points, Resolution, TimeRange},
};

use crate::{
    MetricsError,
    time_buckets::{bucket_start, width_ms},
};

const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Possible lengths of a chart's time buckets in milliseconds, up to five days; longer buckets are whole days. The
/// bucket boundaries fall on round local times. The bucket length of each rollup resolution is included and divides all
/// longer lengths.
const LADDER: [u64; 22] = [
    SECOND,
    2 * SECOND,
    5 * SECOND,
    10 * SECOND,
    15 * SECOND,
    30 * SECOND,
    MINUTE,
    2 * MINUTE,
    5 * MINUTE,
    10 * MINUTE,
    15 * MINUTE,
    30 * MINUTE,
    HOUR,
    2 * HOUR,
    3 * HOUR,
    4 * HOUR,
    6 * HOUR,
    8 * HOUR,
    12 * HOUR,
    DAY,
    2 * DAY,
    5 * DAY,
];

/// The time buckets of a chart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chart {
    /// Resolution of the data to read: raw rows, or rollups of a certain length.
    pub(crate) resolution: Resolution,
    /// Start of the first time bucket, in Unix milliseconds.
    pub(crate) first_ms: u64,
    /// Length of a time bucket in milliseconds.
    pub(crate) step_ms: u64,
    /// Number of time buckets.
    pub(crate) buckets: usize,
}

impl Chart {
    /// Start of the first time bucket of the page after `after_ms`, in Unix milliseconds. A later page need not read the
    /// time buckets of earlier pages again.
    pub(crate) fn page_start(&self, after_ms: Option<u64>) -> u64 {
        after_ms.map_or(self.first_ms, |after| {
            self.first_ms.max(after.saturating_add(self.step_ms))
        })
    }

    /// Returns the page of time buckets after `after_ms`, and the start of its last bucket if more follow.
    ///
    /// `ended` is the hour, in Unix microseconds, at which reading stopped at the limit of decoded bytes. The page contains
    /// only the buckets that were read completely, and the next page starts with that hour.
    ///
    /// # Errors
    /// [`MetricsError::TooMuch`] if not even the first bucket of the page was read completely.
    pub(crate) fn page<T: Serialize>(
        &self,
        buckets: impl Iterator<Item = T>,
        at_ms: impl Fn(&T) -> u64,
        after_ms: Option<u64>,
        ended: Option<i64>,
    ) -> Result<(Vec<T>, Option<u64>), MetricsError> {
        let complete_ms = ended.map_or(u64::MAX, |hour| u64::try_from(hour / 1000).unwrap_or(0));
        let complete = buckets
            .filter(|bucket| at_ms(bucket).saturating_add(self.step_ms) <= complete_ms)
            .filter(|bucket| after_ms.is_none_or(|after| at_ms(bucket) > after));
        let (page, more) = first_page(complete, self.buckets);
        let next = match (more, ended) {
            (true, _) => page.last().map(at_ms),
            (false, Some(_)) => {
                let last = self.last_complete(self.page_start(after_ms), complete_ms);
                Some(last.ok_or(MetricsError::TooMuch)?)
            }
            (false, None) => None,
        };
        Ok((page, next))
    }

    /// Start of the last time bucket that ends at or before a time, if it starts at or after `start_ms`.
    fn last_complete(&self, start_ms: u64, end_ms: u64) -> Option<u64> {
        let complete = end_ms.checked_sub(self.first_ms)? / self.step_ms.max(1);
        let last = complete.checked_sub(1)?.saturating_mul(self.step_ms);
        Some(self.first_ms.saturating_add(last)).filter(|last| *last >= start_ms)
    }

    /// Plans a chart: chooses the shortest time buckets of which at most `points` overlap the range, and the coarsest
    /// resolution that can fill them. If the range begins before the retention of that resolution (`kept_since`), a
    /// coarser resolution is used.
    ///
    /// The number of documents to read depends on the points, not on the length of the range. A time bucket is computed
    /// from at most 12 rollups, or from rows if it is shorter than five minutes.
    pub(crate) fn plan(
        range: TimeRange,
        points: Points,
        offset_ms: i64,
        kept_since: impl Fn(Resolution) -> u64,
    ) -> Self {
        let mut chart = Self::finest(range, points, offset_ms, SECOND);
        for coarser in [Resolution::FiveMinutes, Resolution::Hour, Resolution::Day] {
            if kept_since(chart.resolution) <= chart.first_ms {
                break;
            }
            if coarser > chart.resolution {
                chart = Self::finest(range, points, offset_ms, width_ms(coarser));
            }
        }
        chart
    }

    /// Plans a chart like [`Chart::plan`], but always from rows.
    pub(crate) fn of_rows(range: TimeRange, points: Points, offset_ms: i64) -> Self {
        Self {
            resolution: Resolution::Raw,
            ..Self::finest(range, points, offset_ms, SECOND)
        }
    }

    /// Returns the length of the shortest time buckets, at least this long, of which at most `points` overlap the
    /// range.
    fn finest(range: TimeRange, points: Points, offset_ms: i64, at_least: u64) -> Self {
        let most = u64::from(points.get());
        let mut steps = LADDER.into_iter().filter(|&step| step >= at_least);
        let mut step_ms = steps.next().unwrap_or(DAY);
        loop {
            let first_ms = bucket_start(range.from_ms(), step_ms, offset_ms);
            let last_ms = bucket_start(range.to_ms() - 1, step_ms, offset_ms);
            // Round up, because a UTC offset shortens the first time bucket of 1970.
            let buckets = (last_ms - first_ms).div_ceil(step_ms) + 1;
            if buckets <= most {
                return Self {
                    resolution: coarsest(step_ms),
                    first_ms,
                    step_ms,
                    buckets: usize::try_from(buckets).unwrap_or(usize::MAX),
                };
            }
            // A range that crosses a bucket boundary overlaps one time bucket more than its length suggests, so
            // lengthen the time buckets until few enough overlap.
            step_ms = steps.next().unwrap_or_else(|| {
                let days = range
                    .length_ms()
                    .div_ceil(most * DAY)
                    .max(step_ms / DAY + step_ms / DAY / 8 + 1);
                days * DAY
            });
        }
    }

    /// End of the last time bucket, in Unix milliseconds.
    pub(crate) fn end_ms(&self) -> u64 {
        self.first_ms + self.step_ms * self.buckets as u64
    }

    /// Index of the time bucket that contains a time.
    pub(crate) fn index(&self, at_ms: u64) -> Option<usize> {
        let index = usize::try_from(at_ms.checked_sub(self.first_ms)? / self.step_ms).ok()?;
        (index < self.buckets).then_some(index)
    }

    /// Start of the time bucket with this index, in Unix milliseconds.
    pub(crate) fn start_ms(&self, index: usize) -> u64 {
        self.first_ms + self.step_ms * index as u64
    }
}

fn coarsest(step_ms: u64) -> Resolution {
    let all = [Resolution::Day, Resolution::Hour, Resolution::FiveMinutes];
    all.into_iter()
        .find(|&resolution| width_ms(resolution) <= step_ms)
        .unwrap_or(Resolution::Raw)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Current time in these tests: 2026-11-24T00:00:00Z in Unix milliseconds.
    const NOW: u64 = 1_795_478_400_000;

    fn chart(back_ms: u64, points: u64) -> Chart {
        let range = TimeRange::new(NOW - back_ms, NOW).unwrap();
        Chart::plan(range, Points::new(points).unwrap(), 0, |_| 0)
    }

    fn drawn(back_ms: u64, points: u64) -> (Resolution, u64, usize) {
        let chart = chart(back_ms, points);
        (chart.resolution, chart.step_ms, chart.buckets)
    }

    #[test]
    fn chart_resolution_depends_on_number_of_points() {
        assert_eq!(drawn(15 * MINUTE, 300), (Resolution::Raw, 5 * SECOND, 180));
        assert_eq!(drawn(HOUR, 300), (Resolution::Raw, 15 * SECOND, 240));
        assert_eq!(drawn(DAY, 300), (Resolution::FiveMinutes, 5 * MINUTE, 288));
        assert_eq!(drawn(7 * DAY, 300), (Resolution::Hour, HOUR, 168));
        assert_eq!(drawn(30 * DAY, 300), (Resolution::Hour, 3 * HOUR, 240));
        assert_eq!(drawn(365 * DAY, 300), (Resolution::Day, 2 * DAY, 183));
        assert_eq!(drawn(3650 * DAY, 300), (Resolution::Day, 13 * DAY, 282));
    }

    #[test]
    fn chart_uses_coarser_resolution_beyond_retention() {
        let range = TimeRange::new(NOW - 400 * DAY, NOW - 400 * DAY + HOUR).unwrap();
        let kept_since = |resolution| match resolution {
            Resolution::Raw => NOW - 30 * DAY,
            Resolution::FiveMinutes => NOW - 90 * DAY,
            Resolution::Hour => NOW - 1095 * DAY,
            Resolution::Day => 0,
        };
        let chart = Chart::plan(range, Points::default(), 0, kept_since);
        assert_eq!(
            (chart.resolution, chart.step_ms, chart.buckets),
            (Resolution::Hour, HOUR, 1)
        );
    }

    #[test]
    fn chart_days_are_aligned_to_local_time() {
        // 00:30 on 2026-11-24 at UTC offset +08:00 is 16:30 of the previous day in UTC.
        let at = NOW - 8 * HOUR + 30 * MINUTE;
        let offset_ms = 8 * 3_600_000;
        assert_eq!(bucket_start(at, DAY, offset_ms), NOW - 8 * HOUR);
        assert_eq!(bucket_start(at, DAY, 0), NOW - DAY);
        assert_eq!(bucket_start(5, DAY, 0), 0);
    }

    proptest! {
        #[test]
        fn chart_buckets_cover_the_range_and_respect_the_limit(
            from in 0_u64..253_402_300_799_999, length in 1_u64..40_000_000_000_000, points in 1_u64..=2000,
            offset in -18 * 60_i64..=18 * 60, kept in proptest::option::of(0_u64..253_402_300_799_999),
        ) {
            let Some(range) = TimeRange::new(from, from.saturating_add(length).min(253_402_300_799_999)) else {
                return Ok(());
            };
            let offset_ms = offset * 60_000;
            let chart = Chart::plan(range, Points::new(points).unwrap(), offset_ms, |_| kept.unwrap_or(0));
            prop_assert!(chart.buckets >= 1 && chart.buckets as u64 <= points);
            prop_assert!(chart.first_ms <= range.from_ms() && chart.end_ms() >= range.to_ms());
            prop_assert_eq!(chart.step_ms % width_ms(chart.resolution), 0);
            prop_assert_eq!(chart.index(range.to_ms() - 1), Some(chart.buckets - 1));
            prop_assert_eq!(chart.index(range.from_ms()), Some(0));
            prop_assert_eq!(chart.index(chart.end_ms()), None);
        }
    }
}
