//! Token buckets, each kept as one number: the moment at which it would be full again (the generic cell rate algorithm).

use std::time::Duration;

/// The size of a bucket and how fast it fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// Nanoseconds in which a token comes.
    each: u64,
    /// Nanoseconds in which an empty bucket fills.
    whole: u64,
}

impl Bucket {
    /// A bucket of so many tokens, of which one comes in each interval.
    pub(crate) fn new(tokens: u32, interval: Duration) -> Self {
        let each = nanoseconds(interval).max(1);
        Self {
            each,
            whole: each.saturating_mul(u64::from(tokens)),
        }
    }

    /// When a bucket is full again if a token is taken now, or how long until there is one. Moments are nanoseconds
    /// from any beginning.
    pub(crate) fn take(self, full_at: u64, now: u64) -> Result<u64, Duration> {
        let next = full_at.max(now).saturating_add(self.each);
        match (next - now).checked_sub(self.whole) {
            None | Some(0) => Ok(next),
            Some(missing) => Err(Duration::from_nanos(missing)),
        }
    }
}

/// A duration as the buckets count it.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    /// How many of so many tries at one moment get a token.
    fn at_once(bucket: Bucket, full_at: &mut u64, now: u64) -> usize {
        let tries = (0..1_000).filter(|_| match bucket.take(*full_at, now) {
            Ok(next) => {
                *full_at = next;
                true
            }
            Err(_) => false,
        });
        tries.count()
    }

    #[test]
    fn a_burst_is_bounded_and_comes_back_with_time() {
        let bucket = Bucket::new(100, Duration::from_millis(10));
        let mut full_at = 0;
        assert_eq!(at_once(bucket, &mut full_at, 0), 100);
        assert_eq!(at_once(bucket, &mut full_at, 30 * MILLISECOND), 3);
        assert_eq!(at_once(bucket, &mut full_at, 10_000 * MILLISECOND), 100);
    }

    #[test]
    fn a_refusal_says_when_the_next_token_comes() {
        let bucket = Bucket::new(1, Duration::from_secs(1));
        let full_at = bucket.take(0, 0).unwrap();
        let wait = bucket.take(full_at, 300 * MILLISECOND).unwrap_err();
        assert_eq!(wait, Duration::from_millis(700));
        assert!(bucket.take(full_at, 1_000 * MILLISECOND).is_ok());
    }
}
