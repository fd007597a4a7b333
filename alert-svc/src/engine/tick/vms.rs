//! Evaluates the states of VMs and the faults of agents, and ends conditions that samples cannot end.

use std::collections::HashSet;

use vmwatch_api::{InstanceId, alerts::rules::Condition};

use crate::{
    engine::{
        Engine,
        machine::{Reading, Transition, is_of_samples},
    },
    known_vms::Power,
};

/// A VM that is off and has sent nothing for this time, and for twice its usual interval, sends nothing more.
const OFF_MS: u64 = 15_000;
/// A VM that no hypervisor has and that has sent nothing for this time may have been removed.
pub(super) const GONE_MS: u64 = 600_000;

impl Engine {
    /// Evaluates the states of VMs. The subject is the hypervisor.
    pub(super) fn check_states(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
        let rules = self.rules_about(|condition| matches!(condition, Condition::VmState { .. }));
        if rules.is_empty() {
            return;
        }
        for listed in self.setup.known.states(now_ms) {
            let vm = &listed.instance_id;
            for rule in &rules {
                let Condition::VmState { states } = &rule.spec.condition else {
                    continue;
                };
                let holds = states.contains(&listed.state);
                let may_change = holds || !self.machine.open(Some(vm)).is_empty();
                if !may_change || !self.is_selected(rule, vm) {
                    continue;
                }
                let since_ms = if holds { listed.changed_ms } else { now_ms };
                let reading = Reading::holds(holds, since_ms, now_ms);
                self.machine
                    .observe(rule, Some(vm), &listed.hypervisor, reading, out);
            }
        }
        let vms: Vec<InstanceId> = self.machine.vms().cloned().collect();
        let ids: HashSet<_> = rules.iter().map(|rule| rule.id.clone()).collect();
        let known = &self.setup.known;
        for vm in vms {
            self.machine.end_of_vm(&vm, now_ms, out, |open| {
                ids.contains(&open.rule) && !known.may_have(&open.subject, &vm, now_ms)
            });
        }
    }

    /// Evaluates the faults of agents, if they were read since the last tick.
    pub(super) fn check_faults(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
        let rules = self.rules_about(|condition| matches!(condition, Condition::AgentFault { .. }));
        let Some(faults) = self.sources.faults.borrow().clone() else {
            return;
        };
        for rule in rules {
            let Condition::AgentFault { fault } = rule.spec.condition else {
                continue;
            };
            let has_fault = |vm: &InstanceId| {
                let all = faults.get(vm).into_iter().flatten();
                all.into_iter().any(|one| fault.is(one))
            };
            let mut vms: HashSet<&InstanceId> = faults.keys().filter(|vm| has_fault(vm)).collect();
            let open: Vec<InstanceId> = self
                .machine
                .vms()
                .filter(|vm| self.has_open(&rule, vm))
                .cloned()
                .collect();
            vms.extend(&open);
            for vm in vms {
                let holds = has_fault(vm);
                if holds && !self.is_selected(&rule, vm) {
                    continue;
                }
                let mut reading = Reading::holds(holds, now_ms, now_ms);
                // The condition begins when it is first seen.
                reading.since_ms = holds.then_some(now_ms);
                self.machine.observe(&rule, Some(vm), "", reading, out);
            }
        }
    }

    /// Ends conditions that only samples could end, of VMs that are off, and looks whether VMs were removed.
    pub(super) fn check_ended(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
        let rules = self.rules_about(is_of_samples);
        let ids: HashSet<_> = rules.iter().map(|rule| rule.id.clone()).collect();
        let vms: Vec<InstanceId> = self.machine.vms().cloned().collect();
        for vm in vms {
            let samples = self.samples.get(&vm);
            let (arrived_ms, interval_ms) =
                samples.map_or((0, 0), |samples| (samples.arrived_ms, samples.interval_ms));
            let quiet_ms = now_ms.saturating_sub(arrived_ms);
            match self.setup.known.power(&vm) {
                Power::Off if quiet_ms > OFF_MS.max(interval_ms * 2) => {
                    self.machine
                        .end_of_vm(&vm, now_ms, out, |open| ids.contains(&open.rule));
                }
                Power::Unlisted if quiet_ms > GONE_MS => {
                    self.checks.verdict(&vm, Power::Unlisted, now_ms);
                }
                _ => {}
            }
        }
    }

    /// Ends conditions of VMs to which their rule no longer applies.
    pub(super) fn check_selected(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
        if !self.machine.has_selectors() {
            return;
        }
        let mut deselected = HashSet::new();
        for vm in self.machine.vms() {
            let facts = self.setup.known.facts(vm);
            for open in self.machine.open(Some(vm)) {
                let rule = self.machine.rule(&open.rule);
                if rule.is_some_and(|rule| !facts.is_selected(vm, &rule.spec.vms)) {
                    deselected.insert((vm.clone(), open.rule.clone()));
                }
            }
        }
        if !deselected.is_empty() {
            self.machine.end(now_ms, out, |vm, open| {
                vm.is_some_and(|vm| deselected.contains(&(vm.clone(), open.rule.clone())))
            });
        }
    }
}
