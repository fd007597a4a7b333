//! The state machine of conditions: decides from readings when alerts begin, fire and end. It does no I/O.
//!
//! ```text
//! none ── holds ──> pending ── for the duration ──> firing ── holds no longer ──> none, resolved
//!   └── duration 0 ──────────────────────────────────┘ │
//!                     └── holds no longer ──> none, withdrawn
//! ```
//!
//! Only conditions that hold are kept in memory. A reading that is older than the newest one of its condition changes
//! nothing, so records may be evaluated again.

mod table;
mod transition;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use metrics::counter;
use tracing::warn;
use vmwatch_api::{
    InstanceId,
    alerts::{
        Alert, AlertState, RecordId,
        rules::{Condition, Rule, RuleSpec, VmSelector},
    },
};

pub(super) use self::transition::{ConditionKey, Found, Reading, Step, Transition};
use crate::definitions::Definitions;

/// Maximum number of conditions that hold at the same time.
const MAX_OPEN: usize = 100_000;
/// A pending condition begins again if it was not read for this time, for the duration of its rule, and for
/// [`USUAL_GAPS`] times the gap before: it may have ended meanwhile, for example because the VM was off.
const MAX_GAP_MS: u64 = 600_000;
const USUAL_GAPS: u64 = 3;
/// Interval at which the value of a firing alert is renewed.
const REFRESH_MS: u64 = 60_000;

/// A condition that holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Open {
    pub(super) rule: RecordId,
    pub(super) subject: String,
    pub(super) since_ms: u64,
    pub(super) is_firing: bool,
    /// Time of the newest reading, and time between the two newest ones.
    pub(super) seen_ms: u64,
    gap_ms: u64,
    value: Option<f64>,
    refreshed_ms: u64,
}

/// The rules and all conditions that hold.
#[derive(Debug, Default)]
pub(super) struct Machine {
    rules: Vec<Arc<Rule>>,
    /// Rules that this version cannot decode. Their alerts stay as they are.
    unreadable: HashSet<RecordId>,
    has_selectors: bool,
    /// By VM; `None` for conditions of the deployment.
    open: HashMap<Option<InstanceId>, Vec<Open>>,
    count: usize,
    is_full: bool,
}

/// Whether this change of a rule resolves its alerts, so that its condition is evaluated from the beginning.
fn differs(old: &RuleSpec, new: &RuleSpec) -> bool {
    (&old.condition, old.for_seconds, &old.vms) != (&new.condition, new.for_seconds, &new.vms)
}

impl Machine {
    /// The rules that are evaluated.
    pub(super) fn rules(&self) -> &[Arc<Rule>] {
        &self.rules
    }

    pub(super) fn rule(&self, id: &RecordId) -> Option<&Arc<Rule>> {
        self.rules.iter().find(|rule| rule.id == *id)
    }

    /// Whether a rule applies to some VMs only.
    pub(super) const fn has_selectors(&self) -> bool {
        self.has_selectors
    }

    /// Number of conditions that hold.
    pub(super) const fn len(&self) -> usize {
        self.count
    }

    /// Replaces the rules. Alerts of rules that were removed, disabled, or changed in what they mean, end.
    pub(super) fn set_rules(&mut self, definitions: &Definitions, now_ms: u64, out: &mut Vec<Transition>) {
        let enabled = definitions.rules.iter().filter(|rule| rule.spec.enabled);
        let new: HashMap<RecordId, Arc<Rule>> = enabled
            .map(|rule| (rule.id.clone(), Arc::new(rule.clone())))
            .collect();
        let unreadable: HashSet<RecordId> = definitions
            .unreadable
            .iter()
            .map(|rule| rule.id.clone())
            .collect();
        let old = std::mem::take(&mut self.rules);
        let ended = |id: &RecordId| match new.get(id) {
            None => !unreadable.contains(id),
            Some(rule) => {
                let before = old.iter().find(|old| old.id == *id);
                before.is_some_and(|old| differs(&old.spec, &rule.spec))
            }
        };
        self.end(now_ms, out, |_, open| ended(&open.rule));
        self.rules = new.into_values().collect();
        let all = VmSelector::default();
        self.has_selectors = self.rules.iter().any(|rule| rule.spec.vms != all);
        self.rules.sort_by(|one, other| one.id.cmp(&other.id));
        self.unreadable = unreadable;
    }

    /// Whether the condition of an alert is known to hold.
    pub(super) fn has(&self, alert: &Alert) -> bool {
        self.find(alert.instance_id.as_ref(), &alert.rule_id, &alert.subject)
            .is_some()
    }

    /// Continues with an alert that is stored as open. It ends if its rule no longer exists or means something else.
    pub(super) fn restore(&mut self, alert: &Alert, now_ms: u64, out: &mut Vec<Transition>) {
        let vm = alert.instance_id.as_ref();
        if self.has(alert) {
            return;
        }
        let id = alert.rule_id.clone();
        let is_current = self.unreadable.contains(&id)
            || self
                .rule(&id)
                .is_some_and(|rule| rule.spec.condition == alert.condition);
        let seen_ms = alert.fired_ms.unwrap_or_default().max(alert.since_ms);
        self.insert(
            vm,
            Open {
                rule: id.clone(),
                subject: alert.subject.clone(),
                since_ms: alert.since_ms,
                is_firing: alert.state != AlertState::Pending,
                seen_ms,
                gap_ms: 0,
                value: alert.value,
                refreshed_ms: seen_ms,
            },
        );
        if !is_current {
            self.end(now_ms, out, |of, open| {
                of == vm && open.rule == id && open.subject == alert.subject
            });
        }
    }

    /// Forgets a condition whose alert is not open in the database. If the condition still holds, it begins again.
    pub(super) fn forget(&mut self, key: &ConditionKey) {
        if let Some(index) = self.find(key.vm.as_ref(), &key.rule, &key.subject) {
            self.remove(key.vm.as_ref(), index);
        }
    }

    /// Evaluates a reading of a condition.
    pub(super) fn observe(
        &mut self,
        rule: &Rule,
        vm: Option<&InstanceId>,
        subject: &str,
        reading: Reading,
        out: &mut Vec<Transition>,
    ) {
        let index = self.find(vm, &rule.id, subject);
        let holds = match (reading.found, rule.spec.condition.threshold()) {
            (Found::Holds(holds), _) => holds,
            (Found::Value(value), Some(threshold)) => threshold.holds(value, index.is_some()),
            (Found::Value(_), None) => return,
        };
        let for_ms = u64::from(rule.spec.for_seconds) * 1000;
        let Some(index) = index else {
            if holds {
                self.begin(rule, vm, subject, reading, 0, out);
            }
            return;
        };
        let transition = |open: &Open, step, value| Transition {
            key: ConditionKey {
                rule: rule.id.clone(),
                vm: vm.cloned(),
                subject: subject.to_owned(),
            },
            step,
            at_ms: reading.at_ms,
            since_ms: open.since_ms,
            value,
        };
        let Some(open) = self.open.get_mut(&vm.cloned()).and_then(|all| all.get_mut(index)) else {
            return;
        };
        if reading.at_ms < open.seen_ms {
            counter!("vmwatch_alert_readings_ignored_total").increment(1);
            return;
        }
        let gap_ms = reading.at_ms - open.seen_ms;
        let held_ms = open.seen_ms;
        let value = match reading.found {
            Found::Value(value) => Some(value),
            Found::Holds(_) => open.value,
        };
        if !holds {
            let step = if open.is_firing {
                Step::Resolve {
                    held_ms: Some(held_ms),
                }
            } else {
                Step::Withdraw
            };
            out.push(transition(open, step, value));
            self.remove(vm, index);
            return;
        }
        let longest_ms = MAX_GAP_MS.max(for_ms).max(open.gap_ms * USUAL_GAPS);
        if !open.is_firing && reading.since_ms.is_none() && gap_ms > longest_ms {
            out.push(transition(open, Step::Withdraw, open.value));
            self.remove(vm, index);
            self.begin(rule, vm, subject, reading, gap_ms, out);
            return;
        }
        if gap_ms > 0 {
            (open.seen_ms, open.gap_ms) = (reading.at_ms, gap_ms);
        }
        let changed = open.value != value;
        open.value = value;
        if !open.is_firing && reading.at_ms.saturating_sub(open.since_ms) >= for_ms {
            open.is_firing = true;
            open.refreshed_ms = reading.at_ms;
            out.push(transition(open, Step::Fire, value));
        } else if open.is_firing && changed && reading.at_ms - open.refreshed_ms >= REFRESH_MS {
            open.refreshed_ms = reading.at_ms;
            out.push(transition(open, Step::Refresh, value));
        }
    }

    fn begin(
        &mut self,
        rule: &Rule,
        vm: Option<&InstanceId>,
        subject: &str,
        reading: Reading,
        gap_ms: u64,
        out: &mut Vec<Transition>,
    ) {
        if self.count >= MAX_OPEN {
            counter!("vmwatch_alerts_omitted_total").increment(1);
            if !std::mem::replace(&mut self.is_full, true) {
                warn!(
                    maximum = MAX_OPEN,
                    "too many conditions hold at once; further alerts are omitted"
                );
            }
            return;
        }
        let since_ms = reading.since_ms.unwrap_or(reading.at_ms).min(reading.at_ms);
        let fires = reading.at_ms - since_ms >= u64::from(rule.spec.for_seconds) * 1000;
        let value = match reading.found {
            Found::Value(value) => Some(value),
            Found::Holds(_) => None,
        };
        out.push(Transition {
            key: ConditionKey {
                rule: rule.id.clone(),
                vm: vm.cloned(),
                subject: subject.to_owned(),
            },
            step: Step::Begin { fires },
            at_ms: reading.at_ms,
            since_ms,
            value,
        });
        self.insert(
            vm,
            Open {
                rule: rule.id.clone(),
                subject: subject.to_owned(),
                since_ms,
                is_firing: fires,
                seen_ms: reading.at_ms,
                gap_ms,
                value,
                refreshed_ms: reading.at_ms,
            },
        );
    }
}

/// Whether samples decide the condition.
pub(super) const fn is_of_samples(condition: &Condition) -> bool {
    matches!(
        condition,
        Condition::Measure { .. }
            | Condition::Filesystem { .. }
            | Condition::ProcessCount { .. }
            | Condition::ProcessCpu { .. }
            | Condition::ProcessMem { .. }
    )
}
