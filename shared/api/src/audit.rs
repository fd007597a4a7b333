//! The audit record: the user, source, action, target and result of login attempts, user management, and VM actions.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    Access, Class, Kind, Method, MethodInfo, Role, Service, UserKey, UserName, api_tokens::ApiTokenLabel,
    auth::Login, enrollment::AgentsEnroll, lifecycle::OperationId, metrics::Limit,
};

/// The JetStream stream of audit records. Records are only appended, never changed.
pub const AUDIT_STREAM: &str = "VMWATCH_AUDIT";
/// Prefix of audit subjects: a record is published on `vmwatch.v1.audit.<action>`, such as
/// `vmwatch.v1.audit.lifecycle.start`.
pub const AUDIT_SUBJECT_PREFIX: &str = "vmwatch.v1.audit.";
/// The JetStream stream of audit records that a client can cause without a session: failed logins and refused enrolments
/// of agents. It is a separate stream so that a flood of them cannot evict other audit records.
pub const UNAUTHENTICATED_AUDIT_STREAM: &str = "VMWATCH_AUDIT_UNAUTHENTICATED";
/// Prefix of subjects for audit records without a session: `vmwatch.v1.audit_unauthenticated.<action>`.
pub const UNAUTHENTICATED_AUDIT_SUBJECT_PREFIX: &str = "vmwatch.v1.audit_unauthenticated.";

/// The result of the audited action, as known when the record was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditResult {
    /// The action was requested; a later audit record will hold its result.
    Requested,
    Succeeded,
    /// The action was not allowed, or was not started.
    Refused,
    /// The action was attempted and failed.
    Failed,
    /// The deadline passed before the action finished.
    TimedOut,
    /// The action may or may not have taken effect.
    OutcomeUnknown,
    /// A result that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

/// Implemented by hand because the derived schema would also list `Unknown`, which no API client can send.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for AuditResult {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let description = "The result of the audited action, as known when the record was written.";
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
    /// Time at which the audit record was written, in Unix milliseconds.
    pub at_ms: u64,
    /// The requested action, written as the method's subject without the common prefix, such as `lifecycle.start`.
    pub action: String,
    /// Name of the user who attempted the action. If no such user exists, the name is escaped by [`UserName::shown`]. For
    /// the enrolment of an agent, the name of the user that created the join token.
    pub user: String,
    /// The API token of the request; `None` if the request was sent with a session or without a credential.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_token: Option<ApiTokenLabel>,
    /// IP address of the client, as seen by the gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Target of the audited action: a VM's instance id or a user name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Id of the request that caused the audit record; the logs contain the same id.
    pub request_id: String,
    /// Id of the operation, if the audited action was an action on a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    pub result: AuditResult,
    /// A description of the audited event; it never contains a secret.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl AuditRecord {
    /// Whether the audit record was caused by a request with a session or with a valid join token, or by an operator at the
    /// command line.
    pub fn is_authenticated(&self) -> bool {
        let without_session =
            [Login::INFO.subject, AgentsEnroll::INFO.subject].contains(&self.action.as_str());
        let is_valid = matches!(self.result, AuditResult::Requested | AuditResult::Succeeded);
        (is_valid || !without_session) && !self.user.is_empty()
    }

    /// The NATS subject that the audit record is published on.
    pub fn subject(&self) -> String {
        let prefix = if self.is_authenticated() {
            AUDIT_SUBJECT_PREFIX
        } else {
            UNAUTHENTICATED_AUDIT_SUBJECT_PREFIX
        };
        format!("{prefix}{}", self.action)
    }
}

/// The position where a page of audit records ended: the sequence number of the oldest examined record in each of the
/// two audit streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditCursor {
    /// Sequence number in [`AUDIT_STREAM`].
    pub authenticated: u64,
    /// Sequence number in [`UNAUTHENTICATED_AUDIT_STREAM`].
    pub unauthenticated: u64,
}

impl fmt::Display for AuditCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.authenticated, self.unauthenticated)
    }
}

/// The text is not a valid [`AuditCursor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be the value of `next` from the previous page")]
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

/// Selects audit records; the result is sorted newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditFilter {
    /// Returns only audit records older than this cursor, which is the [`AuditPage::next`] of the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<AuditCursor>,
    /// Maximum number of audit records to return.
    #[serde(default)]
    pub limit: Limit,
    /// Returns only audit records of this user; letter case is ignored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserName>,
    /// Returns only audit records with this target: a VM's instance id or a user name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Returns only audit records of this action and of the actions below it: `auth` includes `auth.login`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// Returns only audit records written at or after this time, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_ms: Option<u64>,
    /// Returns only audit records written before this time, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_ms: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditPage {
    /// Audit records, newest first. Because both the page size and the number of examined records are bounded, a page
    /// can have fewer records than requested, or none, without being the last page.
    pub records: Vec<AuditRecord>,
    /// The value of [`AuditFilter::before`] for the next page; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<AuditCursor>,
}

/// Reads audit records.
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
    /// Whether the audit record meets all conditions of the filter.
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
    fn audit_filter_allows_only_records_that_meet_all_conditions() {
        let record = AuditRecord {
            at_ms: 1000,
            action: "auth.users.add".to_owned(),
            user: "ann".to_owned(),
            api_token: None,
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
