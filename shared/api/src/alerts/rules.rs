//! Rules: the conditions under which alerts fire, and the methods that read and change them.

mod condition;
mod selector;

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

pub use self::{
    condition::{Condition, Direction, FaultKind, MeasureName, MountPattern, Threshold},
    selector::{NamePattern, VmSelector},
};
use super::{RecordId, RecordRef, Severity, Title, change, query};
use crate::{Class, InstanceId, Method, MethodInfo, Role, sessions::Own, users::Done};

/// Maximum number of rules.
pub const MAX_RULES: usize = 500;
/// Maximum number of recipients of a rule.
pub const MAX_RECIPIENTS: usize = 10;
/// Maximum duration of a rule in seconds: one day.
pub const MAX_FOR_SECONDS: u32 = 86_400;
/// Time before now that a preview covers, in milliseconds: seven days.
pub const PREVIEW_MS: u64 = 7 * 86_400_000;
/// Maximum number of VMs of a preview.
pub const PREVIEW_VMS: usize = 50;

/// What a user sets of a rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleSpec {
    pub name: Title,
    /// A rule that is not enabled fires nothing, and its alerts are resolved.
    pub enabled: bool,
    pub condition: Condition,
    /// For how many seconds the condition must hold before the alert fires, 0 to [`MAX_FOR_SECONDS`].
    #[serde(deserialize_with = "for_seconds")]
    pub for_seconds: u32,
    pub severity: Severity,
    #[serde(default)]
    pub vms: VmSelector,
    /// Ids of the channels that are notified, at most [`MAX_RECIPIENTS`].
    #[serde(default, deserialize_with = "recipients")]
    pub recipients: Vec<RecordId>,
}

fn for_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        seconds @ 0..=MAX_FOR_SECONDS => Ok(seconds),
        _ => Err(D::Error::custom("must be 0 to 86400 seconds")),
    }
}

fn recipients<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<RecordId>, D::Error> {
    let ids = Vec::deserialize(deserializer)?;
    if ids.len() <= MAX_RECIPIENTS {
        Ok(ids)
    } else {
        Err(D::Error::custom("must list at most 10 channels"))
    }
}

/// A rule as stored and answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    pub id: RecordId,
    /// Number of the rule's last change, which the next change must name.
    pub revision: u64,
    pub spec: RuleSpec,
    /// Name of the user that made the last change; empty for a starter rule that was never changed.
    pub changed_by: String,
    /// Unix milliseconds.
    pub changed_ms: u64,
    /// Why the rule cannot be evaluated at the moment; a text for users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Number of firing and acknowledged alerts of the rule, in the principal's scope.
    #[serde(default)]
    pub active: u64,
}

/// A stored rule that this version of vmwatch cannot decode. It is not evaluated; it can be removed or replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnreadableRule {
    pub id: RecordId,
    pub revision: u64,
    /// The name, if that can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A text for users.
    pub problem: String,
}

/// All rules, by name.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RuleList {
    pub rules: Vec<Rule>,
    /// Only for principals with the scope of all VMs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<UnreadableRule>,
}

#[derive(Debug)]
pub struct RulesList;

impl Method for RulesList {
    type Params = Own;
    type Reply = RuleList;
    const INFO: MethodInfo = query("alert.rules.list");
}

#[derive(Debug)]
pub struct RulesGet;

impl Method for RulesGet {
    type Params = RecordRef;
    type Reply = Rule;
    const INFO: MethodInfo = query("alert.rules.get");
}

/// Creates a rule. It needs the scope of all VMs, as do all changes of rules.
#[derive(Debug)]
pub struct RulesCreate;

impl Method for RulesCreate {
    type Params = RuleSpec;
    type Reply = Rule;
    const INFO: MethodInfo = change("alert.rules.create", Role::Operator);
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleChange {
    pub id: RecordId,
    /// The revision that the change is based on.
    pub revision: u64,
    pub spec: RuleSpec,
}

/// Changes a rule. If its condition, duration or VMs change, its alerts are resolved, and the condition is evaluated from the beginning.
#[derive(Debug)]
pub struct RulesUpdate;

impl Method for RulesUpdate {
    type Params = RuleChange;
    type Reply = Rule;
    const INFO: MethodInfo = change("alert.rules.update", Role::Operator);
}

/// Removes a rule and resolves its alerts.
#[derive(Debug)]
pub struct RulesRemove;

impl Method for RulesRemove {
    type Params = super::RevisionRef;
    type Reply = Done;
    const INFO: MethodInfo = change("alert.rules.remove", Role::Operator);
}

/// When a rule would have fired for one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreviewVm {
    pub instance_id: InstanceId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_name: Option<String>,
    /// Each time at which the alert would have been firing, oldest first.
    pub firing: Vec<Firing>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Firing {
    /// Unix milliseconds.
    pub from_ms: u64,
    /// Unix milliseconds; the end of the preview if the condition still holds.
    pub to_ms: u64,
    /// The value farthest beyond the threshold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak: Option<f64>,
}

/// When a rule would have fired in the last seven days.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Preview {
    pub from_ms: u64,
    pub to_ms: u64,
    /// Length of the time buckets that were evaluated, in milliseconds. Shorter peaks are not seen.
    pub step_ms: u64,
    /// The VMs for which the rule would have fired, those with the most firings first.
    pub vms: Vec<PreviewVm>,
    /// Number of VMs that were evaluated, at most [`PREVIEW_VMS`].
    pub evaluated: u64,
    /// Number of VMs that the rule selects.
    pub selected: u64,
    /// Why the rule cannot be previewed, or only in part; a text for users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limitation: Option<String>,
    /// Number of VMs of which the history could not be read, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub unread: BTreeMap<String, u64>,
}

/// Computes from rollups when a rule would have fired. The rule is not stored.
#[derive(Debug)]
pub struct RulesPreview;

impl Method for RulesPreview {
    type Params = RuleSpec;
    type Reply = Preview;
    const INFO: MethodInfo = MethodInfo {
        class: Class::HeavyRead,
        ..query("alert.rules.preview")
    };
}
