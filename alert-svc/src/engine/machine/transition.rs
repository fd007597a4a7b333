//! What the state machine of conditions reads, and the changes of alerts that it decides on.

use vmwatch_api::{InstanceId, alerts::RecordId};

/// What identifies a condition: the rule, the VM, and what of the VM it is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct ConditionKey {
    pub(crate) rule: RecordId,
    /// `None` if the condition is about the deployment.
    pub(crate) vm: Option<InstanceId>,
    pub(crate) subject: String,
}

/// What a condition was found to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::engine) enum Found {
    /// A value, to be compared with the threshold of the rule.
    Value(f64),
    /// Whether the condition holds.
    Holds(bool),
}

/// A condition at a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::engine) struct Reading {
    pub(in crate::engine) found: Found,
    pub(in crate::engine) at_ms: u64,
    /// Since when the condition holds, if that is known to be before this reading.
    pub(in crate::engine) since_ms: Option<u64>,
}

impl Reading {
    pub(in crate::engine) const fn value(value: f64, at_ms: u64) -> Self {
        Self {
            found: Found::Value(value),
            at_ms,
            since_ms: None,
        }
    }

    pub(in crate::engine) const fn holds(holds: bool, since_ms: u64, at_ms: u64) -> Self {
        Self {
            found: Found::Holds(holds),
            at_ms,
            since_ms: Some(since_ms),
        }
    }
}

/// A change of an alert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Step {
    /// The condition began to hold. The alert fires at once if the duration has passed.
    Begin { fires: bool },
    /// The duration has passed.
    Fire,
    /// The value of a firing alert changed.
    Refresh,
    /// The condition of a firing alert ended. `held_ms` is when it was last known to hold; `None` if it only is no
    /// longer evaluated, because the rule changed.
    Resolve { held_ms: Option<u64> },
    /// The condition ended before the alert fired.
    Withdraw,
}

/// A change of the alert of a condition.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Transition {
    pub(crate) key: ConditionKey,
    pub(crate) step: Step,
    pub(crate) at_ms: u64,
    pub(crate) since_ms: u64,
    pub(crate) value: Option<f64>,
}
