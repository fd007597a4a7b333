//! Token buckets. A bucket stores only the time at which it will be full again (generic cell rate algorithm).

use std::time::Duration;

/// Capacity and refill rate of a token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// Nanoseconds in which the token bucket gains one token.
    each: u64,
    /// Nanoseconds in which an empty token bucket fills completely.
    whole: u64,
}

impl Bucket {
    /// A token bucket with this capacity that gains one token per interval.
    pub(crate) fn new(tokens: u32, interval: Duration) -> Self {
        let each = nanoseconds(interval).max(1);
        Self {
            each,
            whole: each.saturating_mul(u64::from(tokens)),
        }
    }

    /// Takes a token. Returns the new time at which the token bucket will be full, or how long to wait for the next
    /// token. All times are nanoseconds since an arbitrary origin.
    pub(crate) fn take(self, full_at: u64, now: u64) -> Result<u64, Duration> {
        let next = full_at.max(now).saturating_add(self.each);
        match (next - now).checked_sub(self.whole) {
            None | Some(0) => Ok(next),
            Some(missing) => Err(Duration::from_nanos(missing)),
        }
    }
}

/// Converts a duration to nanoseconds; durations too long for `u64` become its maximum.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    /// Attempts to take 1,000 tokens at the same time; returns how many attempts succeed.
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
    fn token_bucket_bounds_bursts_and_refills() {
        let bucket = Bucket::new(100, Duration::from_millis(10));
        let mut full_at = 0;
        assert_eq!(at_once(bucket, &mut full_at, 0), 100);
        assert_eq!(at_once(bucket, &mut full_at, 30 * MILLISECOND), 3);
        assert_eq!(at_once(bucket, &mut full_at, 10_000 * MILLISECOND), 100);
    }

    #[test]
    fn empty_token_bucket_returns_wait_until_next_token() {
        let bucket = Bucket::new(1, Duration::from_secs(1));
        let full_at = bucket.take(0, 0).unwrap();
        let wait = bucket.take(full_at, 300 * MILLISECOND).unwrap_err();
        assert_eq!(wait, Duration::from_millis(700));
        assert!(bucket.take(full_at, 1_000 * MILLISECOND).is_ok());
    }
}
