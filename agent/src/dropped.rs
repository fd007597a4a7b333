//! Counts dropped parts. An agent's metrics are on its guest's loopback interface, where no monitoring collects them,
//! so the count is also sent with the next sample. It is a lower bound, because the part that carries it may be dropped
//! as well.

use std::sync::atomic::{AtomicU32, Ordering};

use metrics::counter;

/// The count that no sample has carried yet.
static UNTOLD: AtomicU32 = AtomicU32::new(0);

/// Counts dropped parts.
pub(crate) fn note(reason: &'static str, parts: u64) {
    counter!("vmwatch_agent_parts_dropped_total", "reason" => reason).increment(parts);
    give_back(u32::try_from(parts).unwrap_or(u32::MAX));
}

/// Takes the count for a sample.
pub(crate) fn take() -> u32 {
    UNTOLD.swap(0, Ordering::Relaxed)
}

/// Restores the count of a sample that could not be sent.
pub(crate) fn give_back(parts: u32) {
    // The update always succeeds.
    let _ = UNTOLD.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |untold| {
        Some(untold.saturating_add(parts))
    });
}
