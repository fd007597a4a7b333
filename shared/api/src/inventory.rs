//! The inventory: the VMs of all hypervisors, in a KV bucket. lifecycle-svc owns the bucket; other services follow it.
//!
//! The bucket has one key per VM and hypervisor and one key per hypervisor, and, while a VM is being started, the claim
//! of the operation that starts it. While nothing changes, nothing is written,
//! except that the key of each hypervisor is renewed once per [`RENEWAL`].

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::{InstanceId, actions::Refused, lifecycle::MachineState};

/// Name of the KV bucket.
pub const INVENTORY_BUCKET: &str = "vmwatch_inventory";
/// Interval at which [`InventoryHypervisor::listed_at_ms`] is renewed while nothing else about the hypervisor changes.
pub const RENEWAL: Duration = Duration::from_mins(1);

const VM_PREFIX: &str = "vm.";
const HYPERVISOR_PREFIX: &str = "hypervisor.";
const START_PREFIX: &str = "start.";

/// A VM as last listed by a hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InventoryVm {
    /// The hypervisor's name for the VM.
    pub name: String,
    pub state: MachineState,
    /// Labels that the hypervisor has for the VM.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The actions that the state does not allow; empty if an older version wrote the record.
    #[serde(default, skip_serializing_if = "Refused::is_empty")]
    pub refused: Refused,
    /// Time at which this record last changed, in Unix milliseconds.
    pub changed_at_ms: u64,
}

impl InventoryVm {
    /// Whether both records say the same about the VM; the date of the last change is ignored.
    pub fn is_same_as(&self, other: &Self) -> bool {
        (&self.name, self.state, &self.labels, &self.refused)
            == (&other.name, other.state, &other.labels, &other.refused)
    }
}

/// Whether the VMs of a hypervisor are up to date.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InventoryHypervisor {
    /// Whether the last attempt to list the VMs of the hypervisor succeeded.
    pub reachable: bool,
    /// Whether the hypervisor was asked for its VMs more than `interval_ms` ago and has not answered yet.
    #[serde(default)]
    pub late: bool,
    /// Time at which the VMs were last listed completely, in Unix milliseconds. While the hypervisor is reachable and
    /// not late, the VMs are listed every `interval_ms`, but this date is renewed only once per [`RENEWAL`].
    #[serde(default)]
    pub listed_at_ms: Option<u64>,
    /// Interval at which the VMs are listed, in milliseconds.
    pub interval_ms: u64,
    /// How long the hypervisor prevents that its VMs are started elsewhere once it is unreachable, in milliseconds; `None`
    /// if an older version wrote the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_ms: Option<u64>,
}

impl InventoryHypervisor {
    /// Whether the states of the hypervisor's VMs may be out of date: the hypervisor does not answer, answers late, or
    /// is no longer polled.
    pub fn is_silent(&self, now_ms: u64) -> bool {
        self.late || !self.is_reachable(now_ms)
    }

    /// Whether the hypervisor answered when its VMs were last listed, and is still polled.
    pub fn is_reachable(&self, now_ms: u64) -> bool {
        let renewal = u64::try_from(RENEWAL.as_millis()).unwrap_or(u64::MAX);
        let longest = self.interval_ms.saturating_add(renewal).saturating_mul(2);
        let is_recent = |at: u64| now_ms.saturating_sub(at) <= longest;
        self.reachable && self.listed_at_ms.is_some_and(is_recent)
    }

    /// Whether a VM of this hypervisor may run on it while the hypervisor does not answer. That is assumed until the
    /// hypervisor has been unreachable for `keep_ms`.
    pub fn may_run(&self, vm: &InventoryVm, keep_ms: u64, now_ms: u64) -> bool {
        let last = self.listed_at_ms.unwrap_or_default().max(vm.changed_at_ms);
        self.is_reachable(now_ms) || now_ms.saturating_sub(last) <= keep_ms
    }
}

/// A key of the KV bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InventoryKey<'a> {
    /// A VM of a hypervisor.
    Vm(&'a str, InstanceId),
    /// A hypervisor.
    Hypervisor(&'a str),
    /// The claim on starting a VM, which only lifecycle-svc reads.
    Start(InstanceId),
}

impl<'a> InventoryKey<'a> {
    /// Decodes a key; `None` if only a newer version of vmwatch knows such keys.
    pub fn read(key: &'a str) -> Option<Self> {
        if let Some(name) = key.strip_prefix(HYPERVISOR_PREFIX) {
            return Some(Self::Hypervisor(name));
        }
        if let Some(id) = key.strip_prefix(START_PREFIX) {
            return Some(Self::Start(id.parse().ok()?));
        }
        let (hypervisor, id) = key.strip_prefix(VM_PREFIX)?.rsplit_once('.')?;
        Some(Self::Vm(hypervisor, id.parse().ok()?))
    }
}

impl fmt::Display for InventoryKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(hypervisor, id) => write!(f, "{VM_PREFIX}{hypervisor}.{id}"),
            Self::Hypervisor(name) => write!(f, "{HYPERVISOR_PREFIX}{name}"),
            Self::Start(id) => write!(f, "{START_PREFIX}{id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inventory_key_is_decoded_as_encoded() {
        let vm = InventoryKey::Vm("lab-1", "vm_1".parse().unwrap());
        for (key, text) in [
            (vm, "vm.lab-1.vm_1"),
            (InventoryKey::Hypervisor("lab-1"), "hypervisor.lab-1"),
            (InventoryKey::Start("vm_1".parse().unwrap()), "start.vm_1"),
        ] {
            assert_eq!(key.to_string(), text);
            assert_eq!(InventoryKey::read(text), Some(key));
        }
        for other in ["", "vm", "vm.lab", "vm.lab.a b", "label.lab.vm-1"] {
            assert_eq!(InventoryKey::read(other), None, "{other}");
        }
    }

    #[test]
    fn vm_may_run_on_an_unreachable_hypervisor_for_a_limited_time() {
        let mut vm = InventoryVm {
            name: "web".to_owned(),
            state: MachineState::Running,
            labels: BTreeMap::new(),
            refused: Refused::new(),
            changed_at_ms: 1,
        };
        let mut hypervisor = InventoryHypervisor {
            reachable: false,
            late: false,
            listed_at_ms: Some(1_000_000),
            interval_ms: 5000,
            keep_ms: None,
        };
        assert!(hypervisor.may_run(&vm, 600_000, 1_600_000));
        assert!(!hypervisor.may_run(&vm, 600_000, 1_600_001));
        vm.changed_at_ms = 1_000_001;
        assert!(
            hypervisor.may_run(&vm, 600_000, 1_600_001),
            "listed later than renewed"
        );
        hypervisor.reachable = true;
        assert!(hypervisor.may_run(&vm, 0, 1_000_002), "listed, but no answer now");
    }

    #[test]
    fn hypervisor_is_silent_if_unreachable_late_or_not_polled() {
        let hypervisor = InventoryHypervisor {
            reachable: true,
            late: false,
            listed_at_ms: Some(1_000_000),
            interval_ms: 5000,
            keep_ms: None,
        };
        assert!(!hypervisor.is_silent(1_000_000 + 130_000));
        assert!(hypervisor.is_silent(1_000_000 + 130_001));
        let changed = |change: fn(&mut InventoryHypervisor)| {
            let mut changed = hypervisor.clone();
            change(&mut changed);
            changed.is_silent(1_000_000)
        };
        assert!(changed(|hypervisor| hypervisor.reachable = false));
        assert!(changed(|hypervisor| hypervisor.late = true));
        assert!(changed(|hypervisor| hypervisor.listed_at_ms = None));
    }
}
