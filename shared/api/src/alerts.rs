//! Methods of alert-svc, and the types of alerts.
//!
//! An alert says that the condition of a rule holds. It is identified by rule, VM and subject, such as a mount point, so a rule
//! can have several alerts of one VM at the same time.

pub mod channels;
pub mod culprits;
pub mod evaluation;
mod id;
pub mod rules;
pub mod silences;
mod texts;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use self::culprits::Culprits;
pub use self::{
    id::{InvalidRecordId, RecordId},
    texts::{Comment, InvalidTitle, Title},
};
use super::{
    Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service, lifecycle::OperationId,
    metrics::Limit,
};

/// Maximum length of an alert's subject in bytes: that of a mount point.
pub const MAX_SUBJECT: usize = 1024;

/// The entry of the method table of a query to alert-svc.
const fn query(subject: &'static str) -> MethodInfo {
    MethodInfo {
        service: Service::Alert,
        subject,
        access: Access::Role(Role::Viewer),
        kind: Kind::Query,
        class: Class::CheapRead,
    }
}

/// The entry of the method table of a change in alert-svc.
const fn change(subject: &'static str, role: Role) -> MethodInfo {
    MethodInfo {
        service: Service::Alert,
        subject,
        access: Access::Role(role),
        kind: Kind::Command,
        class: Class::Account,
    }
}

/// How urgent an alert is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Severity {
    /// No action is needed soon.
    Info,
    /// Action is needed within hours.
    Warning,
    /// Action is needed at once.
    Critical,
}

impl Severity {
    /// The name of the severity on the wire and in the label `severity`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// The state of an alert.
///
/// ```text
/// pending ──> firing ──> acknowledged ──> resolved
///                  └────────────────────────┘
/// ```
///
/// A pending alert whose condition ends before the duration of the rule has passed is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum AlertState {
    /// The condition holds, but not yet for the duration that the rule requires.
    Pending,
    /// The condition has held for the required duration.
    Firing,
    /// The condition holds, and a user has taken note of it.
    Acknowledged,
    /// The condition has ended.
    Resolved,
}

impl AlertState {
    /// Whether the alert is firing or acknowledged.
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Firing | Self::Acknowledged)
    }

    /// The name of the state on the wire and in the database.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Firing => "firing",
            Self::Acknowledged => "acknowledged",
            Self::Resolved => "resolved",
        }
    }
}

/// The operation that ended the condition of an alert.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedBy {
    pub operation_id: OperationId,
    /// What the operation did, such as `stop`.
    pub action: String,
    /// Name of the user that requested the operation.
    pub user: String,
}

/// An alert. All times are Unix milliseconds, by the clock of the samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alert {
    pub id: RecordId,
    pub rule_id: RecordId,
    /// The rule's name, severity and condition when the alert began.
    pub rule_name: Title,
    pub severity: Severity,
    pub condition: rules::Condition,
    /// `None` if the alert is about the deployment and not about a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// The hypervisor's name for the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
    /// The labels of the VM when the alert began to fire; those of its hypervisor as `hv/key`.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What of the VM the alert is about: a mount point, the name of a process, an operation; empty for the VM itself.
    #[serde(default)]
    pub subject: String,
    pub state: AlertState,
    /// The newest value of the measure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// When the condition began to hold.
    pub since_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fired_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged_by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved_ms: Option<u64>,
    /// The operation that ended the condition, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_by: Option<EndedBy>,
    /// What explains the condition; `None` until it has been looked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub culprits: Option<Culprits>,
    /// Number of the alert's last change, which a change of the alert must name.
    pub revision: u64,
}

/// Selects alerts. A principal with a limited scope gets only those of VMs in scope.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlertFilter {
    /// Only alerts in this state; without it, those that are pending, firing or acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<AlertState>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub severity: Option<Severity>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule_id: Option<RecordId>,
    /// Only alerts whose condition held at some time at or after this one, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_ms: Option<u64>,
    /// Only alerts that began before this time, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_ms: Option<u64>,
    /// The `next` value of the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<AlertPosition>,
    #[serde(default)]
    pub limit: Limit,
}

/// The position of an alert in a list: newest first, by `since_ms`, then id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlertPosition {
    pub since_ms: u64,
    pub id: RecordId,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AlertPage {
    pub alerts: Vec<Alert>,
    /// Absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<AlertPosition>,
    /// Number of firing and acknowledged alerts in scope, by severity, whatever the filter.
    #[serde(default)]
    pub active: BTreeMap<String, u64>,
    /// Whether a rule has recipients, so that an alert notifies somebody.
    #[serde(default)]
    pub has_recipients: bool,
}

/// Lists alerts, newest first.
#[derive(Debug)]
pub struct AlertsList;

impl Method for AlertsList {
    type Params = AlertFilter;
    type Reply = AlertPage;
    const INFO: MethodInfo = query("alert.alerts.list");

    fn instance(params: &AlertFilter) -> Option<&InstanceId> {
        params.instance_id.as_ref()
    }

    fn hidden() -> Result<AlertPage, crate::wire::Fault> {
        Ok(AlertPage::default())
    }
}

/// Identifies an alert, rule, silence, channel or message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordRef {
    pub id: RecordId,
}

/// Identifies a revision of an alert, rule, silence or channel. A change that is based on an older revision fails with a
/// conflict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevisionRef {
    pub id: RecordId,
    pub revision: u64,
}

/// Reads an alert.
#[derive(Debug)]
pub struct AlertsGet;

impl Method for AlertsGet {
    type Params = RecordRef;
    type Reply = Alert;
    const INFO: MethodInfo = query("alert.alerts.get");
}

/// Records that a user has taken note of a firing alert. Repeated notifications of it end. An alert that is already
/// acknowledged stays as it is.
#[derive(Debug)]
pub struct AlertsAcknowledge;

impl Method for AlertsAcknowledge {
    type Params = RecordRef;
    type Reply = Alert;
    const INFO: MethodInfo = change("alert.alerts.acknowledge", Role::Operator);
}
