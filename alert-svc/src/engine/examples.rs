//! Values for the tests of the engine.

use vmwatch_api::{
    alerts::{
        Alert,
        evaluation::{EvaluationRecord, Source},
        rules::Rule,
    },
    lifecycle::{Operation, OperationState, Verb},
    measures::VmValues,
};

use super::{handover::new_alert, machine::ConditionKey};
use crate::known_vms::VmFacts;

/// A rule with this condition and duration. Its id depends on the condition.
pub(super) fn rule(condition: &str, for_seconds: u32) -> Rule {
    let id = vmwatch_api::alerts::RecordId::from_parts(&[condition]);
    let rule = format!(
        r#"{{"id":"{id}","revision":1,"spec":{{"name":"rule","enabled":true,"condition":{condition},"for_seconds":{for_seconds},"severity":"warning"}},"changed_by":"","changed_ms":0}}"#
    );
    serde_json::from_str(&rule).unwrap()
}

/// An alert of the rule that fired at `fired_ms`.
pub(super) fn alert(rule: &Rule, vm: Option<&str>, subject: &str, fired_ms: u64) -> Alert {
    let key = ConditionKey {
        rule: rule.id.clone(),
        vm: vm.map(|vm| vm.parse().unwrap()),
        subject: subject.to_owned(),
    };
    new_alert(rule, &key, VmFacts::default(), fired_ms, Some(fired_ms), None)
}

/// An operation that was requested and ended at `ended_ms`.
pub(super) fn operation(vm: &str, verb: Verb, state: OperationState, ended_ms: u64) -> Operation {
    let machine = match (verb, state) {
        (Verb::Stop | Verb::ForceStop, OperationState::Succeeded) => "\"shut_off\"",
        (_, OperationState::Succeeded) => "\"running\"",
        _ => "null",
    };
    let operation = format!(
        r#"{{"id":"{ended_ms:032x}","verb":"{verb}","instance_id":"{vm}","user":"ann","request_id":"1","requested_at_ms":{ended_ms},"deadline_ms":{ended_ms},"finished_at_ms":{ended_ms},"state":"{state}","machine":{machine},"history":[]}}"#
    );
    serde_json::from_str(&operation).unwrap()
}

/// A record of a sample that arrived at once.
pub(super) fn record(vm: &str, at_ms: u64) -> EvaluationRecord {
    EvaluationRecord {
        instance_id: vm.parse().unwrap(),
        source: Source::Agent,
        at_ms,
        arrived_ms: at_ms,
        part: 0,
        vm: None,
        filesystems: Vec::new(),
        has_processes: false,
        processes: Vec::new(),
        watched_revision: 0,
    }
}

/// A record of a sample with this CPU usage.
pub(super) fn cpu(vm: &str, at_ms: u64, cpu_util: f64) -> EvaluationRecord {
    EvaluationRecord {
        vm: Some(VmValues {
            cpu_util: Some(cpu_util),
            ..VmValues::default()
        }),
        ..record(vm, at_ms)
    }
}
