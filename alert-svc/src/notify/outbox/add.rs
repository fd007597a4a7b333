//! Adds alerts to the messages of a channel: to a message that waits for more of its group, or to a new one.

use std::collections::BTreeMap;

use mongodb::bson::{Document, doc};
use vmwatch_api::alerts::{
    RecordId,
    channels::{MAX_WAITING, Message, MessageAlert, Purpose},
};

use super::{Outbox, name, unchanged};
use crate::{
    AlertError,
    store::{StoredMessage, is_duplicate, signed},
};

/// Maximum number of alerts in a message; further ones are sent in another message.
pub(crate) const MAX_ALERTS: usize = 500;
/// How often adding is repeated if other replicas change the same messages.
const TRIES: usize = 5;

/// Alerts to be sent: in a message of their own, or in one that waits.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) channel: RecordId,
    pub(crate) purpose: Purpose,
    pub(crate) group: BTreeMap<String, String>,
    pub(crate) alerts: Vec<MessageAlert>,
    /// What the message announces; `None` if it announces the states of its alerts.
    pub(crate) key: Option<String>,
    /// When the message is due at the earliest, Unix milliseconds.
    pub(crate) due_ms: u64,
}

/// The key of a message that announces this state of an alert to a channel.
pub(crate) fn state_key(channel: &RecordId, alert: &MessageAlert) -> String {
    format!("{channel}/{}/{}", alert.id, alert.state.as_str())
}

/// Some alerts of a draft, and the keys of a message with them.
struct Part<'a> {
    draft: &'a Draft,
    alerts: Vec<MessageAlert>,
    keys: Vec<String>,
}

impl Outbox {
    /// Stores what has not been announced yet. Returns whether anything was.
    pub(crate) async fn add(&self, draft: &Draft, now_ms: u64) -> Result<bool, AlertError> {
        let mut added = false;
        let mut number = 0;
        loop {
            let rest = draft.alerts.iter().skip(number * MAX_ALERTS);
            let alerts: Vec<_> = rest.take(MAX_ALERTS).cloned().collect();
            if number > 0 && alerts.is_empty() {
                return Ok(added);
            }
            let keys = match &draft.key {
                Some(key) => vec![format!("{key}/{number}")],
                None => alerts
                    .iter()
                    .map(|alert| state_key(&draft.channel, alert))
                    .collect(),
            };
            added |= self.add_part(Part { draft, alerts, keys }, now_ms).await?;
            number += 1;
        }
    }

    async fn add_part(&self, mut part: Part<'_>, now_ms: u64) -> Result<bool, AlertError> {
        for _ in 0..TRIES {
            let announced = self.announced(&part.keys).await?;
            part.keys.retain(|key| !announced.contains(key));
            if part.keys.is_empty() {
                return Ok(false);
            }
            if part.draft.key.is_none() {
                let channel = &part.draft.channel;
                part.alerts
                    .retain(|alert| !announced.contains(&state_key(channel, alert)));
            }
            if self.join(&part, now_ms).await? || self.insert(&part, now_ms).await? {
                return Ok(true);
            }
        }
        // The alerts stay unnotified and are added in the next pass.
        Err(AlertError::Contended)
    }

    /// Adds the alerts to a waiting message. Returns whether there was one.
    async fn join(&self, part: &Part<'_>, now_ms: u64) -> Result<bool, AlertError> {
        let draft = part.draft;
        if draft.purpose != Purpose::Change {
            return Ok(false);
        }
        let Some(mut message) = self.joinable(draft, part.alerts.len(), now_ms).await? else {
            return Ok(false);
        };
        let before = unchanged(&message);
        message.keys.extend(part.keys.iter().cloned());
        for alert in &part.alerts {
            // The message reports the newest state of an alert.
            message.message.alerts.retain(|present| present.id != alert.id);
            message.message.alerts.push(alert.clone());
        }
        message
            .message
            .group
            .retain(|key, value| draft.group.get(key) == Some(value));
        message.revision = message.revision.saturating_add(1);
        match self.messages.replace_one(before, &message).await {
            Ok(replaced) => Ok(replaced.matched_count == 1),
            Err(error) if is_duplicate(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// A message that the alerts can join: one of the same group that still waits for others of its group or, if too many
    /// messages wait, the newest of the same group, or else the newest of the channel.
    async fn joinable(
        &self,
        draft: &Draft,
        alerts: usize,
        now_ms: u64,
    ) -> Result<Option<StoredMessage>, AlertError> {
        let last = MAX_ALERTS.saturating_sub(alerts);
        let mut waiting = doc! {
            "message.channel_id": draft.channel.as_str(),
            "message.purpose": name(Purpose::Change),
            "due_ms": { "$exists": true },
            "claimed": false,
        };
        // There is room if the message has no alert at this position.
        waiting.insert(format!("message.alerts.{last}"), doc! { "$exists": false });
        let newest = doc! { "message.created_ms": -1 };
        let group = draft.group.iter().map(|(key, value)| (key.clone(), value.into()));
        let mut of_group = waiting.clone();
        of_group.insert("message.group", group.collect::<Document>());
        let mut young = of_group.clone();
        young.insert("message.tries", 0_i64);
        young.insert("due_ms", doc! { "$gt": signed(now_ms) });
        // A message that was skipped because of an earlier one may gain alerts, too.
        if let Some(found) = self.messages.find_one(young).sort(newest.clone()).await? {
            return Ok(Some(found));
        }
        if !self.is_full(&draft.channel).await? {
            return Ok(None);
        }
        if let Some(found) = self.messages.find_one(of_group).sort(newest.clone()).await? {
            return Ok(Some(found));
        }
        Ok(self.messages.find_one(waiting).sort(newest).await?)
    }

    async fn is_full(&self, channel: &RecordId) -> Result<bool, AlertError> {
        let waiting = doc! {
            "message.channel_id": channel.as_str(),
            "message.purpose": name(Purpose::Change),
            "due_ms": { "$exists": true },
        };
        let most = u64::try_from(MAX_WAITING).unwrap_or(u64::MAX);
        Ok(self.messages.count_documents(waiting).limit(most).await? >= most)
    }

    /// Stores a new message. Returns `false` if another message announces one of the alerts by now.
    async fn insert(&self, part: &Part<'_>, now_ms: u64) -> Result<bool, AlertError> {
        let Some(message) = part.message(now_ms) else {
            return Ok(false);
        };
        match self.messages.insert_one(message).await {
            Ok(_) => Ok(true),
            Err(error) if is_duplicate(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Part<'_> {
    /// The message of this part; its id depends on what it announces.
    fn message(&self, now_ms: u64) -> Option<StoredMessage> {
        let id = RecordId::from_parts(&["message", self.keys.first()?]);
        let message = self.draft.message(id, self.alerts.clone(), now_ms);
        Some(stored(message, self.keys.clone()))
    }
}

impl Draft {
    fn message(&self, id: RecordId, alerts: Vec<MessageAlert>, now_ms: u64) -> Message {
        Message {
            id,
            channel_id: self.channel.clone(),
            purpose: self.purpose,
            group: self.group.clone(),
            alerts,
            created_ms: now_ms,
            next_ms: Some(self.due_ms),
            delivered_ms: None,
            tries: 0,
            attempts: Vec::new(),
        }
    }
}

fn stored(message: Message, keys: Vec<String>) -> StoredMessage {
    StoredMessage {
        id: message.id.to_string(),
        due_ms: message.next_ms.map(signed),
        message,
        keys,
        revision: 0,
        claimed: false,
        skipped: false,
    }
}
