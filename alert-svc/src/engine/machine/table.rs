//! The table of the conditions that hold: finding, adding, removing and ending them.

use std::collections::HashSet;

use vmwatch_api::{
    InstanceId,
    alerts::{RecordId, rules::Condition},
};

use super::{ConditionKey, MAX_OPEN, Machine, Open, Step, Transition};

/// A condition that is no longer read for this time has ended, if its VM still sends samples.
const UNREAD_MS: u64 = 900_000;

impl Machine {
    /// The conditions of a VM that hold.
    pub(in crate::engine) fn open(&self, vm: Option<&InstanceId>) -> &[Open] {
        // The key is cloned only if alerts exist at all.
        if self.open.is_empty() {
            return &[];
        }
        self.open.get(&vm.cloned()).map_or(&[], Vec::as_slice)
    }

    /// The VMs that have conditions that hold.
    pub(in crate::engine) fn vms(&self) -> impl Iterator<Item = &InstanceId> {
        self.open.keys().flatten()
    }

    /// Ends the conditions of a VM that its samples no longer contain, such as that of a filesystem that was unmounted.
    /// `reads` selects the conditions that the sample at `at_ms` could have contained.
    pub(in crate::engine) fn end_unread(
        &mut self,
        vm: &InstanceId,
        at_ms: u64,
        reads: impl Fn(&Condition) -> bool,
        out: &mut Vec<Transition>,
    ) {
        if self.open(Some(vm)).is_empty() {
            return;
        }
        let rules = self.rules.iter().filter(|rule| reads(&rule.spec.condition));
        let rules: HashSet<RecordId> = rules.map(|rule| rule.id.clone()).collect();
        self.end_of_vm(vm, at_ms, out, |open| {
            rules.contains(&open.rule) && at_ms.saturating_sub(open.seen_ms) > UNREAD_MS
        });
    }

    /// Ends the conditions of a VM that `ends` selects.
    pub(in crate::engine) fn end_of_vm(
        &mut self,
        vm: &InstanceId,
        at_ms: u64,
        out: &mut Vec<Transition>,
        ends: impl Fn(&Open) -> bool,
    ) {
        let key = Some(vm.clone());
        if let Some(all) = self.open.get_mut(&key) {
            end_some(key.as_ref(), all, at_ms, out, &mut self.count, false, ends);
            if all.is_empty() {
                self.open.remove(&key);
            }
        }
    }

    /// Ends all conditions that `ends` selects, because they are no longer evaluated.
    pub(in crate::engine) fn end(
        &mut self,
        at_ms: u64,
        out: &mut Vec<Transition>,
        ends: impl Fn(Option<&InstanceId>, &Open) -> bool,
    ) {
        for (vm, all) in &mut self.open {
            end_some(vm.as_ref(), all, at_ms, out, &mut self.count, true, |open| {
                ends(vm.as_ref(), open)
            });
        }
        self.open.retain(|_, all| !all.is_empty());
    }

    pub(super) fn find(&self, vm: Option<&InstanceId>, rule: &RecordId, subject: &str) -> Option<usize> {
        let mut all = self.open(vm).iter();
        all.position(|open| open.rule == *rule && open.subject == subject)
    }

    pub(super) fn insert(&mut self, vm: Option<&InstanceId>, open: Open) {
        self.open.entry(vm.cloned()).or_default().push(open);
        self.count += 1;
    }

    pub(super) fn remove(&mut self, vm: Option<&InstanceId>, index: usize) {
        let key = vm.cloned();
        if let Some(all) = self.open.get_mut(&key) {
            all.swap_remove(index);
            self.count -= 1;
            if all.is_empty() {
                self.open.remove(&key);
            }
        }
        self.is_full = self.count >= MAX_OPEN;
    }
}

fn end_some(
    vm: Option<&InstanceId>,
    all: &mut Vec<Open>,
    at_ms: u64,
    out: &mut Vec<Transition>,
    count: &mut usize,
    is_of_rule: bool,
    ends: impl Fn(&Open) -> bool,
) {
    all.retain(|open| {
        if !ends(open) {
            return true;
        }
        let step = if open.is_firing {
            Step::Resolve {
                held_ms: (!is_of_rule).then_some(open.seen_ms),
            }
        } else {
            Step::Withdraw
        };
        out.push(Transition {
            key: ConditionKey {
                rule: open.rule.clone(),
                vm: vm.cloned(),
                subject: open.subject.clone(),
            },
            step,
            at_ms: at_ms.max(open.since_ms),
            since_ms: open.since_ms,
            value: open.value,
        });
        *count -= 1;
        false
    });
}
