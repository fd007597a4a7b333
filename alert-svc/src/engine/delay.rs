//! Distinguishes a VM whose clock is slow from an agent that sends samples from its spool. It does no I/O.
//!
//! In both cases samples arrive long after their time. While an agent sends its spool, this delay shrinks with every
//! sample. With a slow clock it stays the same.

/// Maximum change of a steady delay, in milliseconds. Samples of a busy VM may arrive some seconds later than others.
const VARIATION_MS: u64 = 5000;
/// A delay is steady if it has been the same for this time, in milliseconds.
const STEADY_MS: u64 = 60_000;

/// The delay of a VM's samples, and since when it has been the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Delay {
    delay_ms: u64,
    /// When the first sample with this delay arrived, Unix milliseconds.
    since_ms: u64,
}

impl Delay {
    /// Notes the delay of the next sample. Returns the steady delay, if it is steady.
    pub(super) fn note(&mut self, delay_ms: u64, arrived_ms: u64) -> Option<u64> {
        if delay_ms.abs_diff(self.delay_ms) > VARIATION_MS {
            *self = Self {
                delay_ms,
                since_ms: arrived_ms,
            };
        }
        let is_steady = arrived_ms.saturating_sub(self.since_ms) >= STEADY_MS;
        is_steady.then_some(self.delay_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1_000_000_000;

    /// Notes a sample per pair of seconds: its delay, and when it arrived. Returns the last steady delay.
    fn last(samples: impl IntoIterator<Item = (u64, u64)>) -> Option<u64> {
        let mut delay = Delay::default();
        let noted = samples
            .into_iter()
            .map(|(late, arrived)| delay.note(late * 1000, START + arrived * 1000));
        noted.last().unwrap()
    }

    #[test]
    fn delay_is_steady_after_a_minute() {
        let slow = |seconds| {
            (0..=seconds)
                .step_by(10)
                .map(|second| (3600 + second % 3, second))
        };
        assert_eq!(last(slow(50)), None);
        assert_eq!(last(slow(60)), Some(3_600_000));
        // The clock is set to another wrong time.
        assert_eq!(last(slow(60).chain([(1800, 70)])), None);
        assert_eq!(last(slow(60).chain([(1800, 70), (1800, 130)])), Some(1_800_000));
    }

    #[test]
    fn delay_of_a_spool_is_not_steady() {
        // Taken every 10 s, sent as fast as possible, every second, or twice as fast as they were taken.
        for sent_ms in [5, 1000, 5000] {
            let sent = |sample: u64| {
                let arrived = sample * sent_ms / 1000;
                (3600 - sample * 10 + arrived, arrived)
            };
            assert_eq!(last((0..200).map(sent)), None, "{sent_ms}");
        }
        // The last samples before the agent lost the connection for hours, and the first ones of its spool.
        assert_eq!(last([(0, 0), (0, 10), (7200, 7220), (7190, 7220)]), None);
    }
}
