//! Labels of VMs: texts by which users find and group VMs. Labels never grant access: a scope names ids.
//!
//! A VM has two kinds of labels. Those of its hypervisor are part of the inventory and read-only; they are shown as
//! `hv/key=value`. Those that operators set are in a KV bucket, one key per VM; lifecycle-svc owns the bucket, other
//! services follow it.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, btree_map},
    fmt,
    str::FromStr,
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, MapAccess, Visitor},
};

use super::{
    Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service, bounded_text, lifecycle::Target,
};

/// Name of the KV bucket of the labels that operators set. Its keys are ids of VMs, its values [`VmLabels`].
pub const LABELS_BUCKET: &str = "vmwatch_labels";
/// Maximum number of labels of a VM that operators set, and of those that its hypervisor has.
pub const MAX_LABELS: usize = 32;
/// Maximum length of a label's key in bytes.
pub const MAX_LABEL_KEY: usize = 63;
/// Maximum length of a label's value in bytes.
pub const MAX_LABEL_VALUE: usize = 255;
/// Begins the key of a hypervisor's label where it is shown. No label that an operator sets begins so.
pub const HYPERVISOR_LABEL: &str = "hv/";

/// The labels of a VM that operators set: the value of a key of the KV bucket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmLabels {
    #[serde(default)]
    pub labels: Labels,
}

/// At most [`MAX_LABELS`] labels that operators set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Labels(BTreeMap<LabelKey, LabelValue>);

impl Labels {
    pub fn get(&self, key: &str) -> Option<&LabelValue> {
        self.0.get(key)
    }

    /// The labels, sorted by key.
    pub fn iter(&self) -> btree_map::Iter<'_, LabelKey, LabelValue> {
        self.0.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// The texts are not valid [`Labels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLabels {
    #[error(transparent)]
    Key(#[from] InvalidLabelKey),
    #[error(transparent)]
    Value(#[from] InvalidLabelValue),
    #[error("a VM has at most {MAX_LABELS} labels")]
    TooMany,
}

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = InvalidLabels;

    fn try_from(texts: BTreeMap<String, String>) -> Result<Self, InvalidLabels> {
        if texts.len() > MAX_LABELS {
            return Err(InvalidLabels::TooMany);
        }
        let parse = |(key, value): (String, String)| Ok((key.parse()?, value.parse()?));
        texts.into_iter().map(parse).collect::<Result<_, _>>().map(Self)
    }
}

impl<'a> IntoIterator for &'a Labels {
    type Item = (&'a LabelKey, &'a LabelValue);
    type IntoIter = btree_map::Iter<'a, LabelKey, LabelValue>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(LabelsVisitor)
    }
}

#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for Labels {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        use utoipa::openapi::{ObjectBuilder, Type};
        let description = "At most 32 labels by key. A key is 1 to 63 characters of `0-9A-Za-z._/-`, begins with a \
                           letter or digit, and does not begin with `hv/`. A value is a text of at most 255 bytes \
                           without control characters.";
        let value = ObjectBuilder::new()
            .schema_type(Type::String)
            .max_length(Some(MAX_LABEL_VALUE))
            .pattern(Some(r"^[^\u0000-\u001f\u007f-\u009f]*$"));
        ObjectBuilder::new()
            .schema_type(Type::Object)
            .description(Some(description))
            .property_names(Some(
                ObjectBuilder::new()
                    .schema_type(Type::String)
                    .pattern(Some("^(?!hv/)[0-9A-Za-z][0-9A-Za-z._/-]{0,62}$")),
            ))
            .additional_properties(Some(value))
            .max_properties(Some(MAX_LABELS))
            .examples([serde_json::json!({ "team": "storage" })])
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for Labels {}

/// Decodes labels one after another, and stops at the first one too many.
struct LabelsVisitor;

impl<'de> Visitor<'de> for LabelsVisitor {
    type Value = Labels;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of label keys and values")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Labels, A::Error> {
        let mut labels = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<LabelKey, LabelValue>()? {
            labels.insert(key, value);
            if labels.len() > MAX_LABELS {
                return Err(A::Error::custom(InvalidLabels::TooMany));
            }
        }
        Ok(Labels(labels))
    }
}

/// The key of a label that operators set: 1 to 63 characters of `[0-9A-Za-z._/-]` that begin with a letter or digit and
/// not with `hv/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct LabelKey(String);

/// The text is not a valid [`LabelKey`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", LabelKey::RULE)]
pub struct InvalidLabelKey;

impl LabelKey {
    const RULE: &str = "a label key must be 1 to 63 characters of 0-9, A-Z, a-z, ., _, / and -, begin with a letter or digit, and not begin with hv/, which marks the labels of hypervisors";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        text.len() <= MAX_LABEL_KEY
            && text.starts_with(|first: char| first.is_ascii_alphanumeric())
            && !text.starts_with(HYPERVISOR_LABEL)
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte))
    }
}

impl FromStr for LabelKey {
    type Err = InvalidLabelKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidLabelKey)
        }
    }
}

impl Borrow<str> for LabelKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for LabelKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl fmt::Display for LabelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The value of a label that operators set: at most 255 bytes without control characters. It may be empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct LabelValue(String);

/// The text is not a valid [`LabelValue`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", LabelValue::RULE)]
pub struct InvalidLabelValue;

impl LabelValue {
    const RULE: &str = "a label value must be a text of at most 255 bytes without control characters";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        text.len() <= MAX_LABEL_VALUE && !text.contains(char::is_control)
    }
}

impl FromStr for LabelValue {
    type Err = InvalidLabelValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidLabelValue)
        }
    }
}

impl<'de> Deserialize<'de> for LabelValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl fmt::Display for LabelValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// All labels of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelsReply {
    /// The labels that operators set.
    pub labels: Labels,
    /// The labels that the hypervisor has for the VM.
    #[serde(default)]
    pub hypervisor: BTreeMap<String, String>,
    /// The number of the last change of `labels`, which the next change must name.
    pub revision: u64,
    /// Whether a hypervisor has the VM.
    pub listed: bool,
}

/// Reads the labels of a VM.
#[derive(Debug)]
pub struct LabelsGet;

impl Method for LabelsGet {
    type Params = Target;
    type Reply = LabelsReply;
    const INFO: MethodInfo = MethodInfo {
        service: Service::Lifecycle,
        subject: "lifecycle.labels.get",
        access: Access::Role(Role::Viewer),
        kind: Kind::Query,
        class: Class::CheapRead,
    };

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelsChange {
    pub instance_id: InstanceId,
    /// All labels that the VM has after the change.
    pub labels: Labels,
    /// The revision that the change is based on. If the labels have another one, they are not changed.
    pub revision: u64,
}

/// Replaces the labels that operators set. Of two changes that are based on the same revision one fails with a
/// conflict.
#[derive(Debug)]
pub struct LabelsSet;

impl Method for LabelsSet {
    type Params = LabelsChange;
    type Reply = LabelsReply;
    const INFO: MethodInfo = MethodInfo {
        service: Service::Lifecycle,
        subject: "lifecycle.labels.set",
        access: Access::Role(Role::Operator),
        kind: Kind::Command,
        class: Class::Command,
    };

    fn instance(params: &LabelsChange) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Whether a hypervisor's label is within the limits, so that it is shown: a key without `=` and control characters,
/// and a value without control characters.
pub fn is_hypervisor_label(key: &str, value: &str) -> bool {
    (1..=MAX_LABEL_KEY).contains(&key.len())
        && !key.contains(|char: char| char == '=' || char.is_control())
        && LabelValue::allows(value)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: Value) -> Result<Labels, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    fn numbered(count: usize) -> Value {
        (0..count)
            .map(|number| (format!("key-{number}"), json!("x")))
            .collect()
    }

    #[test]
    fn labels_within_the_limits_are_decoded_and_sorted() {
        let (key, value) = ("k".repeat(63), "ü".repeat(127));
        let labels = read(json!({ "team/owner": "", &key: &value, "0.a_b-c": "a=b" })).unwrap();
        let keys: Vec<_> = labels.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["0.a_b-c", key.as_str(), "team/owner"]);
        assert_eq!(labels.get("0.a_b-c").unwrap().as_str(), "a=b");
        assert_eq!(read(numbered(32)).unwrap().len(), 32);
    }

    #[test]
    fn labels_beyond_the_limits_are_rejected_and_not_quoted_in_the_error() {
        assert_eq!(read(numbered(33)).unwrap_err(), "a VM has at most 32 labels");
        assert_eq!(read(numbered(10_000)).unwrap_err(), "a VM has at most 32 labels");
        let long = "k".repeat(64);
        for key in [
            "", "hv/os", "a=b", "a b", "-a", "/a", ".a", "é", "a\n", "a,b", &long,
        ] {
            assert_eq!(read(json!({ key: "x" })).unwrap_err(), LabelKey::RULE, "{key:?}");
        }
        for value in [
            json!("v".repeat(256)),
            json!("a\nb"),
            json!("\u{85}"),
            json!(1),
            json!(null),
            json!({ "$gt": "" }),
        ] {
            assert_eq!(
                read(json!({ "a": value })).unwrap_err(),
                LabelValue::RULE,
                "{value}"
            );
        }
        assert!(read(json!([])).is_err() && read(json!("a=b")).is_err());
    }

    #[test]
    fn hypervisor_label_needs_a_short_key_without_equals_sign() {
        let long = "é".repeat(32);
        assert!(is_hypervisor_label("Owner:é", "a=b") && is_hypervisor_label("tag", ""));
        assert!(!is_hypervisor_label("", "x") && !is_hypervisor_label("a=b", "x"));
        assert!(!is_hypervisor_label(&long, "x") && !is_hypervisor_label("a", &"v".repeat(256)));
        assert!(!is_hypervisor_label("a\t", "x") && !is_hypervisor_label("a", "x\n"));
    }
}
