//! Random delays, which keep thousands of programs from acting at the same moment.

use std::time::Duration;

/// Returns a random duration between `share` (0 to 1) times the given duration and the whole duration.
pub fn jittered(whole: Duration, share: f64) -> Duration {
    // If the random source fails, the middle of the range is used; programs then only lose the random spread.
    let random = getrandom::u32().map_or(0.5, |bits| f64::from(bits) / f64::from(u32::MAX));
    whole.mul_f64(share + (1.0 - share) * random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_delay_stays_within_its_bounds() {
        let whole = Duration::from_secs(10);
        let waits: Vec<_> = (0..100).map(|_| jittered(whole, 0.5)).collect();
        assert!(waits.iter().all(|wait| (whole / 2..=whole).contains(wait)));
        assert!(waits.iter().any(|wait| *wait != waits[0]));
    }
}
