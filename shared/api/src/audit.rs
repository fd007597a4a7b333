//! The audit record: who asked for what, from where, and what became of it. Login attempts, what administrators do with
//! users, and commands on VMs.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    Access, Class, Kind, Method, MethodInfo, Role, Service, UserKey, UserName, auth::Login,
    lifecycle::OperationId, metrics::Limit,
};

/// The stream of audit records, appended to and never changed.
pub const AUDIT_STREAM: &str = "VMWATCH_AUDIT";
/// `vmwatch.v1.audit.<action>`, such as `vmwatch.v1.audit.lifecycle.start`.
pub const AUDIT_SUBJECT_PREFIX: &str = "vmwatch.v1.audit.";
/// The stream of records that anybody can cause without a session: failed logins. Apart from the others, so that a flood
/// of them evicts nothing else.
pub const UNAUTHENTICATED_AUDIT_STREAM: &str = "VMWATCH_AUDIT_UNAUTHENTICATED";
/// `vmwatch.v1.audit_unauthenticated.<action>`.
pub const UNAUTHENTICATED_AUDIT_SUBJECT_PREFIX: &str = "vmwatch.v1.audit_unauthenticated.";

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
    /// A result of a newer version.
    #[serde(other)]
    Unknown,
}

/// By hand, since a derived schema would list the unknown result as well.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for AuditResult {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let description = "What became of it, as far as it was known when the record was made.";
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

/// One line of the audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// When, Unix milliseconds.
    pub at_ms: u64,
    /// What was asked for: the subject of the method behind the common prefix, such as `lifecycle.start`.
    pub action: String,
    /// The name of the user who asked. Of a login with the name of no known user: [`UserName::shown`].
    pub user: String,
    /// From which address, as the gateway saw it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// On what: an instance id, or the name of a user.
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
    /// Whether somebody with a session, or an operator, caused the record.
    pub fn is_authenticated(&self) -> bool {
        let failed_login = self.action == Login::INFO.subject && self.result != AuditResult::Succeeded;
        !failed_login && !self.user.is_empty()
    }

    /// The subject that the record is published on.
    pub fn subject(&self) -> String {
        let prefix = if self.is_authenticated() {
            AUDIT_SUBJECT_PREFIX
        } else {
            UNAUTHENTICATED_AUDIT_SUBJECT_PREFIX
        };
        format!("{prefix}{}", self.action)
    }
}

/// Where a page of the audit ended: in each of its two streams the number of the oldest record that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditCursor {
    /// In [`AUDIT_STREAM`].
    pub authenticated: u64,
    /// In [`UNAUTHENTICATED_AUDIT_STREAM`].
    pub unauthenticated: u64,
}

impl fmt::Display for AuditCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.authenticated, self.unauthenticated)
    }
}

/// A text that is no [`AuditCursor`].
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

/// Which records of the audit, the newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditFilter {
    /// Only records older than this one, by [`AuditPage::next`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<AuditCursor>,
    /// At most how many.
    #[serde(default)]
    pub limit: Limit,
    /// Of this user only; upper and lower case are the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserName>,
    /// On this only: an instance id, or the name of a user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Of this action only, or of all below it: `auth` covers `auth.login`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// Not before this moment, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_ms: Option<u64>,
    /// Before this moment, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_ms: Option<u64>,
}

/// A page of the audit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditPage {
    /// The newest first. A page may hold fewer than were asked for, even none, and still not be the last: a page has
    /// bounds in bytes and in records that are looked at.
    pub records: Vec<AuditRecord>,
    /// What [`AuditFilter::before`] is for the next page; absent on the last.
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
    /// Whether a record is wanted.
    pub fn allows(&self, record: &AuditRecord) -> bool {
        let under = |action: &str| {
            record
                .action
                .strip_prefix(action)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        self.user
            .as_ref()
            .is_none_or(|user| user.key() == UserKey::of(&record.user))
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
    fn a_filter_is_all_of_its_parts() {
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
