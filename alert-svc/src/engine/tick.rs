//! Evaluates once per second what samples do not show: states of VMs, silence, faults, operations, and the flow of
//! samples.

use std::{collections::HashSet, sync::Arc};

use tracing::{debug, info, warn};
use vmwatch_api::{
    InstanceId,
    alerts::rules::{Condition, Rule},
    time::unix_millis,
};

use super::{
    Engine,
    checks::Verdict,
    machine::{Reading, Transition, is_of_samples},
    open_alerts,
    silence::{Agent, Evidence, Flow},
    watched,
};
use crate::{definitions::watched_names, known_vms::Power};

/// Number of ticks after which it is checked whether rules still apply to the VMs of alerts.
const SELECT_TICKS: u64 = 5;
/// Number of ticks after which the open alerts are compared with those in the database.
const COMPARE_TICKS: u64 = 60;
/// Number of ticks after which something that failed is tried again.
const RETRY_TICKS: u64 = 3;
/// Silence is reported after this time at the earliest, in milliseconds.
const MIN_SILENCE_MS: u64 = 60_000;
/// An operation that failed this long before the last change of the rule begins no alert, in milliseconds.
const BEFORE_RULE_MS: u64 = 60_000;
/// A VM that is off and has sent nothing for this time, and for twice its usual interval, sends nothing more.
const OFF_MS: u64 = 15_000;
/// A VM that no hypervisor has and that has sent nothing for this time may have been removed.
const GONE_MS: u64 = 600_000;

impl Engine {
    pub(super) async fn tick(&mut self) {
        let now_ms = unix_millis();
        self.ticks += 1;
        self.connect().await;
        let mut out = Vec::new();
        let is_flow_known = self.check_flow(now_ms, &mut out);
        // While the writer is late, further changes wait until it has written those before.
        if !self.is_stuck() {
            self.check_vms(now_ms, &mut out).await;
            if is_flow_known && self.lag.has_caught_up {
                self.check_silence(now_ms, &mut out);
            }
        }
        self.hand_over(out);
        let position = self.position();
        self.saver
            .tick(&mut self.samples, &self.standstills, position, now_ms)
            .await;
        self.export(now_ms);
    }

    /// Opens the stream of evaluation records and writes the watched names, if that is due.
    async fn connect(&mut self) {
        if !self.freshness.is_fresh() || !self.setup.bus.is_connected() {
            return;
        }
        if self.names_are_due && self.ticks % RETRY_TICKS == 1 {
            self.write_names().await;
        }
        if self.records.is_none() && self.ticks >= self.retry_at {
            self.open_records().await;
        }
        if self.records.is_some() && self.waiting.is_empty() {
            self.lag.read_ms = unix_millis();
        }
    }

    async fn write_names(&mut self) {
        let names = watched_names(&self.setup.definitions.current());
        match watched::write(&self.setup.bus, &names).await {
            Ok(revision) => {
                self.watched.set(&names, revision);
                self.names_are_due = false;
            }
            Err(error) => warn!(%error, "writing the watched process names failed; retrying"),
        }
    }

    /// Evaluates whether samples flow, and for how long silence does not count. Returns `false` until the stream of
    /// samples was observed for the first time.
    fn check_flow(&mut self, now_ms: u64, out: &mut Vec<Transition>) -> bool {
        let Some(health) = *self.sources.health.borrow_and_update() else {
            return false;
        };
        let known = &self.setup.known;
        let agents = self.samples.iter().filter(|(vm, samples)| {
            samples.arrived_ms > 0
                && (samples.arrived_ms + MIN_SILENCE_MS > now_ms || known.power(vm) != Power::Off)
        });
        let agents: Vec<Agent> = agents
            .map(|(_, samples)| Agent {
                arrived_ms: samples.arrived_ms,
                interval_ms: samples.interval_ms,
            })
            .collect();
        let mass_since_ms = self.mass.check(&agents, now_ms);
        let evidence = Evidence {
            health,
            newest_arrival_ms: self.samples.newest_arrival_ms,
            mass_since_ms: mass_since_ms.filter(|_| self.lag.has_caught_up),
            late_since_ms: self.lag.late_since_ms(now_ms),
            is_stuck: !self.waiting.is_empty(),
            was_not_receiving: self.was_not_receiving,
        };
        let flow = Flow::judge(evidence, now_ms);
        let not_receiving = flow.not_receiving_since_ms;
        if not_receiving.is_some() != self.was_not_receiving {
            self.was_not_receiving = not_receiving.is_some();
            info!(
                is_receiving = not_receiving.is_none(),
                ?evidence,
                "the flow of samples changed"
            );
        }
        self.standstills.check(now_ms, flow.stands_since_ms);
        for rule in self.rules_about(|condition| matches!(condition, Condition::NotReceiving {})) {
            let since_ms = not_receiving.unwrap_or(now_ms);
            let reading = Reading::holds(not_receiving.is_some(), since_ms, now_ms);
            self.machine.observe(&rule, None, "", reading, out);
        }
        true
    }

    async fn check_vms(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
        if self.ticks.is_multiple_of(COMPARE_TICKS) {
            self.compare(now_ms, out).await;
        }
        for vm in self.checks.take_results(now_ms) {
            self.machine.end_of_vm(&vm, now_ms, out, |_| true);
            self.samples.remove(&vm);
        }
        self.check_states(now_ms, out);
        self.check_faults(now_ms, out);
        self.check_operations(now_ms, out);
        self.check_ended(now_ms, out);
        if self.ticks.is_multiple_of(SELECT_TICKS) && self.setup.known.are_current() {
            self.check_selected(now_ms, out);
        }
    }

    fn rules_about(&self, is_about: impl Fn(&Condition) -> bool) -> Vec<Arc<Rule>> {
        let rules = self.machine.rules().iter();
        rules
            .filter(|rule| is_about(&rule.spec.condition))
            .cloned()
            .collect()
    }

    fn is_selected(&self, rule: &Rule, vm: &InstanceId) -> bool {
        !self.machine.has_selectors() || self.setup.known.facts(vm).is_selected(vm, &rule.spec.vms)
    }

    /// Takes over alerts that only the database has as open, also at the last comparison: another replica, which has
    /// lost the lease since, may have written them.
    async fn compare(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
        if !self.waiting.is_empty() {
            return;
        }
        let open = match open_alerts(&self.setup.store).await {
            Ok(open) => open,
            Err(error) => {
                debug!(%error, "reading the open alerts failed; retrying");
                return;
            }
        };
        let before = std::mem::take(&mut self.unknown);
        for alert in open
            .iter()
            .filter(|alert| !self.machine.has(alert))
            .cloned()
            .collect::<Vec<_>>()
        {
            if before.contains(&alert.id) {
                info!(alert = %alert.id, "taking over an open alert of another replica");
                self.machine.restore(&alert, now_ms, out);
            } else {
                self.unknown.insert(alert.id);
            }
        }
    }

    /// Evaluates the states of VMs. The subject is the hypervisor.
    fn check_states(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
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

    /// Evaluates how long agents have been silent.
    fn check_silence(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
        let rules = self.rules_about(|condition| matches!(condition, Condition::AgentSilent {}));
        let known = self.setup.known.clone();
        self.samples
            .still_stopped(|vm| known.power(vm) == Power::Off, now_ms);
        let mut silent = HashSet::new();
        for rule in &rules {
            let for_ms = (u64::from(rule.spec.for_seconds) * 1000).max(MIN_SILENCE_MS);
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
            let is_silent = samples.arrived_ms > 0
                && since_ms + for_ms <= now_ms
                && self.standstills.counted_ms(since_ms, now_ms) >= for_ms;
            is_silent.then(|| (vm.clone(), since_ms))
        });
        silent.collect()
    }

    fn has_open(&self, rule: &Rule, vm: &InstanceId) -> bool {
        self.machine
            .open(Some(vm))
            .iter()
            .any(|open| open.rule == rule.id)
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

    /// Evaluates the faults of agents, if they were read since the last tick.
    fn check_faults(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
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

    /// Evaluates failed operations, if they were read since the last tick: a VM has at most one alert, however many
    /// operations on it failed.
    fn check_operations(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
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

    /// Ends conditions that only samples could end, of VMs that are off, and looks whether VMs were removed.
    fn check_ended(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
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
    fn check_selected(&mut self, now_ms: u64, out: &mut Vec<Transition>) {
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
