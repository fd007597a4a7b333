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

use crate::definitions::Definitions;

/// Maximum number of conditions that hold at the same time.
const MAX_OPEN: usize = 100_000;
/// A pending condition begins again if it was not read for this time, for the duration of its rule, and for
/// [`USUAL_GAPS`] times the gap before: it may have ended meanwhile, for example because the VM was off.
const MAX_GAP_MS: u64 = 600_000;
const USUAL_GAPS: u64 = 3;
/// A condition that is no longer read for this time has ended, if its VM still sends samples.
const UNREAD_MS: u64 = 900_000;
/// Interval at which the value of a firing alert is renewed.
const REFRESH_MS: u64 = 60_000;

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
pub(super) enum Found {
    /// A value, to be compared with the threshold of the rule.
    Value(f64),
    /// Whether the condition holds.
    Holds(bool),
}

/// A condition at a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reading {
    pub(super) found: Found,
    pub(super) at_ms: u64,
    /// Since when the condition holds, if that is known to be before this reading.
    pub(super) since_ms: Option<u64>,
}

impl Reading {
    pub(super) const fn value(value: f64, at_ms: u64) -> Self {
        Self {
            found: Found::Value(value),
            at_ms,
            since_ms: None,
        }
    }

    pub(super) const fn holds(holds: bool, since_ms: u64, at_ms: u64) -> Self {
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

    /// The conditions of a VM that hold.
    pub(super) fn open(&self, vm: Option<&InstanceId>) -> &[Open] {
        // The key is cloned only if alerts exist at all.
        if self.open.is_empty() {
            return &[];
        }
        self.open.get(&vm.cloned()).map_or(&[], Vec::as_slice)
    }

    /// The VMs that have conditions that hold.
    pub(super) fn vms(&self) -> impl Iterator<Item = &InstanceId> {
        self.open.keys().flatten()
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

    /// Ends the conditions of a VM that its samples no longer contain, such as that of a filesystem that was unmounted.
    /// `reads` selects the conditions that the sample at `at_ms` could have contained.
    pub(super) fn end_unread(
        &mut self,
        vm: &InstanceId,
        at_ms: u64,
        reads: impl Fn(&Condition) -> bool,
        out: &mut Vec<Transition>,
    ) {
        if self.open(Some(vm)).is_empty() {
            return;
        }
        let rules = self.rules.iter().filter(|rule| reads(&rule.spec.condition));
        let rules: HashSet<RecordId> = rules.map(|rule| rule.id.clone()).collect();
        self.end_of_vm(vm, at_ms, out, |open| {
            rules.contains(&open.rule) && at_ms.saturating_sub(open.seen_ms) > UNREAD_MS
        });
    }

    /// Ends the conditions of a VM that `ends` selects.
    pub(super) fn end_of_vm(
        &mut self,
        vm: &InstanceId,
        at_ms: u64,
        out: &mut Vec<Transition>,
        ends: impl Fn(&Open) -> bool,
    ) {
        let key = Some(vm.clone());
        if let Some(all) = self.open.get_mut(&key) {
            end_some(key.as_ref(), all, at_ms, out, &mut self.count, false, ends);
            if all.is_empty() {
                self.open.remove(&key);
            }
        }
    }

    /// Ends all conditions that `ends` selects, because they are no longer evaluated.
    pub(super) fn end(
        &mut self,
        at_ms: u64,
        out: &mut Vec<Transition>,
        ends: impl Fn(Option<&InstanceId>, &Open) -> bool,
    ) {
        for (vm, all) in &mut self.open {
            end_some(vm.as_ref(), all, at_ms, out, &mut self.count, true, |open| {
                ends(vm.as_ref(), open)
            });
        }
        self.open.retain(|_, all| !all.is_empty());
    }

    fn find(&self, vm: Option<&InstanceId>, rule: &RecordId, subject: &str) -> Option<usize> {
        let mut all = self.open(vm).iter();
        all.position(|open| open.rule == *rule && open.subject == subject)
    }

    fn insert(&mut self, vm: Option<&InstanceId>, open: Open) {
        self.open.entry(vm.cloned()).or_default().push(open);
        self.count += 1;
    }

    fn remove(&mut self, vm: Option<&InstanceId>, index: usize) {
        let key = vm.cloned();
        if let Some(all) = self.open.get_mut(&key) {
            all.swap_remove(index);
            self.count -= 1;
            if all.is_empty() {
                self.open.remove(&key);
            }
        }
        self.is_full = self.count >= MAX_OPEN;
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

fn end_some(
    vm: Option<&InstanceId>,
    all: &mut Vec<Open>,
    at_ms: u64,
    out: &mut Vec<Transition>,
    count: &mut usize,
    is_of_rule: bool,
    ends: impl Fn(&Open) -> bool,
) {
    all.retain(|open| {
        if !ends(open) {
            return true;
        }
        let step = if open.is_firing {
            Step::Resolve {
                held_ms: (!is_of_rule).then_some(open.seen_ms),
            }
        } else {
            Step::Withdraw
        };
        out.push(Transition {
            key: ConditionKey {
                rule: open.rule.clone(),
                vm: vm.cloned(),
                subject: open.subject.clone(),
            },
            step,
            at_ms: at_ms.max(open.since_ms),
            since_ms: open.since_ms,
            value: open.value,
        });
        *count -= 1;
        false
    });
}
