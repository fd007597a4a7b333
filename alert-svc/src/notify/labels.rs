//! The labels of alerts: for silences, for grouping, and for receivers.

use std::collections::BTreeMap;

use vmwatch_api::alerts::{Alert, channels::GroupKey};

/// The labels that silences match: those of the VM, and `rule`, `severity`, `instance_id`, `vm_name`, `hypervisor` and
/// `subject`, which take precedence over labels of the VM with the same name.
pub(super) fn all(alert: &Alert) -> BTreeMap<String, String> {
    let mut labels = alert.labels.clone();
    labels.insert("rule".to_owned(), alert.rule_name.to_string());
    labels.extend(own(alert));
    labels
}

/// The labels for receivers, which identify the alert there. As in Alertmanager, the name of the rule is `alertname`, names
/// consist of letters, digits and underscores, and empty labels are omitted. A label of the VM whose name is taken
/// gets the prefix `label_`.
pub(super) fn plain(alert: &Alert) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([
        ("alertname".to_owned(), alert.rule_name.to_string()),
        ("rule_id".to_owned(), alert.rule_id.to_string()),
    ]);
    labels.extend(own(alert));
    for (key, value) in &alert.labels {
        let mut name = plain_name(key);
        while labels.contains_key(&name) {
            name = format!("label_{name}");
        }
        labels.insert(name, value.clone());
    }
    labels.retain(|_, value| !value.is_empty());
    labels
}

/// The labels that an alert itself has.
fn own(alert: &Alert) -> impl Iterator<Item = (String, String)> {
    let instance_id = alert.instance_id.as_ref().map(ToString::to_string);
    [
        ("severity", Some(alert.severity.as_str().to_owned())),
        ("instance_id", instance_id),
        ("vm_name", alert.vm_name.clone()),
        ("hypervisor", alert.hypervisor.clone()),
        ("subject", Some(alert.subject.clone())),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
}

/// The name of a label, with an underscore instead of each character that receivers do not accept.
fn plain_name(key: &str) -> String {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let name: String = key
        .chars()
        .map(|letter| if is_plain(letter) { letter } else { '_' })
        .collect();
    if name.starts_with(|first: char| first.is_ascii_digit()) {
        format!("_{name}")
    } else {
        name
    }
}

/// The values of an alert by which a channel groups, by key.
pub(super) fn group(alert: &Alert, keys: &[GroupKey]) -> BTreeMap<String, String> {
    let value = |key: &GroupKey| match key {
        GroupKey::Vm => alert.instance_id.as_ref().map(ToString::to_string),
        GroupKey::Rule => Some(alert.rule_name.to_string()),
        GroupKey::Label(label) => alert.labels.get(label).cloned(),
    };
    keys.iter()
        .map(|key| (key.to_string(), value(key).unwrap_or_default()))
        .collect()
}

/// The values of a message's group, with the names of labels that receivers get.
pub(super) fn plain_group(group: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let name = |key: &str| match key {
        "vm" => "instance_id".to_owned(),
        "rule" => "alertname".to_owned(),
        other => plain_name(other.strip_prefix("label:").unwrap_or(other)),
    };
    group
        .iter()
        .map(|(key, value)| (name(key), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn alert() -> Alert {
        serde_json::from_value(json!({
            "id": "a".repeat(32), "rule_id": "b".repeat(32), "rule_name": "CPU high", "severity": "critical",
            "condition": { "kind": "agent_silent" }, "state": "firing", "since_ms": 1, "revision": 1,
            "instance_id": "vm-1", "vm_name": "db-1",
            "labels": { "env": "prod", "hv/os": "linux", "severity": "low", "rule": "own", "9.x": "y", "none": "" },
        }))
        .unwrap()
    }

    #[test]
    fn silences_match_labels_of_the_alert_before_those_of_the_vm() {
        let labels = all(&alert());
        assert_eq!(labels["severity"], "critical");
        assert_eq!(labels["rule"], "CPU high");
        assert_eq!(
            (labels["env"].as_str(), labels["hv/os"].as_str()),
            ("prod", "linux")
        );
    }

    #[test]
    fn receivers_get_names_that_they_accept() {
        let labels = plain(&alert());
        assert_eq!(
            serde_json::to_value(labels).unwrap(),
            json!({
                "_9_x": "y", "alertname": "CPU high", "env": "prod", "hv_os": "linux", "instance_id": "vm-1",
                "label_severity": "low", "rule": "own", "rule_id": "b".repeat(32), "severity": "critical",
                "vm_name": "db-1",
            })
        );
    }

    #[test]
    fn groups_by_vm_rule_and_label() {
        let keys = ["vm", "rule", "label:hv/os", "label:team"].map(|key| key.parse().unwrap());
        let group = group(&alert(), &keys);
        assert_eq!(
            serde_json::to_value(&group).unwrap(),
            json!({ "vm": "vm-1", "rule": "CPU high", "label:hv/os": "linux", "label:team": "" })
        );
        let names: Vec<_> = plain_group(&group).into_keys().collect();
        assert_eq!(names, ["alertname", "hv_os", "instance_id", "team"]);
        assert!(super::group(&alert(), &[]).is_empty());
    }
}
