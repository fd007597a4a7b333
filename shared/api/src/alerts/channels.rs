//! Channels, through which alerts notify people and other programs; their messages and the attempts to deliver them.

mod target;

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

pub use self::target::{ChannelTarget, EmailAddress, GroupKey, MailTls, ReceiverUrl, SmtpServer, Template};
use super::{AlertState, RecordId, RecordRef, RevisionRef, Title, change, query};
use crate::{
    Access, Method, MethodInfo, Role, enrollment::SecretText, metrics::Limit, sessions::Own, users::Done,
};

/// Maximum number of channels.
pub const MAX_CHANNELS: usize = 100;
/// Maximum number of keys by which alerts are grouped.
pub const MAX_GROUP_KEYS: usize = 8;
/// Maximum time that the first alert of a group waits for others, in seconds.
pub const MAX_GROUP_WAIT_SECONDS: u32 = 3600;
/// Shortest and longest interval of repeated notifications, in seconds: five minutes and a week.
pub const MIN_REPEAT_SECONDS: u32 = 300;
pub const MAX_REPEAT_SECONDS: u32 = 604_800;
/// Shortest and longest interval of heartbeats, in seconds: ten seconds and a day.
pub const MIN_HEARTBEAT_SECONDS: u32 = 10;
pub const MAX_HEARTBEAT_SECONDS: u32 = 86_400;
/// Number of messages of a channel that wait to be delivered, above which further alerts join the waiting message of their
/// group.
pub const MAX_WAITING: usize = 1000;
/// Number of attempts that are kept with a message, the newest.
pub const MAX_ATTEMPTS_KEPT: usize = 20;
/// Number of bytes of a receiver's answer that are kept.
pub const MAX_ANSWER: usize = 200;

/// What an administrator sets of a channel, except its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelSpec {
    pub name: Title,
    /// A channel that is not enabled sends nothing; its messages wait.
    pub enabled: bool,
    pub target: ChannelTarget,
    /// Alerts that are equal in these are sent in one message, at most [`MAX_GROUP_KEYS`]; without any, all alerts of the
    /// channel.
    #[serde(default, deserialize_with = "group_by")]
    pub group_by: Vec<GroupKey>,
    /// How many seconds the first alert of a group waits for others, 0 to [`MAX_GROUP_WAIT_SECONDS`].
    #[serde(default, deserialize_with = "group_wait")]
    pub group_wait_seconds: u32,
    /// Interval in seconds at which alerts that are still firing are sent again; `None`: they are not.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "repeat")]
    pub repeat_seconds: Option<u32>,
    /// Interval in seconds of messages that say that vmwatch works, so that the receiver can alert on their absence.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "heartbeat"
    )]
    pub heartbeat_seconds: Option<u32>,
    /// Template of the text; a default text if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
}

fn group_by<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<GroupKey>, D::Error> {
    let keys = Vec::deserialize(deserializer)?;
    if keys.len() <= MAX_GROUP_KEYS {
        Ok(keys)
    } else {
        Err(D::Error::custom("must list at most 8 keys"))
    }
}

fn group_wait<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        seconds @ 0..=MAX_GROUP_WAIT_SECONDS => Ok(seconds),
        _ => Err(D::Error::custom("must be 0 to 3600 seconds")),
    }
}

fn repeat<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match u32::deserialize(deserializer)? {
        seconds @ MIN_REPEAT_SECONDS..=MAX_REPEAT_SECONDS => Ok(Some(seconds)),
        _ => Err(D::Error::custom("must be 300 to 604800 seconds")),
    }
}

fn heartbeat<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match u32::deserialize(deserializer)? {
        seconds @ MIN_HEARTBEAT_SECONDS..=MAX_HEARTBEAT_SECONDS => Ok(Some(seconds)),
        _ => Err(D::Error::custom("must be 10 to 86400 seconds")),
    }
}

/// A channel as answered, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel {
    pub id: RecordId,
    /// Number of the channel's last change, which the next change must name.
    pub revision: u64,
    pub spec: ChannelSpec,
    /// Whether the channel has a secret: the password of the mail server, the key that signs webhooks, or the bearer token
    /// of an Alertmanager.
    pub has_secret: bool,
    pub changed_by: String,
    /// Unix milliseconds.
    pub changed_ms: u64,
    /// Number of messages that wait to be delivered.
    #[serde(default)]
    pub waiting: u64,
    /// When a message was last delivered, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivered_ms: Option<u64>,
    /// Why messages are not delivered at the moment; a text for users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// All channels, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelList {
    pub channels: Vec<Channel>,
    /// Whether alert-svc has the key that seals secrets. Without it, channels with a secret send nothing.
    #[serde(default)]
    pub has_key: bool,
}

/// What users need of a channel to choose it as a recipient.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelName {
    pub id: RecordId,
    pub name: Title,
    /// `email`, `webhook` or `alertmanager`.
    pub kind: String,
    pub enabled: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelNames {
    pub channels: Vec<ChannelName>,
}

/// Lists channels with their settings.
#[derive(Debug)]
pub struct ChannelsList;

impl Method for ChannelsList {
    type Params = Own;
    type Reply = ChannelList;
    const INFO: MethodInfo = MethodInfo {
        access: Access::Role(Role::Admin),
        ..query("alert.channels.list")
    };
}

/// Lists the names of channels, for choosing the recipients of a rule.
#[derive(Debug)]
pub struct ChannelsNames;

impl Method for ChannelsNames {
    type Params = Own;
    type Reply = ChannelNames;
    const INFO: MethodInfo = query("alert.channels.names");
}

/// A channel to be created.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NewChannel {
    pub spec: ChannelSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretText>,
}

#[derive(Debug)]
pub struct ChannelsCreate;

impl Method for ChannelsCreate {
    type Params = NewChannel;
    type Reply = Channel;
    const INFO: MethodInfo = change("alert.channels.create", Role::Admin);
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChannelChange {
    pub id: RecordId,
    /// The revision that the change is based on.
    pub revision: u64,
    pub spec: ChannelSpec,
    /// The new secret; without one, the channel keeps its secret, unless `forget_secret`. If the receiver changes, a secret
    /// must be given again or forgotten, so that nobody can send it to another receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretText>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forget_secret: bool,
}

#[derive(Debug)]
pub struct ChannelsUpdate;

impl Method for ChannelsUpdate {
    type Params = ChannelChange;
    type Reply = Channel;
    const INFO: MethodInfo = change("alert.channels.update", Role::Admin);
}

/// Removes a channel, its waiting messages, and its mention in rules.
#[derive(Debug)]
pub struct ChannelsRemove;

impl Method for ChannelsRemove {
    type Params = RevisionRef;
    type Reply = Done;
    const INFO: MethodInfo = change("alert.channels.remove", Role::Admin);
}

/// Queues a test message, which says that it is one.
#[derive(Debug)]
pub struct ChannelsTest;

impl Method for ChannelsTest {
    type Params = RecordRef;
    type Reply = Message;
    const INFO: MethodInfo = change("alert.channels.test", Role::Admin);
}

/// What a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Purpose {
    /// Alerts began to fire or were resolved.
    Change,
    /// Alerts are still firing.
    Repeat,
    /// A user tests the channel.
    Test,
    /// vmwatch works.
    Heartbeat,
}

/// An alert in a message, in the state that the message reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageAlert {
    pub id: RecordId,
    pub state: AlertState,
}

/// An attempt to deliver a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Unix milliseconds.
    pub at_ms: u64,
    /// How long the attempt took, in milliseconds.
    pub took_ms: u64,
    pub delivered: bool,
    /// The receiver's status and at most [`MAX_ANSWER`] bytes of its answer, or why there was none.
    pub answer: String,
}

/// A message of a channel, delivered or waiting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The id, which the receiver gets with each attempt, so that it can recognize a duplicate.
    pub id: RecordId,
    pub channel_id: RecordId,
    pub purpose: Purpose,
    /// The values that the alerts of the message have in common, by key of [`ChannelSpec::group_by`].
    #[serde(default)]
    pub group: BTreeMap<String, String>,
    pub alerts: Vec<MessageAlert>,
    /// Unix milliseconds.
    pub created_ms: u64,
    /// When the next attempt is due, Unix milliseconds; `None` if the message was delivered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivered_ms: Option<u64>,
    /// Number of all attempts.
    #[serde(default)]
    pub tries: u64,
    /// The newest [`MAX_ATTEMPTS_KEPT`] attempts, oldest first.
    #[serde(default)]
    pub attempts: Vec<Attempt>,
}

/// Selects the messages of a channel, newest first; also those that contain an alert.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageFilter {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel_id: Option<RecordId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alert_id: Option<RecordId>,
    /// The `next` value of the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<MessagePosition>,
    #[serde(default)]
    pub limit: Limit,
}

/// The position of a message in a list: newest first, by `created_ms`, then id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessagePosition {
    pub created_ms: u64,
    pub id: RecordId,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessagePage {
    pub messages: Vec<Message>,
    /// Absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<MessagePosition>,
}

/// Lists messages and the attempts to deliver them.
#[derive(Debug)]
pub struct MessagesList;

impl Method for MessagesList {
    type Params = MessageFilter;
    type Reply = MessagePage;
    const INFO: MethodInfo = MethodInfo {
        access: Access::Role(Role::Admin),
        ..query("alert.messages.list")
    };
}
