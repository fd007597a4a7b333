//! Operations: the records of actions on VMs, with their steps and results.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};

use super::{
    InstanceId, MethodInfo, bounded_text, hex_id,
    lifecycle::{MachineState, Verb},
    metrics::Limit,
};
use crate::wire::FaultKind;

/// The id of an operation, written as 32 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(pattern = "^[0-9a-f]{32}$")
)]
pub struct OperationId(String);

/// The text is not a valid [`OperationId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", hex_id::RULE)]
pub struct InvalidOperationId;

impl OperationId {
    /// Creates the id of an operation that has no idempotency key. The bits must come from the operating system's
    /// random generator.
    pub fn from_random(bits: [u8; 16]) -> Self {
        Self(hex::encode(bits))
    }

    /// Derives the id of an operation from its idempotency key. A client can compute the id before it receives a reply.
    /// Because ids are unique, a second request with the same key finds the existing operation and does not execute the
    /// action again.
    pub fn from_idempotency_key(user: &str, instance: &InstanceId, method: &MethodInfo, key: &str) -> Self {
        Self(hex_id::from_parts(&[
            user,
            instance.as_str(),
            method.subject,
            key,
        ]))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for OperationId {
    type Err = InvalidOperationId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if hex_id::is_valid(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidOperationId)
        }
    }
}

impl<'de> Deserialize<'de> for OperationId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, hex_id::RULE, hex_id::is_valid).map(Self)
    }
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The progress of an operation.
///
/// ```text
/// requested ──> running ──> succeeded | failed | timed_out | outcome_unknown
///      └──────────────────> succeeded | failed | timed_out
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// The operation was recorded; no request has been sent to the hypervisor yet.
    Requested,
    /// A request to the hypervisor is being sent or has been sent.
    Running,
    /// The hypervisor reports the requested state.
    Succeeded,
    /// The hypervisor refused, or the VM did not reach the requested state.
    Failed,
    /// The deadline passed before the VM reached the requested state.
    TimedOut,
    /// It is unknown whether the hypervisor executed the action; it is not retried because it must not be executed
    /// twice.
    OutcomeUnknown,
    /// A state that only a newer version of vmwatch knows. This version cannot tell whether it is final.
    #[serde(other)]
    Unknown,
}

/// Implemented by hand because the derived schema would also list `Unknown`, which no API client can send.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for OperationState {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let description = "The progress of an operation.\n\n```text\nrequested ──> running ──> succeeded | failed | timed_out | outcome_unknown\n     └──────────────────> succeeded | failed | timed_out\n```";
        let states = [
            "requested",
            "running",
            "succeeded",
            "failed",
            "timed_out",
            "outcome_unknown",
        ];
        super::known_values(description, states)
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for OperationState {}

impl OperationState {
    /// The operation state's name as used on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::OutcomeUnknown => "outcome_unknown",
            Self::Unknown => "unknown",
        }
    }

    /// Whether the operation has finished.
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::Requested | Self::Running | Self::Unknown)
    }

    /// Whether the operation did not do what it should, or nobody knows whether it did.
    pub const fn is_failure(self) -> bool {
        matches!(self, Self::Failed | Self::TimedOut | Self::OutcomeUnknown)
    }
}

impl fmt::Display for OperationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A step of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Time at which the step took place, in Unix milliseconds.
    pub at_ms: u64,
    /// The operation's state after the step.
    pub state: OperationState,
    /// A description of the step; it quotes the hypervisor's message if there is one.
    pub text: String,
}

/// The record of an action on a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    pub id: OperationId,
    pub verb: Verb,
    /// Whether a reboot resets the VM without asking the guest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hard: bool,
    pub instance_id: InstanceId,
    /// The hypervisor that runs the VM; absent until it is found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
    /// The hypervisor that the request named; absent if it named none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_hypervisor: Option<String>,
    /// Name of the user that requested the action.
    pub user: String,
    /// IP address of the client, as seen by the gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Id of the request that caused the operation; the logs contain the same id.
    pub request_id: String,
    /// Time at which the action was requested, in Unix milliseconds.
    pub requested_at_ms: u64,
    /// Deadline for starting the action, Unix milliseconds. The action is not started after this time.
    pub deadline_ms: u64,
    /// Time at which the operation finished, in Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at_ms: Option<u64>,
    pub state: OperationState,
    /// The VM's state when the action succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineState>,
    /// The fault of an operation that did not succeed. The caller receives it if the caller still waits for the reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<OperationFault>,
    /// The operation's steps, oldest first.
    pub history: Vec<Event>,
}

/// Why an operation did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationFault {
    pub kind: FaultKind,
    /// The message shown to the user.
    pub message: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationRef {
    pub operation_id: OperationId,
}

/// A position in the list of operations, which is sorted newest first, and by id within the same millisecond.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationPosition {
    /// Time at which the operation was requested, in Unix milliseconds.
    pub requested_at_ms: u64,
    pub id: OperationId,
}

impl OperationPosition {
    /// The position of the given operation in the list.
    pub fn from_operation(operation: &Operation) -> Self {
        Self {
            requested_at_ms: operation.requested_at_ms,
            id: operation.id.clone(),
        }
    }

    /// Whether the operation comes after this position in the list.
    pub fn is_behind(&self, operation: &Operation) -> bool {
        (operation.requested_at_ms, &operation.id) < (self.requested_at_ms, &self.id)
    }
}

/// Selects operations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationFilter {
    /// Returns only operations on this VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// Returns only operations in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<OperationState>,
    /// Returns only operations after this position, which is that of the last operation of the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<OperationPosition>,
    /// Maximum number of operations to return.
    #[serde(default)]
    pub limit: Limit,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationPage {
    /// The operations, newest first.
    pub operations: Vec<Operation>,
    /// Whether the list of operations continues on a further page.
    pub more: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Method,
        lifecycle::{Start, Stop},
    };

    #[test]
    fn operation_id_depends_on_user_vm_method_and_idempotency_key() {
        let of = |user: &str, instance: &str, method: MethodInfo, key: &str| {
            OperationId::from_idempotency_key(user, &instance.parse().unwrap(), &method, key)
        };
        let also_starts = MethodInfo {
            subject: "lifecycle.resume",
            ..Start::INFO
        };
        let id = of("ann", "vm-1", Start::INFO, "k");
        assert_eq!(id, of("ann", "vm-1", Start::INFO, "k"));
        assert_eq!(id.as_str().parse::<OperationId>(), Ok(id.clone()));
        for other in [
            of("bob", "vm-1", Start::INFO, "k"),
            of("ann", "vm-2", Start::INFO, "k"),
            of("ann", "vm-1", Stop::INFO, "k"),
            of("ann", "vm-1", Start::INFO, "l"),
            of("ann", "vm-1s", Start::INFO, "k"),
            of("an", "nvm-1", Start::INFO, "k"),
            // The second method has the same action but a different subject.
            of("ann", "vm-1", also_starts, "k"),
        ] {
            assert_ne!(id, other);
        }
    }

    #[test]
    fn operation_id_must_be_32_hex_digits() {
        for bad in ["", "0", &"0".repeat(33), &"A".repeat(32), &"é".repeat(16), "*"] {
            assert_eq!(bad.parse::<OperationId>(), Err(InvalidOperationId), "{bad}");
        }
    }
}
