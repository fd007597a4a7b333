//! What lifecycle-svc knows about VMs: names, hypervisors, states and labels. The KV buckets are followed.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    InstanceId,
    alerts::rules::VmSelector,
    inventory::INVENTORY_BUCKET,
    labels::{HYPERVISOR_LABEL, LABELS_BUCKET},
    lifecycle::MachineState,
};
use vmwatch_bus::{
    Bus,
    follow::Follower,
    vms::{InventoryTable, LabelTable},
};

/// A copy in memory is stale if its KV bucket was last confirmed to be current longer ago than this.
const STALE_AFTER: Duration = Duration::from_secs(10);

/// The VMs of hypervisors and the labels of VMs, in memory. Clones share the copies.
#[derive(Clone)]
pub(crate) struct KnownVms {
    inventory: Follower<InventoryTable>,
    labels: Follower<LabelTable>,
}

/// What an alert shows of a VM, and by what rules select it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct VmFacts {
    /// The name on the first hypervisor that has the VM.
    pub(crate) name: Option<String>,
    pub(crate) hypervisors: Vec<Arc<str>>,
    /// All labels, those of hypervisors as `hv/key`.
    pub(crate) labels: BTreeMap<String, String>,
}

/// A VM on a hypervisor that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ListedState {
    pub(crate) instance_id: InstanceId,
    pub(crate) hypervisor: Arc<str>,
    pub(crate) state: MachineState,
    /// When the record of the VM last changed, Unix milliseconds.
    pub(crate) changed_ms: u64,
}

/// Whether a VM runs, as far as the inventory shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Power {
    /// Off on every hypervisor that has it.
    Off,
    /// In another state on a hypervisor.
    On,
    /// No hypervisor has the VM.
    Unlisted,
    /// The copy of the inventory is stale.
    Unknown,
}

impl VmFacts {
    /// Whether a rule applies to the VM.
    pub(crate) fn is_selected(&self, id: &InstanceId, selector: &VmSelector) -> bool {
        let hypervisors: Vec<&str> = self.hypervisors.iter().map(AsRef::as_ref).collect();
        selector.contains(id, self.name.as_deref(), &hypervisors, &self.labels)
    }
}

impl KnownVms {
    /// Starts following the KV buckets until shutdown, even if they do not exist yet.
    pub(crate) fn follow(bus: &Bus, shutdown: &CancellationToken) -> Self {
        let (inventory, labels) = (InventoryTable::default(), LabelTable::default());
        Self {
            inventory: Follower::start(bus, INVENTORY_BUCKET, STALE_AFTER, inventory, shutdown.clone()),
            labels: Follower::start(bus, LABELS_BUCKET, STALE_AFTER, labels, shutdown.clone()),
        }
    }

    /// Waits until the KV buckets have been read once, at most for this time. If lifecycle-svc has never run, they do
    /// not exist.
    pub(crate) async fn filled(&self, limit: Duration) -> bool {
        let filled = async { tokio::join!(self.inventory.filled(), self.labels.filled()) };
        timeout(limit, filled).await.is_ok()
    }

    /// Whether labels, names and hypervisors are up to date.
    pub(crate) fn are_current(&self) -> bool {
        self.inventory.is_current() && self.labels.is_current()
    }

    pub(crate) fn facts(&self, id: &InstanceId) -> VmFacts {
        let mut facts = VmFacts::default();
        let inventory = self.inventory.read();
        for copy in inventory.copies(id) {
            facts.name.get_or_insert_with(|| copy.vm.name.clone());
            facts.hypervisors.push(Arc::clone(&copy.hypervisor));
            let labels = copy.vm.labels.iter();
            facts
                .labels
                .extend(labels.map(|(key, value)| (format!("{HYPERVISOR_LABEL}{key}"), value.clone())));
        }
        drop(inventory);
        let labels = self.labels.read();
        for (key, value) in labels.get(id).into_iter().flat_map(|labels| labels.iter()) {
            facts
                .labels
                .insert(key.as_str().to_owned(), value.as_str().to_owned());
        }
        facts
    }

    pub(crate) fn power(&self, id: &InstanceId) -> Power {
        if !self.inventory.is_current() {
            return Power::Unknown;
        }
        let inventory = self.inventory.read();
        let copies = inventory.copies(id);
        if copies.is_empty() {
            Power::Unlisted
        } else if copies.iter().all(|copy| copy.vm.state.is_off()) {
            Power::Off
        } else {
            Power::On
        }
    }

    /// Whether the hypervisor may still have the VM: it has it, or it does not answer.
    pub(crate) fn may_have(&self, hypervisor: &str, id: &InstanceId, now_ms: u64) -> bool {
        let inventory = self.inventory.read();
        let state = inventory.hypervisor(hypervisor);
        !self.inventory.is_current()
            || inventory.vm(hypervisor, id).is_some()
            || state.is_some_and(|state| state.is_silent(now_ms))
    }

    /// The states of all VMs on hypervisors that answer; none if the copy of the inventory is stale.
    pub(crate) fn states(&self, now_ms: u64) -> Vec<ListedState> {
        if !self.inventory.is_current() {
            return Vec::new();
        }
        let inventory = self.inventory.read();
        let answers = |name: &str| {
            let state = inventory.hypervisor(name);
            state.is_some_and(|state| !state.is_silent(now_ms))
        };
        let answering: Vec<&str> = inventory.names().filter(|name| answers(name)).collect();
        let mut states = Vec::new();
        for (id, copies) in inventory.all() {
            let copies = copies
                .iter()
                .filter(|copy| answering.contains(&&*copy.hypervisor));
            states.extend(copies.map(|copy| ListedState {
                instance_id: id.clone(),
                hypervisor: Arc::clone(&copy.hypervisor),
                state: copy.vm.state,
                changed_ms: copy.vm.changed_at_ms,
            }));
        }
        states
    }
}
