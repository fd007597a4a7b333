//! Removes rows that are past their retention when they arrive. They are not stored, because the database would delete
//! them at once, but they are counted, and the list of VMs shows why.

use std::time::{Duration, SystemTime};

use vmwatch_api::{
    InstanceId,
    events::{UnstoredEvent, UnstoredReason},
};

use crate::{
    documents::{Documents, ExpiredRows, SAMPLED_AT, millis_of},
    row_retention::RowRetention,
};

/// Removes the rows that are past their retention. `arrival` is when the sample arrived.
pub(super) fn remove(
    documents: &mut Documents,
    instance: &InstanceId,
    retention: &RowRetention,
    arrival: SystemTime,
) {
    let now_ms = millis_of(SystemTime::now());
    // All rows of a sample have the same effective date.
    let Some(at_ms) = effective_ms(documents) else {
        return;
    };
    let mut count = 0;
    let of_agent = documents.hypervisor.is_empty();
    for (kind, rows) in documents.each_mut() {
        if is_past(at_ms, now_ms, || retention.of(kind, instance)) {
            count += rows.len() as u64;
            rows.clear();
        }
    }
    let event = of_agent.then(|| UnstoredEvent {
        instance_id: instance.clone(),
        at_ms,
        arrived_ms: millis_of(arrival),
        reason: UnstoredReason::Expired,
    });
    documents.expired = (count > 0).then_some(ExpiredRows { count, event });
}

fn effective_ms(documents: &Documents) -> Option<u64> {
    let at = documents.first()?.get_datetime(SAMPLED_AT).ok()?;
    Some(u64::try_from(at.timestamp_millis()).unwrap_or(0))
}

/// Whether rows of this time are past their retention, which is determined only for rows that are older than the shortest
/// retention can be.
fn is_past(at_ms: u64, now_ms: u64, keep: impl FnOnce() -> Duration) -> bool {
    let age = Duration::from_millis(now_ms.saturating_sub(at_ms));
    age > Duration::from_secs(1) && age > keep()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_past_their_retention_only_when_older() {
        let keep = || Duration::from_mins(5);
        assert!(!is_past(1_000_000, 1_300_000, keep));
        assert!(is_past(1_000_000, 1_300_001, keep));
        assert!(!is_past(2_000_000, 1_000_000, keep), "the time is ahead");
    }
}
