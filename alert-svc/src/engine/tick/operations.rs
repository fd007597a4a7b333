//! Evaluates failed operations.

use vmwatch_api::{InstanceId, alerts::rules::Condition};

use crate::engine::{
    Engine,
    machine::{Reading, Transition},
};

/// An operation that failed this long before the last change of the rule begins no alert, in milliseconds.
const BEFORE_RULE_MS: u64 = 60_000;

impl Engine {
    /// Evaluates failed operations, if they were read since the last tick: a VM has at most one alert, however many
    /// operations on it failed.
    pub(super) fn check_operations(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
        let Some(failures) = self.sources.failures.borrow().clone() else {
            return;
        };
        for rule in self.rules_about(|condition| matches!(condition, Condition::OperationFailed {})) {
            for (vm, failures) in failures.iter() {
                let begins = failures.last_ms + BEFORE_RULE_MS >= rule.changed_ms || self.has_open(&rule, vm);
                if begins && self.is_selected(&rule, vm) {
                    let reading = Reading::holds(true, failures.first_ms, now_ms);
                    self.machine.observe(&rule, Some(vm), "", reading, out);
                }
            }
            let vms: Vec<InstanceId> = self.machine.vms().cloned().collect();
            for vm in vms.iter().filter(|vm| !failures.contains_key(*vm)) {
                self.machine
                    .end_of_vm(vm, now_ms, out, |open| open.rule == rule.id);
            }
        }
    }
}
