//! The watched processes of one sample, summed over its parts.
//!
//! A record does not say how many parts its sample has. What is missing is therefore decided when the next sample of
//! the VM begins; a sum that is already above its limit is decided at once.

use std::collections::{BTreeMap, BTreeSet};

use vmwatch_api::{
    InstanceId,
    alerts::{
        evaluation::EvaluationRecord,
        rules::{Condition, Direction, Threshold},
    },
    processes::ProcessName,
};

use super::{machine::Reading, samples::Evaluation, watched::Watched};

/// Maximum number of parts of a sample that are summed.
const MAX_PARTS: usize = 1000;

/// What the processes with one name use.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Sum {
    processes: f64,
    cpu_util: f64,
    mem: f64,
}

impl Sum {
    /// The value that the condition is about; `None` if it is not about processes.
    const fn value(&self, condition: &Condition) -> Option<f64> {
        match condition {
            Condition::ProcessCount { .. } => Some(self.processes),
            Condition::ProcessCpu { .. } => Some(self.cpu_util),
            Condition::ProcessMem { .. } => Some(self.mem),
            _ => None,
        }
    }
}

/// The watched processes of a sample.
#[derive(Debug, Clone, Default)]
pub(super) struct Parts {
    at_ms: u64,
    /// The time of its readings, which differs if the clock of the VM is slow.
    read_ms: u64,
    /// The parts that were added, so that one that is delivered twice is counted once.
    seen: BTreeSet<u32>,
    /// Whether the sample has process rows at all.
    has_processes: bool,
    /// The lowest revision of the watched names with which a part was made.
    revision: u64,
    sums: BTreeMap<ProcessName, Sum>,
}

impl Parts {
    pub(super) const fn new(at_ms: u64, read_ms: u64) -> Self {
        Self {
            at_ms,
            read_ms,
            seen: BTreeSet::new(),
            has_processes: false,
            revision: u64::MAX,
            sums: BTreeMap::new(),
        }
    }

    pub(super) const fn at_ms(&self) -> u64 {
        self.at_ms
    }

    /// Adds a part of the sample.
    pub(super) fn add(&mut self, record: &EvaluationRecord, watched: &Watched) {
        if self.seen.len() >= MAX_PARTS || !self.seen.insert(record.part) {
            return;
        }
        if record.has_processes {
            self.has_processes = true;
            self.revision = self.revision.min(record.watched_revision);
        }
        // Names that no rule is about any more need no memory.
        for processes in record.processes.iter().filter(|one| watched.contains(&one.name)) {
            let sum = self.sums.entry(processes.name.clone()).or_default();
            sum.processes += f64::from(processes.processes);
            sum.cpu_util += processes.cpu_util;
            sum.mem += processes.mem;
        }
    }

    /// Decides conditions that further parts cannot end: those whose sum is above the limit.
    pub(super) fn decide_early(&self, vm: &InstanceId, evaluation: &mut Evaluation<'_>) {
        self.read(vm, evaluation, |sum, threshold| {
            let is_above = |threshold: Threshold| threshold.direction() == Direction::Above;
            threshold.is_some_and(|threshold| is_above(threshold) && threshold.holds(sum, false))
        });
    }

    /// Decides all conditions about processes; the sample is complete.
    pub(super) fn decide(&self, vm: &InstanceId, evaluation: &mut Evaluation<'_>) {
        self.read(vm, evaluation, |_, _| true);
    }

    fn read(
        &self,
        vm: &InstanceId,
        evaluation: &mut Evaluation<'_>,
        decides: impl Fn(f64, Option<Threshold>) -> bool,
    ) {
        if !self.has_processes {
            return;
        }
        for rule in evaluation.rules(vm) {
            let condition = &rule.spec.condition;
            let Some(name) = condition.process() else {
                continue;
            };
            let sum = match self.sums.get(name) {
                Some(sum) => *sum,
                None if evaluation.watched.has_since(name, self.revision) => Sum::default(),
                None => continue,
            };
            if let Some(value) = sum.value(condition)
                && decides(value, condition.threshold())
            {
                let reading = Reading::value(value, self.read_ms);
                let machine = &mut *evaluation.machine;
                machine.observe(&rule, Some(vm), name.as_str(), reading, evaluation.out);
            }
        }
    }
}
