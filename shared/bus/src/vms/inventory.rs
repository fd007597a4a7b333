//! The in-memory copy of the inventory's KV bucket.

use std::{
    collections::{BTreeMap, btree_map},
    sync::Arc,
};

use async_nats::jetstream::kv::Entry;
use vmwatch_api::{
    InstanceId,
    inventory::{INVENTORY_BUCKET, InventoryHypervisor, InventoryKey, InventoryVm},
    labels::HYPERVISOR_LABEL,
    lifecycle::MachineState,
};

use super::decode;
use crate::follow::Table;

/// All VMs by id. The size limit of the KV bucket limits their number.
#[derive(Debug, Default)]
pub struct InventoryTable {
    hypervisors: BTreeMap<Arc<str>, Part>,
    vms: BTreeMap<InstanceId, Vec<VmCopy>>,
}

/// A VM of one hypervisor. Several hypervisors can have a VM with the same id.
#[derive(Debug)]
pub struct VmCopy {
    /// Name of the hypervisor.
    pub hypervisor: Arc<str>,
    /// The record in the KV bucket.
    pub vm: InventoryVm,
    /// Id, name, hypervisor and labels in lower case, one per line, beginning with the name.
    search: Box<str>,
}

/// The part of the inventory that one hypervisor has.
#[derive(Debug, Default)]
struct Part {
    state: Option<InventoryHypervisor>,
    vms: usize,
}

impl VmCopy {
    fn new(hypervisor: &Arc<str>, id: &InstanceId, vm: InventoryVm) -> Self {
        let mut text = vm.name.replace('\n', " ");
        for part in [id.as_str(), hypervisor] {
            text.push('\n');
            text.push_str(part);
        }
        for (key, value) in &vm.labels {
            text.extend(["\n", HYPERVISOR_LABEL, key, "=", value]);
        }
        Self {
            hypervisor: Arc::clone(hypervisor),
            vm,
            search: text.to_lowercase().into(),
        }
    }

    /// The name of the VM in lower case.
    pub(super) fn sort_name(&self) -> &str {
        self.search.split('\n').next().unwrap_or_default()
    }

    /// Whether id, name, hypervisor or a label contains this text, which is in lower case.
    pub(super) fn contains(&self, text: &str) -> bool {
        self.search.contains(text)
    }
}

impl InventoryTable {
    /// Names of the hypervisors of which the inventory has a state or VMs.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.hypervisors.keys().map(AsRef::as_ref)
    }

    /// The state of a hypervisor; `None` if it has not been listed yet.
    pub fn hypervisor(&self, name: &str) -> Option<&InventoryHypervisor> {
        self.hypervisors.get(name)?.state.as_ref()
    }

    /// The VM as it is on this hypervisor.
    pub fn vm(&self, hypervisor: &str, id: &InstanceId) -> Option<&InventoryVm> {
        let mut copies = self.copies(id).iter();
        let copy = copies.find(|copy| &*copy.hypervisor == hypervisor);
        copy.map(|copy| &copy.vm)
    }

    /// The VMs of a hypervisor.
    pub fn vms(&self, hypervisor: &str) -> impl Iterator<Item = (&InstanceId, &InventoryVm)> {
        self.vms.iter().filter_map(move |(id, copies)| {
            let copy = copies.iter().find(|copy| &*copy.hypervisor == hypervisor)?;
            Some((id, &copy.vm))
        })
    }

    /// Whether a hypervisor other than this one has the VM.
    pub fn is_elsewhere(&self, hypervisor: &str, id: &InstanceId) -> bool {
        let mut copies = self.copies(id).iter();
        copies.any(|copy| &*copy.hypervisor != hypervisor)
    }

    /// Name of the VM on the first hypervisor that has it.
    pub fn name(&self, id: &InstanceId) -> Option<String> {
        self.copies(id).first().map(|copy| copy.vm.name.clone())
    }

    /// The VM on all hypervisors that have it, sorted by their names.
    pub fn copies(&self, id: &InstanceId) -> &[VmCopy] {
        self.vms.get(id).map_or(&[], Vec::as_slice)
    }

    /// Whether the measures that a hypervisor gives of a VM that is active on it are used. If several hypervisors have the
    /// VM, those of only one are used, because they would alternate otherwise: of the hypervisor on which the VM runs,
    /// rather than one on which it is paused, such as during a migration; then of the first by name.
    pub fn is_measured_on(&self, hypervisor: &str, id: &InstanceId, now_ms: u64) -> bool {
        let is_active = |copy: &&VmCopy| {
            let state = self.hypervisor(&copy.hypervisor);
            !copy.vm.state.is_off() && state.is_some_and(|state| state.is_reachable(now_ms))
        };
        let active = self.copies(id).iter().filter(is_active);
        let used = active.min_by_key(|copy| copy.vm.state != MachineState::Running);
        used.is_none_or(|copy| &*copy.hypervisor == hypervisor)
    }

    /// All VMs with the hypervisors that have them, sorted by id.
    pub fn all(&self) -> impl Iterator<Item = (&InstanceId, &[VmCopy])> {
        self.vms.iter().map(|(id, copies)| (id, copies.as_slice()))
    }

    pub(super) fn entry(&self, id: &InstanceId) -> Option<(&InstanceId, &[VmCopy])> {
        let (id, copies) = self.vms.get_key_value(id)?;
        Some((id, copies))
    }

    /// All VMs, sorted by id.
    pub(super) fn sorted(&self) -> btree_map::Iter<'_, InstanceId, Vec<VmCopy>> {
        self.vms.iter()
    }

    /// Sets or removes a VM of a hypervisor.
    fn set_vm(&mut self, hypervisor: &str, id: InstanceId, vm: Option<InventoryVm>) {
        let known = self.hypervisors.get_key_value(hypervisor);
        let name = known.map_or_else(|| hypervisor.into(), |(name, _)| Arc::clone(name));
        let mut copies = self.vms.remove(&id).unwrap_or_default();
        let before = copies.len();
        copies.retain(|copy| copy.hypervisor != name);
        let had = before - copies.len();
        if let Some(vm) = vm {
            let position = copies.partition_point(|copy| copy.hypervisor < name);
            copies.reserve_exact(1);
            copies.insert(position, VmCopy::new(&name, &id, vm));
        }
        let has = copies.len() + had - before;
        if !copies.is_empty() {
            self.vms.insert(id, copies);
        }
        self.change(&name, |part| part.vms = part.vms + has - had);
    }

    fn set_hypervisor(&mut self, name: &str, state: Option<InventoryHypervisor>) {
        self.change(&name.into(), |part| part.state = state);
    }

    fn change(&mut self, name: &Arc<str>, change: impl FnOnce(&mut Part)) {
        let part = self.hypervisors.entry(Arc::clone(name)).or_default();
        change(part);
        if part.state.is_none() && part.vms == 0 {
            self.hypervisors.remove(name);
        }
    }
}

impl Table for InventoryTable {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        match InventoryKey::read(&entry.key) {
            // The poller replaces a record that cannot be decoded.
            Some(InventoryKey::Vm(hypervisor, id)) => {
                self.set_vm(hypervisor, id, decode(entry, INVENTORY_BUCKET));
            }
            Some(InventoryKey::Hypervisor(name)) => {
                self.set_hypervisor(name, decode(entry, INVENTORY_BUCKET));
            }
            // Claims are not part of the list, and neither are keys of a newer version of vmwatch.
            Some(InventoryKey::Start(_)) | None => {}
        }
    }
}

/// Helpers for the tests of this module and of the list.
#[cfg(test)]
pub(super) mod examples {
    use vmwatch_api::actions::{Refusal, VmAction};

    use super::*;

    impl InventoryTable {
        /// Adds a VM.
        pub(in crate::vms) fn with(
            mut self,
            hypervisor: &str,
            id: &str,
            name: &str,
            state: MachineState,
        ) -> Self {
            let vm = InventoryVm {
                name: name.to_owned(),
                state,
                labels: BTreeMap::new(),
                refused: [(VmAction::Reset, Refusal::Locked)].into(),
                changed_at_ms: 1,
            };
            self.set_vm(hypervisor, id.parse().unwrap(), Some(vm));
            self
        }

        /// Sets a label of the hypervisor.
        pub(in crate::vms) fn label(mut self, hypervisor: &str, id: &str, key: &str, value: &str) -> Self {
            let id = id.parse().unwrap();
            let mut vm = self.vm(hypervisor, &id).unwrap().clone();
            vm.labels.insert(key.to_owned(), value.to_owned());
            self.set_vm(hypervisor, id, Some(vm));
            self
        }

        /// Removes a VM.
        pub(in crate::vms) fn without(mut self, hypervisor: &str, id: &str) -> Self {
            self.set_vm(hypervisor, id.parse().unwrap(), None);
            self
        }

        /// Sets the state of a hypervisor.
        pub(in crate::vms) fn hypervisor_at(
            mut self,
            name: &str,
            reachable: bool,
            listed_at_ms: u64,
        ) -> Self {
            let state = InventoryHypervisor {
                reachable,
                late: false,
                listed_at_ms: Some(listed_at_ms),
                interval_ms: 5000,
                keep_ms: Some(60_000),
            };
            self.set_hypervisor(name, Some(state));
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_of_only_one_hypervisor_are_used() {
        const NOW: u64 = 1_800_000_000_000;
        use MachineState::{Paused, Running, ShutOff};
        let id = "a".parse().unwrap();
        let measured = |table: &InventoryTable| {
            let names = ["one", "two", "three"].into_iter();
            let used: Vec<_> = names
                .filter(|name| table.is_measured_on(name, &id, NOW))
                .collect();
            used.join(" ")
        };
        for (on_one, on_two, one_is_reachable, expected) in [
            (Running, ShutOff, true, "one"),
            (Running, Paused, true, "one"),
            (Paused, Running, true, "two"),
            (Running, Running, true, "one"),
            (Running, Running, false, "two"),
            // The VM was started on any of them since they were listed.
            (ShutOff, ShutOff, true, "one two three"),
        ] {
            let table = InventoryTable::default()
                .with("one", "a", "a", on_one)
                .with("two", "a", "a", on_two)
                .hypervisor_at("one", one_is_reachable, NOW)
                .hypervisor_at("two", true, NOW);
            assert_eq!(
                measured(&table),
                expected,
                "{on_one:?} {on_two:?} {one_is_reachable}"
            );
        }
    }

    #[test]
    fn vm_of_two_hypervisors_has_two_copies() {
        let running = MachineState::Running;
        let mut table = InventoryTable::default();
        for (hypervisor, id) in [
            ("two", "a"),
            ("one", "b"),
            ("one", "a"),
            ("two", "c"),
            ("one", "a"),
        ] {
            table = table.with(hypervisor, id, id, running);
        }
        let id = |id: &str| id.parse().unwrap();
        let names = |table: &InventoryTable, of: &str| {
            let names = table.copies(&id(of)).iter();
            names.map(|copy| copy.hypervisor.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(&table, "a"), ["one", "two"]);
        assert!(table.is_elsewhere("one", &id("a")) && !table.is_elsewhere("one", &id("b")));
        let of_one: Vec<_> = table.vms("one").map(|(id, _)| id.as_str()).collect();
        assert_eq!(of_one, ["a", "b"]);
        assert_eq!(table.name(&id("c")).as_deref(), Some("c"));
        for of in ["a", "c", "c"] {
            table = table.without("two", of);
        }
        assert_eq!(names(&table, "a"), ["one"]);
        assert_eq!(table.names().collect::<Vec<_>>(), ["one"]);
        assert!(table.copies(&id("c")).is_empty() && table.sorted().count() == 2);
        table = table.hypervisor_at("two", true, 1);
        assert_eq!(table.names().collect::<Vec<_>>(), ["one", "two"]);
    }
}
