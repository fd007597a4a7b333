//! The record of a command, as the bucket holds it.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmwatch_api::{
    InstanceId,
    lifecycle::{Event, Machine, MachineState, Operation, OperationFault, OperationId, OperationState, Verb},
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::Context;

/// The most events of one record; what comes later replaces the last.
const MOST_EVENTS: usize = 32;

/// A command as it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) verb: Verb,
    pub(crate) hard: bool,
    pub(crate) instance_id: InstanceId,
}

/// What the bucket holds of a command: what callers may see, and what only replicas need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) operation: Operation,
    pub(super) lease: Lease,
    /// How often the hypervisor was told.
    pub(super) acts: u8,
    /// Whether it holds anything that this version does not know. Then it is shown, and never written or adopted here.
    #[serde(skip)]
    pub(super) newer: bool,
}

/// Who carries the command out, and until when nobody else may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lease {
    /// A replica: its own random name.
    pub(super) owner: String,
    /// Unix milliseconds.
    pub(super) until_ms: u64,
}

impl Lease {
    /// The end of a lease that begins now, Unix milliseconds.
    pub(super) fn until(length: Duration) -> u64 {
        unix_millis().saturating_add(u64::try_from(length.as_millis()).unwrap_or(u64::MAX))
    }
}

impl Record {
    /// Reads a record of whatever version. What this version knows of it, it would write the same again.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let mut record: Self = serde_json::from_slice(bytes)?;
        let stored: serde_json::Value = serde_json::from_slice(bytes)?;
        record.newer = serde_json::to_value(&record)? != stored;
        Ok(record)
    }

    /// The record of a command that is just asked.
    pub(super) fn new(id: OperationId, command: Command, context: &Context, lease: Lease) -> Self {
        let Command {
            verb,
            hard,
            instance_id,
        } = command;
        let operation = Operation {
            id,
            verb,
            hard,
            instance_id,
            hypervisor: None,
            user: context.user().to_owned(),
            source: context.source.clone(),
            request_id: context.request_id.clone(),
            requested_at_ms: unix_millis(),
            deadline_ms: context.deadline_ms,
            finished_at_ms: None,
            state: OperationState::Requested,
            machine: None,
            fault: None,
            history: Vec::new(),
        };
        let mut record = Self {
            operation,
            lease,
            acts: 0,
            newer: false,
        };
        record.note(OperationState::Requested, "asked for");
        record
    }

    /// Notes an event, with the state that the command has from then on.
    pub(super) fn note(&mut self, state: OperationState, text: impl Into<String>) {
        let operation = &mut self.operation;
        operation.state = state;
        operation.history.truncate(MOST_EVENTS - 1);
        operation.history.push(Event {
            at_ms: unix_millis(),
            state,
            text: text.into(),
        });
    }

    /// Ends the command.
    pub(super) fn end(&mut self, end: End) {
        let (state, text, fault) = match end {
            End::Succeeded(machine) => {
                self.operation.machine = Some(machine);
                (
                    OperationState::Succeeded,
                    format!("the machine is {}", plain_state(machine)),
                    None,
                )
            }
            End::Failed { kind, message } => (OperationState::Failed, message.clone(), Some((kind, message))),
            End::TimedOut(message) => (
                OperationState::TimedOut,
                message.clone(),
                Some((FaultKind::Timeout, message)),
            ),
            End::Unknown(message) => (
                OperationState::OutcomeUnknown,
                message.clone(),
                Some((FaultKind::Backend, message)),
            ),
        };
        self.note(state, text);
        self.operation.fault = fault.map(|(kind, message)| OperationFault { kind, message });
        self.operation.finished_at_ms = Some(unix_millis());
    }
}

/// How a command ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The hypervisor says that the machine is as it was asked to be.
    Succeeded(MachineState),
    /// It is not, and will not be.
    Failed { kind: FaultKind, message: String },
    /// The time ran out first.
    TimedOut(String),
    /// It may or may not be so, and the command must not be repeated.
    Unknown(String),
}

impl End {
    /// The end that a fault means.
    pub(super) fn of(fault: &Fault) -> Self {
        Self::Failed {
            kind: fault.kind,
            message: fault.message.clone(),
        }
    }
}

/// A state in words.
pub(super) const fn plain_state(state: MachineState) -> &'static str {
    match state {
        MachineState::Running => "running",
        MachineState::Starting => "on its way up",
        MachineState::Paused => "paused",
        MachineState::ShuttingDown => "on its way down",
        MachineState::ShutOff => "off",
        MachineState::Crashed => "crashed",
        MachineState::Suspended => "suspended",
        MachineState::Unknown => "in a state that the hypervisor does not name",
    }
}

/// What the caller of a command that has ended is told.
pub(super) fn answer(operation: Operation) -> Result<Machine, Fault> {
    match (operation.state, operation.machine, operation.fault) {
        (OperationState::Succeeded, Some(state), _) => Ok(Machine {
            instance_id: operation.instance_id,
            state,
            name: None,
            hypervisor: operation.hypervisor,
        }),
        (_, _, Some(fault)) => Err(Fault::new(fault.kind, fault.message)),
        _ => Err(Fault::new(
            FaultKind::Internal,
            format!("the record of the command {} is damaged", operation.id),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `VMWATCH_BLESS=1` does not write it anew: what replicas of before have stored must be read for ever.
    const GOLDEN: &str = include_str!("../../../tests/golden/forms/operation-record.json");

    #[test]
    fn a_stored_record_is_what_its_golden_file_says() {
        let record = Record::decode(GOLDEN.as_bytes()).unwrap();
        assert!(!record.newer);
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        assert_eq!(serde_json::to_value(&record).unwrap(), golden);
    }

    #[test]
    fn knows_a_record_of_a_newer_version_by_whatever_is_new() {
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        for (place, value) in [
            ("/operation/verb", "migrate"),
            ("/operation/state", "paused"),
            ("/operation/machine", "hibernated"),
            ("/operation/fault/kind", "quota"),
            ("/operation/history/0/state", "queued"),
        ] {
            let mut newer = golden.clone();
            *newer.pointer_mut(place).unwrap() = value.into();
            let record = Record::decode(newer.to_string().as_bytes()).unwrap();
            assert!(record.newer, "{place}");
        }
        for place in ["", "/operation", "/lease", "/operation/history/0"] {
            let mut newer = golden.clone();
            let object = newer.pointer_mut(place).unwrap().as_object_mut().unwrap();
            object.insert("extra".to_owned(), 1.into());
            assert!(
                Record::decode(newer.to_string().as_bytes()).unwrap().newer,
                "{place}"
            );
        }
    }
}
