//! The filters and changes with which the writer changes alerts in the database, and the order of changes.

use std::collections::BTreeMap;

use mongodb::bson::{Bson, Document, doc, serialize_to_bson};
use vmwatch_api::alerts::AlertState;

use super::Write;
use crate::{AlertError, engine::machine::ConditionKey, known_vms::VmFacts, store::signed};

/// The changes of a firing alert.
pub(super) fn fire(at_ms: u64, value: Option<f64>, facts: &VmFacts) -> Result<Document, AlertError> {
    let labels = serialize_to_bson(&facts.labels).map_err(mongodb::error::Error::from)?;
    let mut set = doc! {
        "alert.state": AlertState::Firing.as_str(),
        "alert.fired_ms": signed(at_ms),
        "alert.labels": labels,
        "unnotified": true,
    };
    if let Some(value) = value {
        set.insert("alert.value", value);
    }
    if let Some(name) = &facts.name {
        set.insert("alert.vm_name", name);
    }
    if let Some(hypervisor) = facts.hypervisors.first() {
        set.insert("alert.hypervisor", hypervisor.as_ref());
    }
    Ok(set)
}

/// Groups changes by condition, in their order.
pub(super) fn by_condition(writes: Vec<Write>) -> Vec<Vec<Write>> {
    let mut groups: BTreeMap<(String, String, String), Vec<Write>> = BTreeMap::new();
    for write in writes {
        let vm = write.key.vm.as_ref().map_or("", |vm| vm.as_str());
        let key = (
            vm.to_owned(),
            write.key.rule.to_string(),
            write.key.subject.clone(),
        );
        groups.entry(key).or_default().push(write);
    }
    groups.into_values().collect()
}

/// The filter for all alerts of a condition.
pub(super) fn condition(key: &ConditionKey) -> Document {
    let vm = key.vm.as_ref().map_or(Bson::Null, |vm| vm.as_str().into());
    doc! {
        "alert.instance_id": vm,
        "alert.rule_id": key.rule.as_str(),
        "alert.subject": &key.subject,
    }
}

/// The filter for the open alert of a condition.
pub(super) fn open(key: &ConditionKey) -> Document {
    let mut filter = doc! { "open": true };
    filter.extend(condition(key));
    filter
}

/// The filter for the open alert of a condition, if it has one of these states.
pub(super) fn with_state(key: &ConditionKey, states: &[AlertState]) -> Document {
    let states: Vec<&str> = states.iter().map(|state| state.as_str()).collect();
    let mut filter = open(key);
    filter.insert("alert.state", doc! { "$in": states });
    filter
}
