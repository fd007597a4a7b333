//! Keeps the reasons why recent samples of VMs were not stored, by VM.

use std::collections::BTreeMap;

use vmwatch_api::{
    InstanceId,
    agents::AgentFault,
    events::{UnstoredEvent, UnstoredReason},
};

/// Maximum number of VMs whose reasons are kept; they take about 2 MB.
const MAX_VMS: usize = 10_000;
/// A reason is reported until this time after the last sample that was not stored.
const REPORTED_MS: u64 = 600_000;

/// The VMs with recent samples that were not stored.
#[derive(Debug, Default)]
pub(super) struct Unstored {
    vms: BTreeMap<InstanceId, Last>,
}

/// The last sample of a VM that was not stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Last {
    at_ms: u64,
    arrived_ms: u64,
    reason: UnstoredReason,
}

impl Unstored {
    /// Adds a sample that was not stored. Returns `false` if there are [`MAX_VMS`] other VMs.
    pub(super) fn note(&mut self, event: &UnstoredEvent) -> bool {
        let last = Last {
            at_ms: event.at_ms,
            arrived_ms: event.arrived_ms,
            reason: event.reason,
        };
        if let Some(known) = self.vms.get_mut(&event.instance_id) {
            if known.arrived_ms <= last.arrived_ms {
                *known = last;
            }
            return true;
        }
        if self.vms.len() >= MAX_VMS {
            self.vms.retain(|_, known| known.is_recent(last.arrived_ms));
        }
        if self.vms.len() >= MAX_VMS {
            return false;
        }
        self.vms.insert(event.instance_id.clone(), last);
        true
    }

    /// Notes that a sample of the VM that arrived at this time was stored.
    pub(super) fn stored(&mut self, id: &InstanceId, arrived_ms: u64) {
        if self
            .vms
            .get(id)
            .is_some_and(|known| known.arrived_ms < arrived_ms)
        {
            self.vms.remove(id);
        }
    }

    pub(super) fn remove(&mut self, id: &InstanceId) {
        self.vms.remove(id);
    }

    /// When the last sample of the VM that was not stored arrived; `None` if a later one was stored.
    pub(super) fn last_arrived_ms(&self, id: &InstanceId) -> Option<u64> {
        self.vms.get(id).map(|last| last.arrived_ms)
    }

    /// Why the last sample of the VM was not stored; `None` if it was stored or is not recent.
    pub(super) fn fault(&self, id: &InstanceId, now_ms: u64) -> Option<AgentFault> {
        let last = self.vms.get(id).filter(|last| last.is_recent(now_ms))?;
        match last.reason {
            UnstoredReason::Expired => Some(AgentFault::ExpiredRows {
                age_ms: last.arrived_ms.saturating_sub(last.at_ms),
            }),
            UnstoredReason::Ahead => Some(AgentFault::DateAhead {
                ahead_ms: last.at_ms.saturating_sub(last.arrived_ms),
            }),
            UnstoredReason::Unknown => None,
        }
    }
}

impl Last {
    const fn is_recent(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.arrived_ms) < REPORTED_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn event(id: &str, arrived_ms: u64, reason: UnstoredReason, at_ms: u64) -> UnstoredEvent {
        UnstoredEvent {
            instance_id: id.parse().unwrap(),
            at_ms,
            arrived_ms,
            reason,
        }
    }

    #[test]
    fn reason_is_reported_until_a_sample_is_stored_or_time_has_passed() {
        let (mut unstored, id) = (Unstored::default(), "vm-1".parse().unwrap());
        assert!(unstored.note(&event("vm-1", NOW, UnstoredReason::Expired, NOW - 5000)));
        let expired = Some(AgentFault::ExpiredRows { age_ms: 5000 });
        assert_eq!(unstored.fault(&id, NOW), expired);
        assert_eq!(unstored.fault(&id, NOW + REPORTED_MS - 1), expired);
        assert_eq!(unstored.fault(&id, NOW + REPORTED_MS), None);
        // Replicas may process messages in another order.
        assert!(unstored.note(&event("vm-1", NOW - 1, UnstoredReason::Ahead, NOW + 7000)));
        unstored.stored(&id, NOW);
        assert_eq!(unstored.fault(&id, NOW), expired);
        assert!(unstored.note(&event("vm-1", NOW + 1, UnstoredReason::Ahead, NOW + 7001)));
        assert_eq!(
            unstored.fault(&id, NOW + 1),
            Some(AgentFault::DateAhead { ahead_ms: 7000 })
        );
        unstored.stored(&id, NOW + 2);
        assert_eq!(unstored.fault(&id, NOW + 2), None);
    }

    #[test]
    fn number_of_vms_is_limited() {
        let mut unstored = Unstored::default();
        let mut note =
            |id: usize, at: u64| unstored.note(&event(&format!("vm-{id}"), at, UnstoredReason::Expired, 1));
        assert!((0..MAX_VMS).all(|id| note(id, NOW)));
        assert!(!note(MAX_VMS, NOW + REPORTED_MS - 1));
        assert!(note(MAX_VMS, NOW + REPORTED_MS), "old reasons make room");
    }
}
