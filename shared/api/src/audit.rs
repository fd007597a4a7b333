//! The audit record: the user, source, action, target and result of login attempts, user management, and VM actions.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    Access, Class, Kind, Method, MethodInfo, Role, Service, UserKey, UserName, auth::Login,
    lifecycle::OperationId, metrics::Limit,
};

/// The stream of audit records. Records are appended and never changed.
pub const AUDIT_STREAM: &str = "VMWATCH_AUDIT";
/// `vmwatch.v1.audit.<action>`, such as `vmwatch.v1.audit.lifecycle.start`.
pub const AUDIT_SUBJECT_PREFIX: &str = "vmwatch.v1.audit.";
/// The stream of records that can be caused without a session: failed logins. It is separate so that a flood of
/// failed logins evicts no other records.
pub const UNAUTHENTICATED_AUDIT_STREAM: &str = "VMWATCH_AUDIT_UNAUTHENTICATED";
/// `vmwatch.v1.audit_unauthenticated.<action>`.
pub const UNAUTHENTICATED_AUDIT_SUBJECT_PREFIX: &str = "vmwatch.v1.audit_unauthenticated.";

/// The result of the action, as known when the record was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditResult {
    /// The action was requested; a later record holds its result.
    Requested,
    Succeeded,
    /// The action was not allowed, or was not started.
    Refused,
    /// The action was attempted and failed.
    Failed,
    /// The deadline passed before the action ended.
    TimedOut,
    /// The action may or may not have taken effect.
    OutcomeUnknown,
    /// A result written by a newer version.
    #[serde(other)]
    Unknown,
}

/// Implemented by hand: a derived schema would list `Unknown` as well.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for AuditResult {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let description = "The result of the action, as known when the record was written.";
        let results = [
            "requested",
            "succeeded",
            "refused",
            "failed",
            "timed_out",
            "outcome_unknown",
        ];
        super::known_values(description, results)
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for AuditResult {}

impl fmt::Display for AuditResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Requested => "requested",
            Self::Succeeded => "succeeded",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::OutcomeUnknown => "outcome_unknown",
            Self::Unknown => "unknown",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Time of the record, Unix milliseconds.
    pub at_ms: u64,
    /// The requested action: the method's subject without the common prefix, such as `lifecycle.start`.
    pub action: String,
    /// Name of the user. For a login with an unknown name: [`UserName::shown`].
    pub user: String,
    /// Client address, as seen by the gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Target of the action: an instance id or a user name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Id of the request, as in the logs.
    pub request_id: String,
    /// The operation, for actions on VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    pub result: AuditResult,
    /// A description of the event; never contains a secret.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl AuditRecord {
    /// Whether the record was caused by a request with a session, or by an operator at the command line.
    pub fn is_authenticated(&self) -> bool {
        let failed_login = self.action == Login::INFO.subject && self.result != AuditResult::Succeeded;
        !failed_login && !self.user.is_empty()
    }

    /// The subject to publish the record on.
    pub fn subject(&self) -> String {
        let prefix = if self.is_authenticated() {
            AUDIT_SUBJECT_PREFIX
        } else {
            UNAUTHENTICATED_AUDIT_SUBJECT_PREFIX
        };
        format!("{prefix}{}", self.action)
    }
}

/// Where a page of the audit ended: the sequence of the oldest record examined, for each of the two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditCursor {
    /// Sequence in [`AUDIT_STREAM`].
    pub authenticated: u64,
    /// Sequence in [`UNAUTHENTICATED_AUDIT_STREAM`].
    pub unauthenticated: u64,
}

impl fmt::Display for AuditCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.authenticated, self.unauthenticated)
    }
}

/// A text that is not an [`AuditCursor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be next of the page before")]
pub struct InvalidCursor;

impl FromStr for AuditCursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (authenticated, unauthenticated) = text.split_once('-').ok_or(InvalidCursor)?;
        Ok(Self {
            authenticated: authenticated.parse().map_err(|_| InvalidCursor)?,
            unauthenticated: unauthenticated.parse().map_err(|_| InvalidCursor)?,
        })
    }
}

impl Serialize for AuditCursor {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AuditCursor {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Selects audit records, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditFilter {
    /// Only records older than this cursor, taken from [`AuditPage::next`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<AuditCursor>,
    /// Maximum number of records.
    #[serde(default)]
    pub limit: Limit,
    /// Only records of this user, compared without regard to case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserName>,
    /// Only records with this target: an instance id or a user name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Only records of this action or of any action below it: `auth` covers `auth.login`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// Earliest time, inclusive, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_ms: Option<u64>,
    /// Latest time, exclusive, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_ms: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditPage {
    /// The newest first. A page can hold fewer records than requested, even none, without being the last, because its
    /// size and the number of records examined are bounded.
    pub records: Vec<AuditRecord>,
    /// The value of [`AuditFilter::before`] for the next page; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<AuditCursor>,
}

/// Reads the audit.
#[derive(Debug)]
pub struct List;

impl Method for List {
    type Params = AuditFilter;
    type Reply = AuditPage;
    const INFO: MethodInfo = MethodInfo {
        service: Service::Auth,
        subject: "auth.audit.list",
        access: Access::Role(Role::Admin),
        kind: Kind::Query,
        class: Class::HeavyRead,
    };
}

impl AuditFilter {
    /// Whether the record passes the filter.
    pub fn allows(&self, record: &AuditRecord) -> bool {
        let under = |action: &str| {
            record
                .action
                .strip_prefix(action)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        self.user
            .as_ref()
            .is_none_or(|user| user.key() == UserKey::from_name(&record.user))
            && self
                .target
                .as_ref()
                .is_none_or(|target| record.target.as_ref() == Some(target))
            && self.action.as_deref().is_none_or(under)
            && self.from_ms.is_none_or(|from| record.at_ms >= from)
            && self.to_ms.is_none_or(|to| record.at_ms < to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_records_that_satisfy_every_condition() {
        let record = AuditRecord {
            at_ms: 1000,
            action: "auth.users.add".to_owned(),
            user: "ann".to_owned(),
            source: None,
            target: Some("bob".to_owned()),
            request_id: String::new(),
            operation_id: None,
            result: AuditResult::Succeeded,
            detail: String::new(),
        };
        let allows = |filter: serde_json::Value| {
            serde_json::from_value::<AuditFilter>(filter)
                .unwrap()
                .allows(&record)
        };
        for (filter, wanted) in [
            (serde_json::json!({}), true),
            (
                serde_json::json!({ "user": "ann", "target": "bob", "action": "auth.users.add" }),
                true,
            ),
            (serde_json::json!({ "action": "auth" }), true),
            (serde_json::json!({ "action": "auth.users" }), true),
            (serde_json::json!({ "action": "auth.user" }), false),
            (serde_json::json!({ "user": "an" }), false),
            (serde_json::json!({ "target": "ann" }), false),
            (serde_json::json!({ "from_ms": 1000, "to_ms": 1001 }), true),
            (serde_json::json!({ "from_ms": 1001 }), false),
            (serde_json::json!({ "to_ms": 1000 }), false),
        ] {
            assert_eq!(allows(filter.clone()), wanted, "{filter}");
        }
    }
}
