//! The times in which silence does not count, because vmwatch could not receive samples or did not check.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// If nothing was checked for this time, the whole time since the last check does not count.
const LONGEST_CHECK_MS: u64 = 10_000;
/// Time after a standstill in which silence does not count yet, because agents connect again and send what waits.
const GRACE_MS: u64 = 30_000;
/// Intervals that ended before this time are forgotten. No rule has a duration of more than a day.
const KEEP_MS: u64 = 2 * 86_400_000;
/// Maximum number of intervals. Beyond it, the two oldest become one, so that less time counts as silence.
const MAX_INTERVALS: usize = 200;

/// A time in which silence does not count, Unix milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Interval {
    from_ms: u64,
    to_ms: u64,
}

/// All such times, oldest first. They are stored, so that a restarted alert-svc knows them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::engine) struct Standstills {
    intervals: VecDeque<Interval>,
    checked_ms: u64,
}

impl Standstills {
    /// Notes a check. `stands_since_ms` is the beginning of the standstill, if there is one.
    pub(in crate::engine) fn check(&mut self, now_ms: u64, stands_since_ms: Option<u64>) {
        // Nothing is known of the time before the first check.
        if now_ms.saturating_sub(self.checked_ms) > LONGEST_CHECK_MS {
            self.add(self.checked_ms, now_ms);
        }
        if let Some(since_ms) = stands_since_ms {
            self.add(since_ms, now_ms + GRACE_MS);
        }
        self.checked_ms = self.checked_ms.max(now_ms);
        while self
            .intervals
            .front()
            .is_some_and(|first| first.to_ms + KEEP_MS < now_ms)
        {
            self.intervals.pop_front();
        }
    }

    /// How much of the time from `from_ms` to `now_ms` counts.
    pub(in crate::engine) fn counted_ms(&self, from_ms: u64, now_ms: u64) -> u64 {
        let overlap = |one: &Interval| {
            let (from, to) = (one.from_ms.max(from_ms), one.to_ms.min(now_ms));
            to.saturating_sub(from)
        };
        let standing: u64 = self.intervals.iter().rev().map(overlap).sum();
        now_ms.saturating_sub(from_ms).saturating_sub(standing)
    }

    /// Number of the intervals, and when the last check was.
    pub(in crate::engine) fn state(&self) -> (usize, u64) {
        (self.intervals.len(), self.checked_ms)
    }

    fn add(&mut self, mut from_ms: u64, mut to_ms: u64) {
        while let Some(last) = self
            .intervals
            .back()
            .copied()
            .filter(|last| last.to_ms >= from_ms)
        {
            from_ms = from_ms.min(last.from_ms);
            to_ms = to_ms.max(last.to_ms);
            self.intervals.pop_back();
        }
        self.intervals.push_back(Interval { from_ms, to_ms });
        if self.intervals.len() > MAX_INTERVALS
            && let (Some(first), Some(second)) = (self.intervals.pop_front(), self.intervals.pop_front())
        {
            self.intervals.push_front(Interval {
                from_ms: first.from_ms,
                to_ms: second.to_ms,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1_000_000_000;

    /// Checks once per second from `from_s` to `to_s` seconds after the start.
    fn check(standstills: &mut Standstills, from_s: u64, to_s: u64, since_s: Option<u64>) {
        for second in from_s..=to_s {
            standstills.check(START + second * 1000, since_s.map(|since| START + since * 1000));
        }
    }

    #[test]
    fn time_before_the_first_check_does_not_count() {
        let mut standstills = Standstills::default();
        check(&mut standstills, 0, 100, None);
        assert_eq!(standstills.counted_ms(START - 500_000, START + 100_000), 100_000);
    }

    #[test]
    fn standstill_does_not_count_from_its_beginning_on() {
        let mut standstills = Standstills::default();
        check(&mut standstills, 0, 100, None);
        // Noticed after a minute, because only then a sample has waited for a minute.
        check(&mut standstills, 101, 700, Some(40));
        check(&mut standstills, 701, 800, None);
        // 40 s before the standstill, 100 s after it, of which 30 s are grace.
        assert_eq!(standstills.counted_ms(START, START + 800_000), 40_000 + 70_000);
        assert_eq!(standstills.counted_ms(START + 650_000, START + 720_000), 0);
        assert_eq!(standstills.state(), (2, START + 800_000));
    }

    #[test]
    fn time_in_which_alert_svc_was_down_does_not_count_after_a_restart() {
        let mut standstills = Standstills::default();
        check(&mut standstills, 0, 100, None);
        let stored = serde_json::to_string(&standstills).unwrap();
        let mut restarted: Standstills = serde_json::from_str(&stored).unwrap();
        check(&mut restarted, 700, 750, None);
        assert_eq!(
            restarted.counted_ms(START + 90_000, START + 750_000),
            10_000 + 50_000
        );
    }

    #[test]
    fn number_of_intervals_is_bounded_and_less_time_counts_then() {
        let mut standstills = Standstills::default();
        for hour in 0..300 {
            let at = hour * 600;
            check(&mut standstills, at, at, Some(at));
        }
        let (intervals, _) = standstills.state();
        assert!(intervals <= MAX_INTERVALS);
        assert!(standstills.counted_ms(START, START + 300 * 600_000) < 300 * 600_000);
    }
}
