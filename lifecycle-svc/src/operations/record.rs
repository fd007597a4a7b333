//! Record of an operation, as stored in the KV bucket.

use serde::{Deserialize, Serialize};
use vmwatch_api::{
    InstanceId, MethodInfo,
    actions::Refused,
    api_tokens::ApiTokenLabel,
    lifecycle::{Event, Machine, MachineState, Operation, OperationFault, OperationId, OperationState, Verb},
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::Context;

use crate::{lease::Lease, state_machine::describe_state};

/// Maximum number of steps in an operation record; a further step replaces the last one.
const MAX_EVENTS: usize = 32;

/// A requested action on a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Command {
    /// Bus method that requested the action. It is part of idempotency keys and audit records.
    pub(crate) method: MethodInfo,
    pub(crate) verb: Verb,
    pub(crate) hard: bool,
    pub(crate) instance_id: InstanceId,
    /// The hypervisor that the request names.
    pub(crate) hypervisor: Option<String>,
}

/// Stored operation record: the operation that callers may see, and data that only replicas need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) operation: Operation,
    /// Subject of the bus method that requested the operation; empty in a record of an earlier version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) method: String,
    /// The API token with which the operation was requested, for the audit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) api_token: Option<ApiTokenLabel>,
    pub(super) lease: Lease,
    /// Number of times that the action was sent to the hypervisor.
    pub(super) acts: u8,
    /// Whether the record contains anything that this version does not know. Such a record is shown to users, but
    /// neither written nor adopted.
    #[serde(skip)]
    pub(super) newer: bool,
}

impl Record {
    /// Decodes a record of any version. If encoding the decoded record does not give the stored value again, the record
    /// is marked as newer.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let mut record: Self = serde_json::from_slice(bytes)?;
        let stored: serde_json::Value = serde_json::from_slice(bytes)?;
        record.newer = serde_json::to_value(&record)? != stored;
        Ok(record)
    }

    /// Creates the record of a new operation.
    pub(super) fn new(id: OperationId, command: Command, context: &Context, lease: Lease) -> Self {
        let Command {
            method,
            verb,
            hard,
            instance_id,
            hypervisor,
        } = command;
        let operation = Operation {
            id,
            verb,
            hard,
            instance_id,
            hypervisor: None,
            requested_hypervisor: hypervisor,
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
            method: method.subject.to_owned(),
            api_token: context.api_token.clone(),
            lease,
            acts: 0,
            newer: false,
        };
        record.note(OperationState::Requested, "requested");
        record
    }

    /// Whether both records have the parameters that the idempotency key does not identify.
    pub(super) fn is_same_request(&self, other: &Self) -> bool {
        let (one, other) = (&self.operation, &other.operation);
        (one.hard, &one.requested_hypervisor) == (other.hard, &other.requested_hypervisor)
    }

    /// Adds a step to the history and sets the state of the operation.
    pub(super) fn note(&mut self, state: OperationState, text: impl Into<String>) {
        let operation = &mut self.operation;
        operation.state = state;
        operation.history.truncate(MAX_EVENTS - 1);
        operation.history.push(Event {
            at_ms: unix_millis(),
            state,
            text: text.into(),
        });
    }

    /// Records how the operation has ended.
    pub(super) fn end(&mut self, end: End) {
        let (state, text, fault) = match end {
            End::Succeeded(machine) => {
                self.operation.machine = Some(machine);
                (
                    OperationState::Succeeded,
                    format!("the VM is {}", describe_state(machine)),
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

/// How an operation has ended, for its record and its caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The hypervisor reports that the VM is in the wanted state.
    Succeeded(MachineState),
    /// The VM is not in the wanted state and will not reach it.
    Failed { kind: FaultKind, message: String },
    /// The time limit passed before the VM reached the wanted state.
    TimedOut(String),
    /// The action may or may not have taken effect, and must not be repeated.
    Unknown(String),
}

impl End {
    /// Converts a fault to the end of an operation.
    pub(super) fn from_fault(fault: &Fault) -> Self {
        Self::Failed {
            kind: fault.kind,
            message: fault.message.clone(),
        }
    }
}

/// Returns the answer to the caller of an operation that has ended.
pub(super) fn answer(operation: Operation) -> Result<Machine, Fault> {
    match (operation.state, operation.machine, operation.fault) {
        (OperationState::Succeeded, Some(state), _) => Ok(Machine {
            instance_id: operation.instance_id,
            state,
            name: None,
            hypervisor: operation.hypervisor,
            allowed_actions: Vec::new(),
            refused_actions: Refused::new(),
        }),
        (_, _, Some(fault)) => Err(Fault::new(fault.kind, fault.message)),
        _ => Err(Fault::new(
            FaultKind::Internal,
            format!("the stored record of the operation {} is invalid", operation.id),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records stored by earlier versions. `VMWATCH_BLESS=1` does not rewrite these files, because such records must
    /// stay readable.
    const FORMER: &str = include_str!("../../../tests/golden/forms/operation-record.json");
    const GOLDEN: &str = include_str!("../../../tests/golden/forms/operation-record-token.json");

    #[test]
    fn operation_record_is_encoded_as_in_golden_files() {
        for golden in [FORMER, GOLDEN] {
            let record = Record::decode(golden.as_bytes()).unwrap();
            assert!(!record.newer);
            let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
            assert_eq!(serde_json::to_value(&record).unwrap(), golden);
        }
    }

    #[test]
    fn operation_record_of_a_newer_version_is_flagged() {
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        for (position, value) in [
            ("/operation/verb", "migrate"),
            ("/operation/state", "paused"),
            ("/operation/machine", "hibernated"),
            ("/operation/fault/kind", "quota"),
            ("/operation/history/0/state", "queued"),
        ] {
            let mut newer = golden.clone();
            *newer.pointer_mut(position).unwrap() = value.into();
            let record = Record::decode(newer.to_string().as_bytes()).unwrap();
            assert!(record.newer, "{position}");
        }
        for position in ["", "/operation", "/lease", "/operation/history/0"] {
            let mut newer = golden.clone();
            let object = newer.pointer_mut(position).unwrap().as_object_mut().unwrap();
            object.insert("extra".to_owned(), 1.into());
            assert!(
                Record::decode(newer.to_string().as_bytes()).unwrap().newer,
                "{position}"
            );
        }
    }
}
