//! The in-memory copy of the inventory's KV bucket.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
};

use async_nats::jetstream::kv::{Entry, Operation};
use metrics::counter;
use serde::de::DeserializeOwned;
use tracing::warn;
use vmwatch_api::{
    InstanceId, Scope,
    inventory::{INVENTORY_BUCKET, InventoryHypervisor, InventoryKey, InventoryVm},
    lifecycle::ListedMachine,
};
use vmwatch_bus::follow::Table;

/// All VMs by hypervisor. The size limit of the KV bucket limits their number.
#[derive(Debug, Default)]
pub(super) struct Known {
    hypervisors: BTreeMap<String, Part>,
}

/// The part of the inventory that one hypervisor has.
#[derive(Debug, Default)]
struct Part {
    state: Option<InventoryHypervisor>,
    vms: BTreeMap<InstanceId, InventoryVm>,
}

impl Known {
    /// Names of the hypervisors that have been listed or that have VMs.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.hypervisors.keys().map(String::as_str)
    }

    pub(super) fn hypervisor(&self, name: &str) -> Option<&InventoryHypervisor> {
        self.hypervisors.get(name)?.state.as_ref()
    }

    pub(super) fn vm(&self, hypervisor: &str, id: &InstanceId) -> Option<&InventoryVm> {
        self.hypervisors.get(hypervisor)?.vms.get(id)
    }

    /// The VMs of a hypervisor.
    pub(super) fn vms(&self, hypervisor: &str) -> impl Iterator<Item = (&InstanceId, &InventoryVm)> {
        self.hypervisors
            .get(hypervisor)
            .into_iter()
            .flat_map(|part| &part.vms)
    }

    /// Whether a hypervisor other than this one has the VM.
    pub(super) fn is_elsewhere(&self, hypervisor: &str, id: &InstanceId) -> bool {
        let mut others = self.hypervisors.iter().filter(|(name, _)| *name != hypervisor);
        others.any(|(_, part)| part.vms.contains_key(id))
    }

    /// Name of the VM on the first hypervisor that has it.
    pub(super) fn name(&self, id: &InstanceId) -> Option<String> {
        let mut found = self.hypervisors.values().filter_map(|part| part.vms.get(id));
        found.next().map(|vm| vm.name.clone())
    }

    /// The first VMs after this id that the scope allows, at most `most`, sorted by id.
    pub(super) fn after(&self, last: Option<&InstanceId>, scope: &Scope, most: usize) -> Vec<ListedMachine> {
        let begin = last.map_or(Unbounded, Excluded);
        let mut found: Vec<_> = self
            .hypervisors
            .iter()
            .flat_map(|(hypervisor, part)| {
                let vms = part.vms.range((begin, Unbounded));
                let allowed = vms.filter(|(id, _)| scope.allows(id));
                allowed.take(most).map(move |(id, vm)| (id, hypervisor, vm))
            })
            .collect();
        found.sort_unstable_by_key(|&(id, hypervisor, _)| (id, hypervisor));
        let listed = found.into_iter().take(most);
        listed
            .map(|(id, hypervisor, vm)| ListedMachine {
                instance_id: id.clone(),
                name: vm.name.clone(),
                hypervisor: hypervisor.clone(),
                state: vm.state,
            })
            .collect()
    }

    fn set_vm(&mut self, hypervisor: &str, id: InstanceId, vm: Option<InventoryVm>) {
        self.change(hypervisor, |part| match vm {
            Some(vm) => drop(part.vms.insert(id, vm)),
            None => drop(part.vms.remove(&id)),
        });
    }

    fn change(&mut self, hypervisor: &str, change: impl FnOnce(&mut Part)) {
        let part = self.hypervisors.entry(hypervisor.to_owned()).or_default();
        change(part);
        if part.state.is_none() && part.vms.is_empty() {
            self.hypervisors.remove(hypervisor);
        }
    }
}

impl Table for Known {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        match InventoryKey::read(&entry.key) {
            Some(InventoryKey::Vm(hypervisor, id)) => self.set_vm(hypervisor, id, decode(entry)),
            Some(InventoryKey::Hypervisor(name)) => {
                let state = decode(entry);
                self.change(name, |part| part.state = state);
            }
            // Only a newer version knows this key.
            None => {}
        }
    }
}

/// Decodes a record; `None` if it was deleted or cannot be decoded. The poller replaces a record that is missing.
fn decode<T: DeserializeOwned>(entry: &Entry) -> Option<T> {
    if entry.operation != Operation::Put {
        return None;
    }
    serde_json::from_slice(&entry.value)
        .inspect_err(|error| {
            counter!("vmwatch_broken_records_total", "bucket" => INVENTORY_BUCKET).increment(1);
            warn!(%error, key = entry.key, "a record of the inventory could not be decoded");
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use vmwatch_api::lifecycle::MachineState;

    use super::*;

    fn vm(name: &str) -> InventoryVm {
        InventoryVm {
            name: name.to_owned(),
            state: MachineState::Running,
            labels: BTreeMap::new(),
            changed_at_ms: 1,
        }
    }

    fn id(id: &str) -> InstanceId {
        id.parse().unwrap()
    }

    #[test]
    fn vms_of_all_hypervisors_are_sorted_and_respect_scope() {
        let mut table = Known::default();
        for (hypervisor, of) in [("two", "a"), ("one", "b"), ("one", "a"), ("two", "c")] {
            table.set_vm(hypervisor, id(of), Some(vm(of)));
        }
        let after = |last: Option<&str>, scope: &Scope, most| {
            let last = last.map(id);
            let listed = table.after(last.as_ref(), scope, most);
            let pairs = listed
                .into_iter()
                .map(|vm| format!("{} {}", vm.instance_id, vm.hypervisor));
            pairs.collect::<Vec<_>>()
        };
        assert_eq!(after(None, &Scope::All, 3), ["a one", "a two", "b one"]);
        assert_eq!(after(Some("a"), &Scope::All, 3), ["b one", "c two"]);
        assert_eq!(after(None, &Scope::Only(vec![id("c")]), 3), ["c two"]);
        assert!(table.is_elsewhere("one", &id("a")) && !table.is_elsewhere("one", &id("b")));
        assert_eq!(table.name(&id("c")).as_deref(), Some("c"));
        for of in ["a", "c"] {
            table.set_vm("two", id(of), None);
        }
        assert_eq!(table.names().collect::<Vec<_>>(), ["one"]);
    }
}
