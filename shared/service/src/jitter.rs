//! Randomness that keeps thousands of programs from acting at one instant.

use std::time::Duration;

/// At random from `share` of the duration (0 to 1) up to the whole of it.
pub fn jittered(whole: Duration, share: f64) -> Duration {
    // Where the system has no randomness, the middle: nothing is lost but the spread.
    let random = getrandom::u32().map_or(0.5, |bits| f64::from(bits) / f64::from(u32::MAX));
    whole.mul_f64(share + (1.0 - share) * random)
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
