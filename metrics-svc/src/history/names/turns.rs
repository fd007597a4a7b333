//! The order in which the process names of VMs are updated: a VM whose update took too long does not delay the others.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use vmwatch_api::InstanceId;

/// Pause before the next update of a slow VM.
const PAUSE: Duration = Duration::from_secs(15);
/// Maximum number of VMs that are remembered as slow. Beyond that all are forgotten.
const MAX_SLOW: usize = 4096;

/// The VMs whose last update took too long, and when it ended.
#[derive(Debug, Default)]
pub(in super::super) struct Turns {
    slow: Mutex<HashMap<InstanceId, Instant>>,
}

impl Turns {
    /// The VMs in the order of their turns: slow ones come last, and among them the one that has waited longest comes
    /// first. Slow VMs whose pause has not ended are left out.
    pub(super) fn order<T>(&self, vms: BTreeMap<InstanceId, T>) -> Vec<(InstanceId, T)> {
        let slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        let mut vms: Vec<_> = vms
            .into_iter()
            .map(|(instance, of_vm)| (slow.get(&instance).copied(), instance, of_vm))
            .filter(|(ended, ..)| ended.is_none_or(|ended| ended.elapsed() >= PAUSE))
            .collect();
        vms.sort_by_key(|(ended, ..)| *ended);
        let vms = vms.into_iter().map(|(_, instance, of_vm)| (instance, of_vm));
        vms.collect()
    }

    /// Ends the turn of a VM.
    pub(super) fn end(&self, instance: &InstanceId, is_finished: bool) {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        if is_finished {
            slow.remove(instance);
            return;
        }
        if slow.len() >= MAX_SLOW {
            slow.clear();
        }
        slow.insert(instance.clone(), Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(turns: &Turns, vms: [&str; 4]) -> Vec<String> {
        let vms = vms.map(|vm| (vm.parse().unwrap(), vm));
        let vms = turns.order(BTreeMap::from(vms));
        vms.into_iter().map(|(_, vm)| vm.to_owned()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn slow_vms_wait_and_come_last() {
        let turns = Turns::default();
        let vms = ["vm-1", "vm-2", "vm-3", "vm-4"];
        assert_eq!(order(&turns, vms), vms);
        for slow in ["vm-2", "vm-1"] {
            turns.end(&slow.parse().unwrap(), false);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(order(&turns, vms), ["vm-3", "vm-4"]);
        tokio::time::advance(PAUSE).await;
        assert_eq!(order(&turns, vms), ["vm-3", "vm-4", "vm-2", "vm-1"]);
        turns.end(&"vm-2".parse().unwrap(), true);
        assert_eq!(order(&turns, vms), ["vm-2", "vm-3", "vm-4", "vm-1"]);
    }
}
