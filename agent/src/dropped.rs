//! Counts sample parts that the agent dropped. An agent's own metrics are not collected, because they are available
//! only on the guest's loopback interface. Therefore the next sample contains the count. The count is a lower bound,
//! because the sample part that contains it may be dropped as well.

use std::sync::atomic::{AtomicU32, Ordering};

use metrics::counter;

/// The number of dropped sample parts that has not been included in a sample yet.
static UNTOLD: AtomicU32 = AtomicU32::new(0);

/// Counts dropped sample parts.
pub(crate) fn note(reason: &'static str, parts: u64) {
    counter!("vmwatch_agent_parts_dropped_total", "reason" => reason).increment(parts);
    give_back(u32::try_from(parts).unwrap_or(u32::MAX));
}

/// Takes the number of dropped sample parts, to include it in a sample.
pub(crate) fn take() -> u32 {
    UNTOLD.swap(0, Ordering::Relaxed)
}

/// Restores the number of dropped sample parts that was taken for a sample that could not be sent.
pub(crate) fn give_back(parts: u32) {
    // The update cannot fail, because the closure always returns a value.
    let _ = UNTOLD.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |untold| {
        Some(untold.saturating_add(parts))
    });
}
