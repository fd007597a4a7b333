//! Looks for VMs that were removed, of which nothing is kept.

use vmwatch_api::InstanceId;

use super::vms::GONE_MS;
use crate::{engine::Engine, known_vms::Power};

/// Number of ticks after which all VMs are looked at, and the first tick at which they are.
const SWEEP_TICKS: u64 = 3600;
const FIRST_SWEEP: u64 = 10;

impl Engine {
    /// Checks the VMs that have sent nothing for some time and that no hypervisor has, one per tick.
    pub(super) fn check_removed(&mut self, now_ms: u64) {
        if self.ticks % SWEEP_TICKS == FIRST_SWEEP {
            self.suspects = self.quiet_vms(now_ms);
        }
        if let Some(vm) = self.suspects.pop() {
            self.checks.verdict(&vm, Power::Unlisted, now_ms);
        }
    }

    fn quiet_vms(&self, now_ms: u64) -> Vec<InstanceId> {
        let known = &self.setup.known;
        let quiet = self.samples.iter().filter(|(vm, samples)| {
            now_ms.saturating_sub(samples.arrived_ms) > GONE_MS && known.power(vm) == Power::Unlisted
        });
        quiet.map(|(vm, _)| vm.clone()).collect()
    }
}
