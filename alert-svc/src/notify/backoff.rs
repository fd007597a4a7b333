//! Pauses between attempts.

use std::time::Duration;

use vmwatch_service::jitter::jittered;

/// The pause after the first failed attempt.
const SHORTEST: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST: Duration = Duration::from_mins(5);

/// The pause after this number of consecutive failed attempts. It doubles with each failure up to five minutes; its upper half is
/// random.
pub(super) fn pause(failures: u64) -> Duration {
    let doublings = u32::try_from(failures.saturating_sub(1))
        .unwrap_or(u32::MAX)
        .min(16);
    let whole = SHORTEST.saturating_mul(1 << doublings).min(LONGEST);
    jittered(whole, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_five_minutes() {
        for (failures, whole) in [
            (0, 1),
            (1, 1),
            (2, 2),
            (5, 16),
            (9, 256),
            (10, 300),
            (u64::MAX, 300),
        ] {
            let pause = pause(failures);
            let whole = Duration::from_secs(whole);
            assert!((whole / 2..=whole).contains(&pause), "{failures}: {pause:?}");
        }
    }
}
