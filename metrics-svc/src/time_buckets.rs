//! Time buckets of rollups and charts.

use vmwatch_api::history::Resolution;

const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Bucket length of a resolution in milliseconds. Raw rows have no bucket length; they count as one second.
pub(crate) const fn width_ms(resolution: Resolution) -> u64 {
    match resolution {
        Resolution::Raw => SECOND,
        Resolution::FiveMinutes => 5 * MINUTE,
        Resolution::Hour => HOUR,
        Resolution::Day => DAY,
    }
}

/// Returns the start of the time bucket that contains a time. Time buckets are aligned to multiples of their length in
/// local time, so that a day is a calendar day at the site of the deployment.
pub(crate) fn bucket_start(at_ms: u64, width_ms: u64, offset_ms: i64) -> u64 {
    let into = i128::from(at_ms) + i128::from(offset_ms);
    let rest = into.rem_euclid(i128::from(width_ms.max(1)));
    // The remainder is less than the width, so the conversion is exact. Times before 1970 become 0.
    at_ms.saturating_sub(u64::try_from(rest).unwrap_or(0))
}
