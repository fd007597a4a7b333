//! Hands changes of alerts to the writer, with the records that caused them.

use async_nats::jetstream::Message;
use tokio::sync::mpsc::error::TrySendError;
use vmwatch_api::alerts::{Alert, AlertState, RecordId, rules::Rule};

use super::{
    Engine,
    machine::{ConditionKey, Step, Transition},
    progress::Position,
    writer::{Change, Work, Write},
};
use crate::known_vms::VmFacts;

/// Number of works that wait for the writer. Beyond it, only the flow of samples is evaluated.
const MAX_WAITING: usize = 8;

impl Engine {
    /// Hands changes to the writer that no record caused.
    pub(super) fn hand_over(&mut self, transitions: Vec<Transition>) {
        if transitions.is_empty() {
            return;
        }
        // Changes of the same condition stay in their order.
        self.finish_batch();
        let writes = self.writes(transitions);
        self.send(writes, None);
    }

    pub(super) fn send(&mut self, writes: Vec<Write>, acknowledges: Option<Message>) {
        self.waiting.push_back(Work {
            writes,
            acknowledges,
            sequence: self.evaluated,
        });
        self.send_waiting();
    }

    /// Gives the writer the works that wait, as far as it has room.
    pub(super) fn send_waiting(&mut self) {
        while let Some(work) = self.waiting.pop_front() {
            if let Err(TrySendError::Full(work) | TrySendError::Closed(work)) = self.queue.try_send(work) {
                self.waiting.push_front(work);
                return;
            }
        }
    }

    pub(super) fn position(&self) -> Position {
        Position {
            evaluated: self.evaluated,
            written: *self.written.borrow(),
        }
    }

    /// Whether the writer is so late that only the flow of samples is evaluated.
    pub(super) fn is_stuck(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    /// The writes for changes.
    pub(super) fn writes(&self, transitions: Vec<Transition>) -> Vec<Write> {
        let writes = transitions
            .into_iter()
            .filter_map(|transition| self.write(transition));
        writes.collect()
    }

    fn write(&self, transition: Transition) -> Option<Write> {
        let Transition {
            key,
            step,
            at_ms,
            since_ms,
            value,
        } = transition;
        let facts = |key: &ConditionKey| match &key.vm {
            Some(vm) => self.setup.known.facts(vm),
            None => VmFacts::default(),
        };
        let change = match step {
            Step::Begin { fires } => {
                // A rule that was removed since ends its conditions anyway.
                let rule = self.machine.rule(&key.rule)?;
                let fired_ms = fires.then_some(at_ms);
                Change::Begin(Box::new(new_alert(
                    rule,
                    &key,
                    facts(&key),
                    since_ms,
                    fired_ms,
                    value,
                )))
            }
            Step::Fire => Change::Fire {
                value,
                facts: Box::new(facts(&key)),
            },
            Step::Refresh => Change::Refresh { value },
            Step::Resolve { held_ms } => Change::Resolve { value, held_ms },
            Step::Withdraw => Change::Withdraw,
        };
        Some(Write { key, at_ms, change })
    }
}

/// A new alert of a condition.
pub(super) fn new_alert(
    rule: &Rule,
    key: &ConditionKey,
    facts: VmFacts,
    since_ms: u64,
    fired_ms: Option<u64>,
    value: Option<f64>,
) -> Alert {
    let vm = key.vm.as_ref().map_or("", |vm| vm.as_str());
    let (revision, since) = (rule.revision.to_string(), since_ms.to_string());
    Alert {
        id: RecordId::from_parts(&[rule.id.as_str(), &revision, vm, &key.subject, &since]),
        rule_id: rule.id.clone(),
        rule_name: rule.spec.name.clone(),
        severity: rule.spec.severity,
        condition: rule.spec.condition.clone(),
        instance_id: key.vm.clone(),
        vm_name: facts.name,
        hypervisor: facts.hypervisors.first().map(std::string::ToString::to_string),
        labels: facts.labels,
        subject: key.subject.clone(),
        state: if fired_ms.is_some() {
            AlertState::Firing
        } else {
            AlertState::Pending
        },
        value,
        since_ms,
        fired_ms,
        acknowledged_ms: None,
        acknowledged_by: None,
        resolved_ms: None,
        ended_by: None,
        culprits: None,
        revision: 1,
    }
}
