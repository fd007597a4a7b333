//! The audit record: who asked for what, from where, and what became of it. Login attempts and commands on VMs.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::lifecycle::OperationId;

/// The stream of audit records, appended to and never changed.
pub const AUDIT_STREAM: &str = "VMWATCH_AUDIT";
/// `vmwatch.v1.audit.<action>`, such as `vmwatch.v1.audit.lifecycle.start`.
pub const AUDIT_SUBJECT_PREFIX: &str = "vmwatch.v1.audit.";

/// What became of it, as far as it was known when the record was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditResult {
    /// It was asked for; another record tells the end.
    Requested,
    /// It was done.
    Succeeded,
    /// It was not allowed, or was not begun.
    Refused,
    /// It was tried and did not succeed.
    Failed,
    /// The time ran out first.
    TimedOut,
    /// It may or may not have been done.
    OutcomeUnknown,
}

impl fmt::Display for AuditResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Requested => "requested",
            Self::Succeeded => "succeeded",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::OutcomeUnknown => "outcome_unknown",
        })
    }
}

/// One line of the audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// When, Unix milliseconds.
    pub at_ms: u64,
    /// What was asked for: the subject of the method behind the common prefix, such as `lifecycle.start`.
    pub action: String,
    /// Who asked; of a login, the name that was given, known or not.
    pub user: String,
    /// From which address, as the gateway saw it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// On what: an instance id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The request that it came with, as logs name it.
    pub request_id: String,
    /// Of a command on a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    /// What became of it.
    pub result: AuditResult,
    /// In words; never a secret.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl AuditRecord {
    /// The subject that the record is published on.
    pub fn subject(&self) -> String {
        format!("{AUDIT_SUBJECT_PREFIX}{}", self.action)
    }
}
