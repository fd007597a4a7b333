//! Evaluates how long agents have been silent.

use std::collections::HashSet;

use vmwatch_api::{
    InstanceId,
    alerts::rules::{Condition, Rule},
};

use super::MIN_SILENCE_MS;
use crate::{
    engine::{
        Engine,
        checks::Verdict,
        machine::{Reading, Transition},
    },
    known_vms::Power,
};

impl Engine {
    /// Evaluates how long agents have been silent.
    pub(super) fn check_silence(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
        let rules = self.rules_about(|condition| matches!(condition, Condition::AgentSilent {}));
        let known = self.setup.known.clone();
        self.samples
            .still_stopped(|vm| known.power(vm) == Power::Off, now_ms);
        let mut silent = HashSet::new();
        for rule in &rules {
            let for_ms = u64::from(rule.spec.for_seconds) * 1000;
            for (vm, since_ms) in self.silent_for(for_ms, now_ms) {
                silent.insert(vm.clone());
                let power = known.power(&vm);
                let is_open = self.has_open(rule, &vm);
                if (is_open && power == Power::On) || !self.is_selected(rule, &vm) {
                    continue;
                }
                match (self.checks.verdict(&vm, power, now_ms), is_open) {
                    (Some(Verdict::Silent), false) => {
                        let reading = Reading::holds(true, since_ms, now_ms);
                        self.machine.observe(rule, Some(&vm), "", reading, out);
                    }
                    (Some(Verdict::Stopped), _) => {
                        self.samples.stop(&vm, now_ms);
                        let reading = Reading::holds(false, now_ms, now_ms);
                        self.machine.observe(rule, Some(&vm), "", reading, out);
                    }
                    _ => {}
                }
            }
            self.end_silence(rule, now_ms, out);
        }
        self.checks.keep(now_ms, |vm| silent.contains(vm));
    }

    /// The VMs whose agents have been silent for this time, each with when that began.
    fn silent_for(&self, for_ms: u64, now_ms: u64) -> Vec<(InstanceId, u64)> {
        let silent = self.samples.iter().filter_map(|(vm, samples)| {
            let since_ms = samples.silent_since_ms();
            let for_ms = for_ms.max(MIN_SILENCE_MS + samples.interval_ms);
            let is_silent = samples.arrived_ms > 0
                && since_ms + for_ms <= now_ms
                && self.standstills.counted_ms(since_ms, now_ms) >= for_ms;
            is_silent.then(|| (vm.clone(), since_ms))
        });
        silent.collect()
    }

    /// Ends the alerts of agents that have sent samples again.
    fn end_silence(&mut self, rule: &Rule, now_ms: u64, out: &mut Vec<Transition>) {
        let vms: Vec<InstanceId> = self.machine.vms().cloned().collect();
        for vm in vms {
            let arrived_ms = self.samples.get(&vm).map_or(0, |samples| samples.arrived_ms);
            let ends = |since_ms: u64| arrived_ms > since_ms;
            let open = self.machine.open(Some(&vm)).iter();
            if open
                .clone()
                .any(|open| open.rule == rule.id && ends(open.since_ms))
            {
                let reading = Reading::holds(false, now_ms, now_ms);
                self.machine.observe(rule, Some(&vm), "", reading, out);
            }
        }
    }
}
