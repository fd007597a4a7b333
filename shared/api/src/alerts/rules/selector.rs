//! The VMs that a rule applies to.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::{
    InstanceId, bounded_text,
    vms::{LabelFilter, MAX_HYPERVISOR},
};

/// Maximum number of ids that a selector lists.
const MAX_IDS: usize = 1000;
/// Maximum number of labels that a selector lists.
const MAX_LABEL_FILTERS: usize = 16;
/// Maximum length of a [`NamePattern`] in characters.
const MAX_PATTERN: usize = 128;

/// Selects VMs: those that fulfil all that is given. Without anything it selects all VMs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSelector {
    /// Only VMs with one of these ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "ids")]
    pub ids: Vec<InstanceId>,
    /// Only VMs with all of these labels; those of hypervisors begin with `hv/`.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "labels")]
    pub labels: Vec<LabelFilter>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "hypervisor"
    )]
    pub hypervisor: Option<String>,
    /// Only VMs whose name at the hypervisor matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<NamePattern>,
}

fn ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<InstanceId>, D::Error> {
    let ids = Vec::deserialize(deserializer)?;
    if ids.len() <= MAX_IDS {
        Ok(ids)
    } else {
        Err(D::Error::custom("must list at most 1000 VMs"))
    }
}

fn labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<LabelFilter>, D::Error> {
    let labels = Vec::deserialize(deserializer)?;
    if labels.len() <= MAX_LABEL_FILTERS {
        Ok(labels)
    } else {
        Err(D::Error::custom("must list at most 16 labels"))
    }
}

fn hypervisor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let rule = "must be a text of at most 128 characters";
    bounded_text(deserializer, rule, |text| text.chars().count() <= MAX_HYPERVISOR).map(Some)
}

impl VmSelector {
    /// Whether the selector contains the VM. `labels` are all labels of the VM, those of its hypervisor as `hv/key`;
    /// `hypervisors` are those that have it.
    pub fn contains(
        &self,
        instance_id: &InstanceId,
        name: Option<&str>,
        hypervisors: &[&str],
        labels: &BTreeMap<String, String>,
    ) -> bool {
        let has = |filter: &LabelFilter| {
            let value = labels.get(&filter.key);
            value.is_some_and(|value| filter.value.as_ref().is_none_or(|wanted| wanted == value))
        };
        (self.ids.is_empty() || self.ids.contains(instance_id))
            && self.labels.iter().all(has)
            && self
                .hypervisor
                .as_deref()
                .is_none_or(|wanted| hypervisors.contains(&wanted))
            && self
                .name
                .as_ref()
                .is_none_or(|pattern| name.is_some_and(|name| pattern.matches(name)))
    }
}

/// A pattern of names: a text of 1 to 128 characters, in which `*` stands for any text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(min_length = 1, max_length = 128)
)]
pub struct NamePattern(String);

impl NamePattern {
    const RULE: &str = "must be a text of 1 to 128 characters, in which * stands for any text";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the whole name matches.
    pub fn matches(&self, name: &str) -> bool {
        matches(&self.0, name)
    }
}

impl<'de> Deserialize<'de> for NamePattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let allows = |text: &str| (1..=MAX_PATTERN).contains(&text.chars().count());
        bounded_text(deserializer, Self::RULE, allows).map(Self)
    }
}

/// Whether the text matches a pattern in which `*` stands for any text. The time is bounded by the product of both lengths.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some((_, after)) = rest.split_once(part) else {
            return false;
        };
        rest = after;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn star_stands_for_any_text() {
        for (pattern, text) in [
            ("db-*", "db-"),
            ("db-*", "db-1"),
            ("*", ""),
            ("*-1", "db-1"),
            ("a*b*c", "axxbyybzc"),
            ("a*a", "aa"),
            ("**", "x"),
            ("x", "x"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("db-*", "db"),
            ("a*a", "a"),
            ("a*b", "abc"),
            ("x", "xy"),
            ("", "x"),
        ] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }

    #[test]
    fn selector_contains_vms_that_fulfil_all_conditions() {
        let id: InstanceId = "vm-1".parse().unwrap();
        let labels = BTreeMap::from([("env".to_owned(), "prod".to_owned())]);
        let contains = |selector: &str| {
            let selector: VmSelector = serde_json::from_str(selector).unwrap();
            selector.contains(&id, Some("db-1"), &["lab"], &labels)
        };
        for all in [
            "{}",
            r#"{"ids":["vm-1"]}"#,
            r#"{"labels":["env"]}"#,
            r#"{"labels":["env=prod"],"hypervisor":"lab","name":"db-*"}"#,
        ] {
            assert!(contains(all), "{all}");
        }
        for none in [
            r#"{"ids":["vm-2"]}"#,
            r#"{"labels":["env=test"]}"#,
            r#"{"labels":["env","team"]}"#,
            r#"{"hypervisor":"other"}"#,
            r#"{"name":"web-*"}"#,
        ] {
            assert!(!contains(none), "{none}");
        }
    }
}
