//! The collections of alert-svc in MongoDB.

use mongodb::{
    Collection, Database,
    error::{ErrorKind, WriteFailure},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::Error as _};
use vmwatch_api::alerts::{
    Alert,
    channels::{ChannelSpec, Message},
    rules::{Rule, RuleSpec},
    silences::{NewSilence, Silence},
};

/// MongoDB's error code for a duplicate key.
const DUPLICATE_KEY: i32 = 11_000;

/// The collections of alert-svc.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    pub(crate) rules: Collection<StoredRule>,
    pub(crate) alerts: Collection<StoredAlert>,
    pub(crate) silences: Collection<StoredSilence>,
    pub(crate) channels: Collection<StoredChannel>,
    pub(crate) messages: Collection<StoredMessage>,
    pub(crate) channel_states: Collection<StoredChannelState>,
    pub(crate) progress: Collection<StoredProgress>,
    pub(crate) state: Collection<StoredState>,
}

impl Store {
    pub(crate) fn new(database: &Database) -> Self {
        Self {
            rules: database.collection("alert_rules"),
            alerts: database.collection("alerts"),
            silences: database.collection("alert_silences"),
            channels: database.collection("alert_channels"),
            messages: database.collection("alert_messages"),
            channel_states: database.collection("alert_channel_states"),
            progress: database.collection("alert_progress"),
            state: database.collection("alert_state"),
        }
    }
}

/// A rule as stored. `_id` is the rule's id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredRule {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    pub(crate) revision: i64,
    pub(crate) spec: RuleSpec,
    pub(crate) changed_by: String,
    pub(crate) changed_ms: i64,
    /// Whether the rule was removed. Such a record only keeps a starter rule from being created again.
    #[serde(default)]
    pub(crate) removed: bool,
    /// Why the rule cannot be evaluated at the moment. It is not part of the revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) problem: Option<String>,
}

impl StoredRule {
    /// The rule, without its number of active alerts; `None` if its id is not valid.
    pub(crate) fn into_rule(self) -> Option<Rule> {
        Some(Rule {
            id: self.id.parse().ok()?,
            revision: unsigned(self.revision),
            spec: self.spec,
            changed_by: self.changed_by,
            changed_ms: unsigned(self.changed_ms),
            problem: self.problem,
            active: 0,
        })
    }
}

/// Whether a document was not inserted because there is one with the same `_id`.
pub(crate) fn is_duplicate(error: &mongodb::error::Error) -> bool {
    matches!(&*error.kind, ErrorKind::Write(WriteFailure::WriteError(write)) if write.code == DUPLICATE_KEY)
}

/// A number as it is stored: MongoDB has no unsigned integers.
pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A stored number; 0 if it is negative, which this program never stores.
pub(crate) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// An alert as stored. `_id` is the alert's id, which rule, VM, subject and the beginning of the condition determine. A change
/// is made only if `alert.revision` is unchanged.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredAlert {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    pub(crate) alert: Alert,
    /// Whether the alert is pending, firing or acknowledged.
    pub(crate) open: bool,
    /// Whether the notifier has not yet made messages of the alert's last change.
    pub(crate) unnotified: bool,
}

/// A silence as stored. `_id` is the silence's id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredSilence {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    /// Stored as a JSON text: users choose the keys of the labels, and the keys of a document in MongoDB may have a meaning.
    #[serde(serialize_with = "to_json", deserialize_with = "from_json")]
    pub(crate) silence: NewSilence,
    pub(crate) created_by: String,
    pub(crate) created_ms: i64,
    /// The end of the silence in Unix milliseconds, by which silences are read and deleted.
    pub(crate) until_ms: i64,
}

impl StoredSilence {
    /// The silence; `None` if its id is not valid.
    pub(crate) fn into_silence(self) -> Option<Silence> {
        Some(Silence {
            id: self.id.parse().ok()?,
            silence: self.silence,
            created_by: self.created_by,
            created_ms: unsigned(self.created_ms),
        })
    }
}

fn to_json<S: Serializer>(silence: &NewSilence, serializer: S) -> Result<S::Ok, S::Error> {
    let json = serde_json::to_string(silence).map_err(S::Error::custom)?;
    serializer.serialize_str(&json)
}

fn from_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NewSilence, D::Error> {
    let json = String::deserialize(deserializer)?;
    serde_json::from_str(&json).map_err(D::Error::custom)
}

/// A channel as stored. `_id` is the channel's id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredChannel {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    pub(crate) revision: i64,
    pub(crate) spec: ChannelSpec,
    /// The sealed secret; see `seal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) secret: Option<String>,
    pub(crate) changed_by: String,
    pub(crate) changed_ms: i64,
}

/// A message as stored. `_id` is the message's id. `due_ms` is `message.next_ms`; it is absent once the message is delivered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredMessage {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    pub(crate) message: Message,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) due_ms: Option<i64>,
    /// What the message announces, such as the state of an alert. A unique index ensures that no two messages have a key in
    /// common, so that two replicas cannot announce the same twice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) keys: Vec<String>,
    /// Number of changes. A change is made only if it is unchanged.
    #[serde(default)]
    pub(crate) revision: i64,
    /// Whether an attempt is in progress. It ends at `due_ms` at the latest.
    #[serde(default)]
    pub(crate) claimed: bool,
    /// Whether the message waits for an earlier one that has an alert in common.
    #[serde(default)]
    pub(crate) skipped: bool,
}

/// What hinders the delivery of a channel's messages. `_id` is the channel's id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredChannelState {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    /// Why the last attempt failed, or why none is made.
    #[serde(default)]
    pub(crate) delivery: Option<String>,
    /// Why the channel's template was not used.
    #[serde(default)]
    pub(crate) template: Option<String>,
}

/// How far the samples of a VM have been evaluated. `_id` is the VM's id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredProgress {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    /// Effective date of the newest evaluated sample, Unix milliseconds.
    pub(crate) newest_ms: i64,
    /// When the newest sample of the agent arrived, Unix milliseconds.
    pub(crate) arrived_ms: i64,
}

/// What the evaluation of rules continues with after a restart. `_id` is [`ENGINE_STATE`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredState {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    /// The times in which silence does not count, as JSON.
    pub(crate) standstills: String,
    /// Sequence number of the last evaluation record whose effects on the progress of VMs are certainly stored.
    pub(crate) saved_sequence: i64,
}

/// The id of the only document of the collection `alert_state`.
pub(crate) const ENGINE_STATE: &str = "engine";
