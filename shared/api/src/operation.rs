//! The record of a command on a VM: who asked for what, and what became of it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest, Sha256};

use super::{
    InstanceId, MethodInfo, bounded_text,
    lifecycle::{MachineState, Verb},
    metrics::Limit,
};
use crate::wire::FaultKind;

/// The id of a command: 32 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(pattern = "^[0-9a-f]{32}$")
)]
pub struct OperationId(String);

/// A text that is no [`OperationId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", OperationId::RULE)]
pub struct InvalidOperationId;

impl OperationId {
    const RULE: &str = "must be 32 lower-case hex digits";

    /// The id of a command without an idempotency key, of bits that the caller took from the system's random source.
    pub fn from_random(bits: [u8; 16]) -> Self {
        Self(hex::encode(bits))
    }

    /// The id of the command that carries this idempotency key: whoever sent it knows it before any answer, and
    /// making a record under it is also the claim that keeps the command from acting twice.
    pub fn of_key(user: &str, instance: &InstanceId, method: &MethodInfo, key: &str) -> Self {
        let mut hash = Sha256::new();
        for part in [user, instance.as_str(), method.subject, key] {
            // The length keeps one part from flowing into the next.
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let digest = hash.finalize();
        Self(hex::encode(digest.get(..16).unwrap_or_default()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }
}

impl FromStr for OperationId {
    type Err = InvalidOperationId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidOperationId)
        }
    }
}

impl<'de> Deserialize<'de> for OperationId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How far a command has come.
///
/// ```text
/// requested ──> running ──> succeeded | failed | timed_out | outcome_unknown
///      └──────────────────> succeeded | failed | timed_out
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Recorded; the hypervisor has not been told.
    Requested,
    /// The hypervisor has been told, or is just being told.
    Running,
    /// The hypervisor says that the machine is as it was asked to be.
    Succeeded,
    /// The hypervisor refused, or the machine did not come to be as it was asked to be.
    Failed,
    /// The time ran out first.
    TimedOut,
    /// The hypervisor may or may not have done it, and it is not to be done twice.
    OutcomeUnknown,
    /// A state of a newer version. Whether it is the last is not known here.
    #[serde(other)]
    Unknown,
}

/// By hand, since a derived schema would allow the unknown state as well.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for OperationState {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let description = "How far a command has come.\n\n```text\nrequested ──> running ──> succeeded | failed | timed_out | outcome_unknown\n     └──────────────────> succeeded | failed | timed_out\n```";
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
    /// The name, as on the wire.
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

    /// Whether nothing more will happen.
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::Requested | Self::Running | Self::Unknown)
    }
}

impl fmt::Display for OperationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something that happened to a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, Unix milliseconds.
    pub at_ms: u64,
    /// How far the command had come then.
    pub state: OperationState,
    /// What happened; where the hypervisor spoke, in its own words.
    pub text: String,
}

/// The record of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// What was asked.
    pub verb: Verb,
    /// Of a reboot: whether without asking the VM's system.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hard: bool,
    /// Of which VM.
    pub instance_id: InstanceId,
    /// Where that VM is, once it was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
    /// Who asked.
    pub user: String,
    /// From which address, as the gateway saw it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The request that it came with, as logs name it.
    pub request_id: String,
    /// When it was asked, Unix milliseconds.
    pub requested_at_ms: u64,
    /// Until when it may be begun, Unix milliseconds.
    pub deadline_ms: u64,
    /// When it ended, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at_ms: Option<u64>,
    /// How far it has come.
    pub state: OperationState,
    /// The VM's state when the command succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineState>,
    /// What the caller was told, or would have been, where it did not succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<OperationFault>,
    /// What happened, oldest first.
    pub history: Vec<Event>,
}

/// Why a command did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationFault {
    /// What a caller can act on.
    pub kind: FaultKind,
    /// In plain words.
    pub message: String,
}

/// Which command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationRef {
    /// Its id.
    pub operation_id: OperationId,
}

/// A place in the order of a list: the newest first, those of the same millisecond by their ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationPlace {
    /// When the command was asked, Unix milliseconds.
    pub requested_at_ms: u64,
    /// Its id.
    pub id: OperationId,
}

impl OperationPlace {
    /// The place of a command.
    pub fn of(operation: &Operation) -> Self {
        Self {
            requested_at_ms: operation.requested_at_ms,
            id: operation.id.clone(),
        }
    }

    /// Whether the command comes behind this place.
    pub fn is_behind(&self, operation: &Operation) -> bool {
        (operation.requested_at_ms, &operation.id) < (self.requested_at_ms, &self.id)
    }
}

/// Which commands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationFilter {
    /// On this VM only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// In this state only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<OperationState>,
    /// Only those behind this place: that of the last of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<OperationPlace>,
    /// At most how many, the newest first.
    #[serde(default)]
    pub limit: Limit,
}

/// A page of commands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationPage {
    /// The newest first.
    pub operations: Vec<Operation>,
    /// Whether there are more behind the last.
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
    fn scopes_a_key_to_user_vm_and_method() {
        let of = |user: &str, instance: &str, method: MethodInfo, key: &str| {
            OperationId::of_key(user, &instance.parse().unwrap(), &method, key)
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
            // Another method that does the same to the VM.
            of("ann", "vm-1", also_starts, "k"),
        ] {
            assert_ne!(id, other);
        }
    }

    #[test]
    fn an_id_is_32_hex_digits() {
        for bad in ["", "0", &"0".repeat(33), &"A".repeat(32), &"é".repeat(16), "*"] {
            assert_eq!(bad.parse::<OperationId>(), Err(InvalidOperationId), "{bad}");
        }
    }
}
