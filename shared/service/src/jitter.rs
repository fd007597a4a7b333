//! Random delays that keep thousands of programs from acting at the same time.

use std::time::Duration;

/// A random duration from `share` (0 to 1) of the given duration up to all of it.
pub fn jittered(whole: Duration, share: f64) -> Duration {
    // Without a random source, the middle is used; only the spread is lost.
    let random = getrandom::u32().map_or(0.5, |bits| f64::from(bits) / f64::from(u32::MAX));
    whole.mul_f64(share + (1.0 - share) * random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jittered_wait_stays_within_its_bounds() {
        let whole = Duration::from_secs(10);
        let waits: Vec<_> = (0..100).map(|_| jittered(whole, 0.5)).collect();
        assert!(waits.iter().all(|wait| (whole / 2..=whole).contains(wait)));
        assert!(waits.iter().any(|wait| *wait != waits[0]));
    }
}
