//! Randomness that keeps thousands of agents from acting at one instant.

use std::time::Duration;

/// From `share` of the duration up to the whole of it.
pub(crate) fn jittered(whole: Duration, share: f64) -> Duration {
    whole.mul_f64(share + (1.0 - share) * fraction())
}

/// A random number from 0 up to 1. Where the system has no randomness, the middle.
fn fraction() -> f64 {
    getrandom::u32().map_or(0.5, |bits| f64::from(bits) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_between_its_bounds_and_differs() {
        let whole = Duration::from_secs(10);
        let waits: Vec<_> = (0..100).map(|_| jittered(whole, 0.5)).collect();
        assert!(waits.iter().all(|wait| (whole / 2..=whole).contains(wait)));
        assert!(waits.iter().any(|wait| *wait != waits[0]));
    }
}
