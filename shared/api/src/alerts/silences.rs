//! Silences: times in which alerts with certain labels notify nobody.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use super::{Comment, RecordId, RecordRef, change, query};
use crate::{Method, MethodInfo, Role, history::TimeRange, sessions::Own};

/// Maximum number of labels that a silence names.
pub const MAX_MATCHERS: usize = 16;
/// Maximum length of the name and the value of such a label in bytes.
pub const MAX_MATCHER_TEXT: usize = 1024;
/// Maximum length of a silence: one year.
pub const MAX_SILENCE_MS: u64 = 366 * 86_400_000;
/// Maximum number of silences that have not ended.
pub const MAX_SILENCES: usize = 1000;

/// The labels that an alert must have to be silenced: 1 to 16. Besides the labels of the VM, an alert has the labels
/// `rule`, `severity`, `instance_id`, `vm_name`, `hypervisor` and `subject`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Matchers(BTreeMap<String, String>);

impl Matchers {
    const RULE: &str = "must be 1 to 16 labels, each a name and a text of at most 1024 bytes";

    /// Returns `None` unless there are 1 to 16 labels of permitted length.
    pub fn new(labels: BTreeMap<String, String>) -> Option<Self> {
        let is_short = |text: &String| text.len() <= MAX_MATCHER_TEXT;
        let fits = (1..=MAX_MATCHERS).contains(&labels.len())
            && labels
                .iter()
                .all(|(key, value)| !key.is_empty() && is_short(key) && is_short(value));
        fits.then_some(Self(labels))
    }

    /// Whether an alert with these labels is silenced.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|(key, value)| labels.get(key) == Some(value))
    }

    pub const fn labels(&self) -> &BTreeMap<String, String> {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Matchers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let labels = BTreeMap::deserialize(deserializer)?;
        Self::new(labels).ok_or_else(|| D::Error::custom(Self::RULE))
    }
}

/// A silence to be created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewSilence {
    pub matchers: Matchers,
    /// When the silence holds; at most [`MAX_SILENCE_MS`] long.
    pub range: TimeRange,
    #[serde(default)]
    pub comment: Comment,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silence {
    pub id: RecordId,
    #[serde(flatten)]
    pub silence: NewSilence,
    /// Name of the user that created the silence.
    pub created_by: String,
    /// Unix milliseconds.
    pub created_ms: u64,
}

/// The silences that have not ended and those that ended within the last week, newest first; at most [`MAX_SILENCES`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SilenceList {
    pub silences: Vec<Silence>,
}

#[derive(Debug)]
pub struct SilencesList;

impl Method for SilencesList {
    type Params = Own;
    type Reply = SilenceList;
    const INFO: MethodInfo = query("alert.silences.list");
}

/// Creates a silence. It needs the scope of all VMs.
#[derive(Debug)]
pub struct SilencesCreate;

impl Method for SilencesCreate {
    type Params = NewSilence;
    type Reply = Silence;
    const INFO: MethodInfo = change("alert.silences.create", Role::Operator);
}

/// Ends a silence now. It needs the scope of all VMs.
#[derive(Debug)]
pub struct SilencesEnd;

impl Method for SilencesEnd {
    type Params = RecordRef;
    type Reply = Silence;
    const INFO: MethodInfo = change("alert.silences.end", Role::Operator);
}
