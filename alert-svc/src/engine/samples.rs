//! Turns evaluation records into readings of conditions. It does no I/O.
//!
//! A record is ignored if a newer sample of its source was evaluated. A record that arrived late, because its agent had
//! spooled it, only shows that the VM is not silent: nothing begins or ends in the past. If all records of a VM are late
//! by the same time, its clock is slow; they are then evaluated as of their arrival.

use std::collections::HashMap;

use metrics::counter;
use tracing::warn;
use vmwatch_api::{
    InstanceId,
    alerts::{
        evaluation::{EvaluationRecord, Source},
        rules::{Condition, Rule},
    },
};

use super::{
    delay::Delay,
    machine::{Machine, Reading, Transition},
    parts::Parts,
    watched::Watched,
};
use crate::known_vms::VmFacts;

/// A sample that arrived later than this after its time comes from a spool, or from a VM whose clock is slow.
const LATE_MS: u64 = 120_000;
/// The hypervisor's samples count if no sample of the agent that arrived within this time was evaluated.
const AGENT_IS_CURRENT_MS: u64 = 120_000;
/// Maximum number of VMs.
const MAX_VMS: usize = 200_000;
/// Longest gap between two arrivals that is taken for an interval of an agent.
const MAX_INTERVAL_MS: u64 = 3_600_000;

/// What is known of the samples of a VM. All times are Unix milliseconds.
#[derive(Debug, Default)]
pub(super) struct VmSamples {
    /// Time of the newest sample of the agent, by the clock of the VM.
    newest_ms: u64,
    /// Time of the newest evaluated sample of the hypervisor.
    measured_ms: u64,
    /// When the newest evaluated sample of the agent arrived.
    evaluated_ms: u64,
    /// When the newest sample of the agent arrived; 0 if none did.
    pub(super) arrived_ms: u64,
    /// When the VM was last seen off after an operation had stopped it; 0 if it was not. Silence counts from then on.
    stopped_ms: u64,
    /// Usual time between two arrivals; 0 if unknown.
    pub(super) interval_ms: u64,
    /// Whether this differs from what is stored.
    is_unsaved: bool,
    delay: Delay,
    /// The process rows of the newest sample.
    parts: Parts,
}

/// The samples of all VMs.
#[derive(Debug, Default)]
pub(super) struct Samples {
    vms: HashMap<InstanceId, VmSamples>,
    /// When the newest record of any source arrived.
    pub(super) newest_arrival_ms: u64,
    is_full: bool,
}

/// What is needed to evaluate a record.
pub(super) struct Evaluation<'a> {
    pub(super) machine: &'a mut Machine,
    pub(super) watched: &'a Watched,
    pub(super) facts: &'a VmFacts,
    pub(super) out: &'a mut Vec<Transition>,
}

impl Samples {
    pub(super) fn get(&self, vm: &InstanceId) -> Option<&VmSamples> {
        self.vms.get(vm)
    }

    /// All VMs of which samples are known.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&InstanceId, &VmSamples)> {
        self.vms.iter()
    }

    /// Forgets a VM that was removed.
    pub(super) fn remove(&mut self, vm: &InstanceId) {
        self.vms.remove(vm);
    }

    /// Continues with what was stored of a VM.
    pub(super) fn restore(&mut self, vm: &InstanceId, newest_ms: u64, arrived_ms: u64) {
        if let Some(samples) = self.vm(vm) {
            samples.newest_ms = samples.newest_ms.max(newest_ms);
            samples.arrived_ms = samples.arrived_ms.max(arrived_ms);
        }
    }

    /// Notes that an operation has stopped the VM.
    pub(super) fn stop(&mut self, vm: &InstanceId, now_ms: u64) {
        if let Some(samples) = self.vms.get_mut(vm) {
            samples.stopped_ms = now_ms;
        }
    }

    /// Notes which of the VMs that operations have stopped are still off.
    pub(super) fn still_stopped(&mut self, is_off: impl Fn(&InstanceId) -> bool, now_ms: u64) {
        let stopped = self
            .vms
            .iter_mut()
            .filter(|(_, samples)| samples.stopped_ms > samples.arrived_ms);
        for (vm, samples) in stopped {
            if is_off(vm) {
                samples.stopped_ms = now_ms;
            }
        }
    }

    /// The VMs of which something is unsaved.
    pub(super) fn unsaved(&self) -> Vec<InstanceId> {
        let unsaved = self.vms.iter().filter(|(_, samples)| samples.is_unsaved);
        unsaved.map(|(vm, _)| vm.clone()).collect()
    }

    /// What to save of a VM; it counts as saved then.
    pub(super) fn take_unsaved(&mut self, vm: InstanceId) -> Option<(InstanceId, u64, u64)> {
        let samples = self.vms.get_mut(&vm)?;
        samples.is_unsaved = false;
        Some((vm, samples.newest_ms, samples.arrived_ms))
    }

    /// Marks a VM as unsaved again, because saving it failed.
    pub(super) fn not_saved(&mut self, vm: &InstanceId) {
        if let Some(samples) = self.vms.get_mut(vm) {
            samples.is_unsaved = true;
        }
    }

    fn vm(&mut self, vm: &InstanceId) -> Option<&mut VmSamples> {
        if !self.vms.contains_key(vm) && self.vms.len() >= MAX_VMS {
            counter!("vmwatch_alert_vms_omitted_total").increment(1);
            if !std::mem::replace(&mut self.is_full, true) {
                warn!(
                    maximum = MAX_VMS,
                    "too many VMs; the samples of further VMs are not evaluated"
                );
            }
            return None;
        }
        Some(self.vms.entry(vm.clone()).or_default())
    }

    /// Notes a record that was evaluated before this replica took the lease.
    pub(super) fn note(&mut self, record: &EvaluationRecord, watched: &Watched) {
        self.take(record, None, watched);
    }

    /// Evaluates a record.
    pub(super) fn evaluate(&mut self, record: &EvaluationRecord, evaluation: &mut Evaluation<'_>) {
        let watched = evaluation.watched;
        self.take(record, Some(evaluation), watched);
    }

    fn take(
        &mut self,
        record: &EvaluationRecord,
        evaluation: Option<&mut Evaluation<'_>>,
        watched: &Watched,
    ) {
        self.newest_arrival_ms = self.newest_arrival_ms.max(record.arrived_ms);
        let Some(vm) = self.vm(&record.instance_id) else {
            return;
        };
        match record.source {
            Source::Agent => vm.take(record, evaluation, watched),
            Source::Hypervisor => vm.take_measured(record, evaluation),
        }
    }
}

/// How long after its time the record arrived, in milliseconds.
const fn delay_ms(record: &EvaluationRecord) -> u64 {
    record.arrived_ms.saturating_sub(record.at_ms)
}

fn ignored(reason: &'static str) {
    counter!("vmwatch_alert_records_ignored_total", "reason" => reason).increment(1);
}

impl VmSamples {
    /// Since when the agent is silent, if it is.
    pub(super) fn silent_since_ms(&self) -> u64 {
        self.arrived_ms.max(self.stopped_ms)
    }

    /// Takes a record of the agent.
    fn take(
        &mut self,
        record: &EvaluationRecord,
        mut evaluation: Option<&mut Evaluation<'_>>,
        watched: &Watched,
    ) {
        self.note_arrival(record.arrived_ms);
        let at_ms = record.at_ms;
        if at_ms < self.newest_ms {
            ignored("older");
            return;
        }
        self.newest_ms = at_ms;
        let delay_ms = delay_ms(record);
        let steady_ms = self.delay.note(delay_ms, record.arrived_ms);
        // A delay that varies around the limit is always on the same side of it.
        let is_late = steady_ms.unwrap_or(delay_ms) > LATE_MS;
        if is_late && steady_ms.is_none() {
            ignored("late");
            return;
        }
        self.evaluated_ms = self.evaluated_ms.max(record.arrived_ms);
        let read_ms = if is_late { record.arrived_ms } else { at_ms };
        let id = &record.instance_id;
        // The next sample begins, so the one before is complete.
        if self.parts.at_ms() < at_ms {
            let complete = std::mem::replace(&mut self.parts, Parts::new(at_ms, read_ms));
            if let Some(evaluation) = evaluation.as_deref_mut() {
                complete.decide(id, evaluation);
            }
        }
        self.parts.add(record, watched);
        if let Some(evaluation) = evaluation {
            evaluation.measures(record, read_ms);
            evaluation.filesystems(record, read_ms);
            self.parts.decide_early(id, evaluation);
        }
    }

    /// Takes a record of the hypervisor, which is evaluated only while the agent's records are not.
    fn take_measured(&mut self, record: &EvaluationRecord, evaluation: Option<&mut Evaluation<'_>>) {
        if record.at_ms < self.measured_ms {
            ignored("older");
        } else if delay_ms(record) > LATE_MS {
            ignored("late");
        } else if record.arrived_ms.saturating_sub(self.evaluated_ms) >= AGENT_IS_CURRENT_MS {
            self.measured_ms = record.at_ms;
            if let Some(evaluation) = evaluation {
                evaluation.measures(record, record.at_ms);
            }
        }
    }

    fn note_arrival(&mut self, arrived_ms: u64) {
        if arrived_ms <= self.arrived_ms {
            return;
        }
        let gap_ms = (arrived_ms - self.arrived_ms).min(MAX_INTERVAL_MS);
        // Only a gap after a known arrival shows the interval. One long gap changes it little.
        self.interval_ms = match (self.arrived_ms, self.interval_ms) {
            (0, _) => 0,
            (_, 0) => gap_ms,
            (_, usual_ms) => (usual_ms * 7 + gap_ms) / 8,
        };
        self.arrived_ms = arrived_ms;
        self.is_unsaved = true;
    }
}

impl Evaluation<'_> {
    /// The rules that apply to the VM.
    pub(super) fn rules(&self, vm: &InstanceId) -> Vec<std::sync::Arc<Rule>> {
        let rules = self.machine.rules().iter();
        let rules = rules.filter(|rule| self.facts.is_selected(vm, &rule.spec.vms));
        rules.cloned().collect()
    }

    /// Evaluates the measures of a record. `read_ms` is the time of the readings.
    fn measures(&mut self, record: &EvaluationRecord, read_ms: u64) {
        let Some(values) = &record.vm else { return };
        let vm = &record.instance_id;
        for rule in self.rules(vm) {
            if let Condition::Measure { measure, .. } = &rule.spec.condition
                && let Some(value) = measure.value(values)
            {
                let reading = Reading::value(value, read_ms);
                self.machine.observe(&rule, Some(vm), "", reading, self.out);
            }
        }
        let reads = |condition: &Condition| matches!(condition, Condition::Measure { .. });
        self.machine.end_unread(vm, read_ms, reads, self.out);
    }

    fn filesystems(&mut self, record: &EvaluationRecord, read_ms: u64) {
        if record.filesystems.is_empty() {
            return;
        }
        let vm = &record.instance_id;
        for rule in self.rules(vm) {
            let Condition::Filesystem { mount_point, .. } = &rule.spec.condition else {
                continue;
            };
            let all = record.filesystems.iter();
            for one in all.filter(|one| {
                mount_point
                    .as_ref()
                    .is_none_or(|pattern| pattern.matches(&one.mount_point))
            }) {
                let reading = Reading::value(one.used, read_ms);
                self.machine
                    .observe(&rule, Some(vm), &one.mount_point, reading, self.out);
            }
        }
        let reads = |condition: &Condition| matches!(condition, Condition::Filesystem { .. });
        self.machine.end_unread(vm, read_ms, reads, self.out);
    }
}
