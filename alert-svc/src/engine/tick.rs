//! Evaluates once per second what samples do not show: states of VMs, silence, faults, operations, and the flow of
//! samples.

mod operations;
mod removed;
mod silence;
mod vms;

use std::sync::Arc;

use tracing::{debug, info, warn};
use vmwatch_api::{
    InstanceId,
    alerts::rules::{Condition, Rule},
    time::unix_millis,
};

use super::{
    Engine,
    machine::{Reading, Transition},
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
/// Silence is reported after this time plus the usual interval of the agent at the earliest, in milliseconds. If
/// vmwatch itself receives no samples, that shows earlier: when a sample has waited for a minute.
const MIN_SILENCE_MS: u64 = 75_000;

impl Engine {
    pub(super) async fn tick(&mut self) {
        self.tick_at(unix_millis()).await;
    }

    pub(super) async fn tick_at(&mut self, now_ms: u64) {
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
        self.check_removed(now_ms);
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

    fn has_open(&self, rule: &Rule, vm: &InstanceId) -> bool {
        self.machine
            .open(Some(vm))
            .iter()
            .any(|open| open.rule == rule.id)
    }
}
