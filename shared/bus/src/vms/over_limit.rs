//! Keeps which VMs recently sent more than a limit of one VM allows, and since when.

use std::collections::BTreeMap;

use vmwatch_api::{
    InstanceId,
    agents::{AgentFault, VmLimit},
    events::OverLimitEvent,
};

/// Maximum number of VMs that are kept; they take about 3 MB.
const MAX_VMS: usize = 10_000;
/// A VM counts as above a limit until it has been within the limit for this time.
const WITHIN_MS: u64 = 300_000;

/// The VMs that are above a limit.
#[derive(Debug, Default)]
pub(super) struct OverLimits {
    vms: BTreeMap<InstanceId, LimitsOfVm>,
}

/// The limits that a VM is above.
#[derive(Debug, Default)]
pub(super) struct LimitsOfVm(BTreeMap<VmLimit, Over>);

#[derive(Debug, Clone, Copy)]
struct Over {
    since_ms: u64,
    /// When this was last noticed.
    at_ms: u64,
}

impl OverLimits {
    /// Adds that a VM is above a limit. Returns since when it has been; `None` if [`MAX_VMS`] others are.
    pub(super) fn note(&mut self, event: &OverLimitEvent) -> Option<u64> {
        if !self.vms.contains_key(&event.instance_id) {
            if self.vms.len() >= MAX_VMS {
                self.vms.retain(|_, of_vm| of_vm.is_recent(event.at_ms));
            }
            if self.vms.len() >= MAX_VMS {
                return None;
            }
        }
        let of_vm = self.vms.entry(event.instance_id.clone()).or_default();
        let over = of_vm.0.entry(event.limit).or_insert(Over {
            since_ms: event.since_ms,
            at_ms: event.at_ms,
        });
        // Each replica notices it at another time.
        over.since_ms = if over.is_recent(event.at_ms) {
            over.since_ms.min(event.since_ms)
        } else {
            event.since_ms
        };
        over.at_ms = over.at_ms.max(event.at_ms);
        Some(over.since_ms)
    }

    pub(super) fn remove(&mut self, id: &InstanceId) {
        self.vms.remove(id);
    }

    pub(super) fn get(&self, id: &InstanceId) -> Option<&LimitsOfVm> {
        self.vms.get(id)
    }
}

impl LimitsOfVm {
    fn is_recent(&self, now_ms: u64) -> bool {
        self.0.values().any(|over| over.is_recent(now_ms))
    }

    /// One fault per limit that the VM is above.
    pub(super) fn faults(&self, now_ms: u64) -> impl Iterator<Item = AgentFault> {
        let recent = self.0.iter().filter(move |(_, over)| over.is_recent(now_ms));
        recent.map(move |(limit, over)| AgentFault::OverLimit {
            limit: *limit,
            for_ms: now_ms.saturating_sub(over.since_ms),
        })
    }
}

impl Over {
    const fn is_recent(self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.at_ms) < WITHIN_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn event(id: &str, limit: VmLimit, since_ms: u64, at_ms: u64) -> OverLimitEvent {
        OverLimitEvent {
            instance_id: id.parse().unwrap(),
            limit,
            since_ms,
            at_ms,
        }
    }

    #[test]
    fn vm_is_above_a_limit_until_it_was_within_it_for_some_time() {
        let mut limits = OverLimits::default();
        let mut note = |limit, since_ms, at_ms| limits.note(&event("vm-1", limit, since_ms, at_ms));
        assert_eq!(note(VmLimit::Rows, NOW, NOW), Some(NOW));
        let later = NOW + WITHIN_MS - 1;
        assert_eq!(note(VmLimit::Rows, later, later), Some(NOW));
        // Another replica noticed it earlier.
        assert_eq!(note(VmLimit::Rows, NOW - 7, later - 1), Some(NOW - 7));
        assert_eq!(note(VmLimit::Waiting, later, later), Some(later));
        let id = "vm-1".parse().unwrap();
        let faults = |now_ms| {
            let of_vm = limits.get(&id).unwrap();
            of_vm.faults(now_ms).collect::<Vec<_>>()
        };
        let over = |limit, for_ms| AgentFault::OverLimit { limit, for_ms };
        let end = later + WITHIN_MS;
        assert_eq!(
            faults(end - 1),
            [
                over(VmLimit::Rows, end - 1 - (NOW - 7)),
                over(VmLimit::Waiting, WITHIN_MS - 1)
            ]
        );
        assert_eq!(faults(end), []);
        assert_eq!(
            limits.note(&event("vm-1", VmLimit::Rows, end, end)),
            Some(end),
            "it was within the limit meanwhile"
        );
        limits.remove(&id);
        assert!(limits.get(&id).is_none());
    }

    #[test]
    fn number_of_vms_is_limited() {
        let mut limits = OverLimits::default();
        let mut note =
            |id: usize, at_ms| limits.note(&event(&format!("vm-{id}"), VmLimit::Rows, at_ms, at_ms));
        assert!((0..MAX_VMS).all(|id| note(id, NOW).is_some()));
        assert_eq!(note(MAX_VMS, NOW + WITHIN_MS - 1), None);
        let later = NOW + WITHIN_MS;
        assert_eq!(note(MAX_VMS, later), Some(later), "old entries make room");
    }
}
