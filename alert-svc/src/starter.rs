//! Starter rules: created at the first start, so that a new deployment has alerts. A starter rule that was changed or
//! removed stays so, because its id is always the same and a removed one leaves a record.

use vmwatch_api::{
    alerts::{
        RecordId, Severity,
        rules::{Condition, Direction, MeasureName, RuleSpec, Threshold, VmSelector},
    },
    lifecycle::MachineState,
    time::unix_millis,
};

use crate::{
    AlertError,
    store::{Store, StoredRule, is_duplicate, signed},
};

const MINUTE: u32 = 60;

/// The starter rules with their ids.
fn rules() -> Vec<(RecordId, RuleSpec)> {
    let listed = [
        silent_agent(),
        measure("cpu", "CPU above 95 %", "cpu_util", 90.0, 15 * MINUTE),
        measure("memory", "Memory above 95 %", "mem", 93.0, 10 * MINUTE),
        filesystem("filesystem-90", "Filesystem above 90 %", 90.0, Severity::Warning),
        filesystem("filesystem-97", "Filesystem above 97 %", 97.0, Severity::Critical),
        (
            "operation-failed",
            "Operation failed",
            Some(Condition::OperationFailed {}),
            0,
            Severity::Warning,
        ),
        (
            "keep-on",
            "VM that must stay on is off",
            Some(Condition::VmState {
                states: vec![MachineState::ShutOff, MachineState::Crashed],
            }),
            MINUTE,
            Severity::Critical,
        ),
        (
            "not-receiving",
            "vmwatch is not receiving samples",
            Some(Condition::NotReceiving {}),
            0,
            Severity::Critical,
        ),
    ];
    let specs = listed.into_iter().filter_map(|starter| {
        let (key, name, condition, for_seconds, severity) = starter;
        let labels = if key == "keep-on" {
            vec!["keep=on"]
        } else {
            Vec::new()
        };
        let spec = RuleSpec {
            name: name.parse().ok()?,
            enabled: true,
            condition: condition?,
            for_seconds,
            severity,
            vms: VmSelector {
                labels: labels
                    .into_iter()
                    .filter_map(|label| label.parse().ok())
                    .collect(),
                ..VmSelector::default()
            },
            recipients: Vec::new(),
        };
        Some((id(key), spec))
    });
    specs.collect()
}

/// Key, name, condition, duration in seconds and severity of a starter rule.
type Starter = (&'static str, &'static str, Option<Condition>, u32, Severity);

const fn silent_agent() -> Starter {
    (
        "agent-silent",
        "Agent is silent",
        Some(Condition::AgentSilent {}),
        5 * MINUTE,
        Severity::Critical,
    )
}

fn measure(key: &'static str, name: &'static str, measure: &str, clear: f64, for_seconds: u32) -> Starter {
    let condition = MeasureName::new(measure)
        .zip(Threshold::new(Direction::Above, 95.0, Some(clear)))
        .map(|(measure, threshold)| Condition::Measure { measure, threshold });
    (key, name, condition, for_seconds, Severity::Warning)
}

fn filesystem(key: &'static str, name: &'static str, limit: f64, severity: Severity) -> Starter {
    let threshold = Threshold::new(Direction::Above, limit, Some(limit - 2.0));
    let condition = threshold.map(|threshold| Condition::Filesystem {
        mount_point: None,
        threshold,
    });
    (key, name, condition, MINUTE, severity)
}

fn id(key: &str) -> RecordId {
    RecordId::from_parts(&["starter rule", key])
}

/// Whether this is the id of a starter rule.
pub(crate) fn contains(rule: &RecordId) -> bool {
    rules().iter().any(|(id, _)| id == rule)
}

/// Creates the starter rules that were never created. Two replicas that do this at the same time create each rule once.
pub(crate) async fn create(store: &Store) -> Result<(), AlertError> {
    let now_ms = signed(unix_millis());
    for (id, spec) in rules() {
        let rule = StoredRule {
            id: id.to_string(),
            revision: 1,
            spec,
            changed_by: String::new(),
            changed_ms: now_ms,
            removed: false,
            problem: None,
        };
        match store.rules.insert_one(&rule).await {
            Ok(_) => {}
            Err(error) if is_duplicate(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A changed id would create a starter rule again that an operator has removed.
    #[test]
    fn ids_of_starter_rules_never_change() {
        let rules = rules();
        let ids: BTreeSet<_> = rules.iter().map(|(id, _)| id.clone()).collect();
        assert_eq!(ids.len(), 8, "each rule is valid and has its own id");
        assert_eq!(
            RecordId::from_parts(&["starter rule", "agent-silent"]),
            rules.first().unwrap().0
        );
        assert!(contains(&id("keep-on")) && !contains(&id("x")));
        let keep_on = rules.iter().find(|(rule, _)| *rule == id("keep-on")).unwrap();
        assert_eq!(keep_on.1.vms.labels.len(), 1);
        assert!(
            rules
                .iter()
                .all(|(_, spec)| spec.enabled && spec.recipients.is_empty())
        );
    }
}
