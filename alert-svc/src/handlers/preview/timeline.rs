//! Computes from time buckets when a rule would have fired.

use vmwatch_api::{
    alerts::rules::{Direction, Firing, Threshold},
    history::Stat,
};

/// A time bucket of a VM. Buckets without samples are missing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Bucket {
    pub(super) from_ms: u64,
    pub(super) to_ms: u64,
    /// Minimum, mean and maximum of the measure; `None` if no sample has it.
    pub(super) stat: Option<Stat>,
}

/// A condition that holds for some time.
struct Held {
    since_ms: u64,
    peak: f64,
}

/// When a measure would have been beyond a threshold for the duration of a rule.
///
/// A condition with a duration must hold for each sample, so all values of a bucket must be beyond the threshold.
/// Without a duration, one value suffices. A bucket without samples changes nothing, as in the evaluation of samples.
pub(super) fn beyond(buckets: &[Bucket], threshold: Threshold, for_ms: u64, end_ms: u64) -> Vec<Firing> {
    let mut firings = Vec::new();
    let mut held: Option<Held> = None;
    for bucket in buckets {
        let Some(stat) = bucket.stat else { continue };
        let (most, least) = match threshold.direction() {
            Direction::Above => (stat.max, stat.min),
            Direction::Below => (stat.min, stat.max),
        };
        let value = if for_ms == 0 { most } else { least };
        if threshold.holds(value, held.is_some()) {
            let held = held.get_or_insert(Held {
                since_ms: bucket.from_ms,
                peak: most,
            });
            held.peak = match threshold.direction() {
                Direction::Above => held.peak.max(most),
                Direction::Below => held.peak.min(most),
            };
        } else if let Some(held) = held.take() {
            firings.extend(held.firing(for_ms, bucket.from_ms));
        }
    }
    firings.extend(held.and_then(|held| held.firing(for_ms, end_ms)));
    firings
}

impl Held {
    fn firing(&self, for_ms: u64, to_ms: u64) -> Option<Firing> {
        let from_ms = self.since_ms.saturating_add(for_ms);
        (from_ms <= to_ms).then_some(Firing {
            from_ms,
            to_ms,
            peak: Some(self.peak),
        })
    }
}

/// When the samples of a VM would have been missing for the duration of a rule. The time before the first sample does
/// not count.
pub(super) fn silent(buckets: &[Bucket], for_ms: u64, end_ms: u64) -> Vec<Firing> {
    let starts = buckets
        .iter()
        .skip(1)
        .map(|bucket| bucket.from_ms)
        .chain([end_ms]);
    let gaps = buckets.iter().map(|bucket| bucket.to_ms).zip(starts);
    gaps.filter(|(gap_ms, next_ms)| gap_ms < next_ms && gap_ms.saturating_add(for_ms) <= *next_ms)
        .map(|(gap_ms, to_ms)| Firing {
            from_ms: gap_ms.saturating_add(for_ms),
            to_ms,
            peak: None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Buckets of ten milliseconds with the minimum and the maximum of the measure.
    fn buckets(values: &[Option<(f64, f64)>]) -> Vec<Bucket> {
        let bucket = |(index, value): (usize, &Option<(f64, f64)>)| {
            let from_ms = 10 * index as u64;
            value.map(|(min, max)| Bucket {
                from_ms,
                to_ms: from_ms + 10,
                stat: Some(Stat {
                    min,
                    avg: f64::midpoint(min, max),
                    max,
                }),
            })
        };
        values.iter().enumerate().filter_map(bucket).collect()
    }

    fn times(firings: &[Firing]) -> Vec<(u64, u64)> {
        firings
            .iter()
            .map(|firing| (firing.from_ms, firing.to_ms))
            .collect()
    }

    #[test]
    fn condition_fires_once_it_held_for_the_duration() {
        let above = Threshold::new(Direction::Above, 90.0, Some(80.0)).unwrap();
        let high = Some((91.0, 95.0));
        let values = buckets(&[
            high,
            high,
            Some((85.0, 99.0)),
            Some((70.0, 99.0)),
            high,
            None,
            high,
        ]);
        let firings = beyond(&values, above, 20, 70);
        assert_eq!(times(&firings), [(20, 30), (60, 70)]);
        assert_eq!(firings[0].peak, Some(99.0));
        assert_eq!(times(&beyond(&values, above, 31, 70)), [(0, 0); 0]);
    }

    #[test]
    fn rule_without_duration_fires_for_one_value() {
        let above = Threshold::new(Direction::Above, 90.0, None).unwrap();
        let values = buckets(&[Some((1.0, 2.0)), Some((1.0, 99.0)), Some((1.0, 2.0))]);
        assert_eq!(times(&beyond(&values, above, 0, 30)), [(10, 20)]);
        let below = Threshold::new(Direction::Below, 1.5, None).unwrap();
        let firings = beyond(&values, below, 0, 30);
        assert_eq!(times(&firings), [(0, 30)]);
        assert_eq!(firings[0].peak, Some(1.0));
    }

    #[test]
    fn bucket_without_the_measure_changes_nothing() {
        let above = Threshold::new(Direction::Above, 90.0, None).unwrap();
        let mut values = buckets(&[Some((95.0, 95.0)), Some((0.0, 0.0)), Some((95.0, 95.0))]);
        values[1].stat = None;
        assert_eq!(times(&beyond(&values, above, 25, 30)), [(25, 30)]);
    }

    #[test]
    fn gaps_of_samples_fire_a_rule_about_silence() {
        let some = Some((1.0, 1.0));
        let values = buckets(&[None, some, None, None, some, some, None, some]);
        assert_eq!(times(&silent(&values, 15, 100)), [(35, 40), (95, 100)]);
        assert_eq!(times(&silent(&[], 15, 100)), [(0, 0); 0]);
    }
}
