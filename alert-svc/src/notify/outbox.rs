//! The messages of channels, which are stored until they are delivered, and the rules for sending each at least once.
//!
//! - A message is stored before the alerts in it count as notified. Its keys say what it announces; a unique index on them keeps
//!   two messages from announcing the same.
//! - An attempt begins with a claim, which sets the time of the next attempt to the end of the claim. If the service is killed
//!   during the attempt, the message is sent again, with the same id.
//! - Each change names the revision that it is based on, so that a message cannot gain alerts while it is sent.
//! - The messages of an alert are sent in the order in which they were made.

mod add;
mod results;

use std::{collections::HashSet, time::Duration};

use futures::TryStreamExt;
use mongodb::{
    Collection, IndexModel,
    bson::{Document, doc},
    options::{IndexOptions, ReturnDocument},
};
use vmwatch_api::alerts::{RecordId, channels::Purpose};

pub(crate) use self::add::{Draft, MAX_ALERTS, state_key};
use crate::{
    AlertError,
    store::{Store, StoredMessage, signed},
};

/// Time after which a claimed message is due again: longer than an attempt may take.
pub(super) const CLAIM: Duration = Duration::from_secs(40);
/// Maximum number of messages that [`Outbox::claim`] skips because an earlier message of one of their alerts waits.
const MAX_SKIPPED: usize = 200;
/// Shortest time until a skipped message is considered again, in milliseconds.
const SKIP_MS: i64 = 100;

/// The messages of all channels.
#[derive(Debug, Clone)]
pub(crate) struct Outbox {
    messages: Collection<StoredMessage>,
}

impl Outbox {
    pub(crate) fn new(store: &Store) -> Self {
        Self {
            messages: store.messages.clone(),
        }
    }

    /// Creates the indexes that the outbox relies on, if they are missing.
    pub(crate) async fn prepare(&self) -> Result<(), AlertError> {
        let unique = IndexOptions::builder()
            .name("keys".to_owned())
            .unique(true)
            .sparse(true)
            .build();
        let due = IndexOptions::builder()
            .name("due".to_owned())
            .sparse(true)
            .build();
        let indexes = [
            IndexModel::builder()
                .keys(doc! { "keys": 1 })
                .options(unique)
                .build(),
            IndexModel::builder()
                .keys(doc! { "due_ms": 1 })
                .options(due)
                .build(),
        ];
        self.messages.create_indexes(indexes).await?;
        Ok(())
    }

    /// Those of the keys that messages already have.
    pub(crate) async fn announced(&self, keys: &[String]) -> Result<HashSet<String>, AlertError> {
        let mut found = HashSet::new();
        for some in keys.chunks(MAX_ALERTS) {
            self.collect_keys(doc! { "keys": { "$in": some } }, &mut found)
                .await?;
        }
        let wanted: HashSet<_> = keys.iter().collect();
        found.retain(|key| wanted.contains(key));
        Ok(found)
    }

    /// The keys of all messages that contain one of the alerts.
    pub(crate) async fn keys_of_alerts(&self, ids: &[String]) -> Result<HashSet<String>, AlertError> {
        let mut found = HashSet::new();
        for some in ids.chunks(MAX_ALERTS) {
            self.collect_keys(doc! { "message.alerts.id": { "$in": some } }, &mut found)
                .await?;
        }
        Ok(found)
    }

    async fn collect_keys(&self, filter: Document, found: &mut HashSet<String>) -> Result<(), AlertError> {
        let documents = self.messages.clone_with_type::<Document>();
        let mut cursor = documents.find(filter).projection(doc! { "keys": 1 }).await?;
        while let Some(message) = cursor.try_next().await? {
            let keys = message.get_array("keys").into_iter().flatten();
            found.extend(keys.filter_map(|key| key.as_str().map(str::to_owned)));
        }
        Ok(())
    }

    /// When a message of the channel with this alert was last made.
    pub(crate) async fn last_made(
        &self,
        channel: &RecordId,
        alert: &RecordId,
    ) -> Result<Option<u64>, AlertError> {
        let filter = doc! { "message.channel_id": channel.as_str(), "message.alerts.id": alert.as_str() };
        let newest = self
            .messages
            .find_one(filter)
            .sort(doc! { "message.created_ms": -1 });
        Ok(newest.await?.map(|message| message.message.created_ms))
    }

    /// The ids of channels with a message that is due.
    pub(crate) async fn channels_with_due(&self, now_ms: u64) -> Result<Vec<String>, AlertError> {
        let due = doc! { "due_ms": { "$lte": signed(now_ms) } };
        let ids = self.messages.distinct("message.channel_id", due).await?;
        Ok(ids
            .iter()
            .filter_map(|id| id.as_str().map(str::to_owned))
            .collect())
    }

    /// Claims the oldest message of a channel that is due and may be sent.
    pub(crate) async fn claim(
        &self,
        channel: &RecordId,
        now_ms: u64,
    ) -> Result<Option<StoredMessage>, AlertError> {
        let due = doc! { "message.channel_id": channel.as_str(), "due_ms": { "$lte": signed(now_ms) } };
        for _ in 0..MAX_SKIPPED {
            let oldest = self
                .messages
                .find_one(due.clone())
                .sort(doc! { "message.created_ms": 1, "_id": 1 });
            let Some(message) = oldest.await? else {
                return Ok(None);
            };
            if let Some(earlier) = self.earlier(&message).await? {
                let due_ms = earlier
                    .due_ms
                    .unwrap_or(0)
                    .max(signed(now_ms).saturating_add(SKIP_MS));
                let skip = doc! { "due_ms": due_ms, "message.next_ms": due_ms, "skipped": true };
                self.update(&message, skip).await?;
                continue;
            }
            let until = signed(now_ms.saturating_add(millis(CLAIM)));
            let tries = message.message.tries.saturating_add(1);
            let claim = doc! {
                "due_ms": until, "message.next_ms": until, "message.tries": signed(tries), "claimed": true,
                "skipped": false,
            };
            if let Some(claimed) = self.update(&message, claim).await? {
                return Ok(Some(claimed));
            }
        }
        Ok(None)
    }

    /// A waiting message of the channel that was made earlier and has an alert in common.
    async fn earlier(&self, message: &StoredMessage) -> Result<Option<StoredMessage>, AlertError> {
        if message.message.alerts.is_empty() {
            return Ok(None);
        }
        let ids: Vec<_> = message
            .message
            .alerts
            .iter()
            .map(|alert| alert.id.as_str())
            .collect();
        let earlier = doc! {
            "message.channel_id": message.message.channel_id.as_str(),
            "due_ms": { "$exists": true },
            "message.created_ms": { "$lt": signed(message.message.created_ms) },
            "message.alerts.id": { "$in": ids },
        };
        Ok(self
            .messages
            .find_one(earlier)
            .sort(doc! { "due_ms": -1 })
            .await?)
    }

    /// Changes a message if it is unchanged. Returns the new message, or `None` if it has changed.
    async fn update(
        &self,
        message: &StoredMessage,
        set: Document,
    ) -> Result<Option<StoredMessage>, AlertError> {
        let update = doc! { "$set": set, "$inc": { "revision": 1_i64 } };
        let changed = self
            .messages
            .find_one_and_update(unchanged(message), update)
            .return_document(ReturnDocument::After);
        Ok(changed.await?)
    }
}

/// The filter for a message that has not changed.
fn unchanged(message: &StoredMessage) -> Document {
    doc! { "_id": &message.id, "revision": message.revision }
}

/// The name of a purpose in the database.
const fn name(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Change => "change",
        Purpose::Repeat => "repeat",
        Purpose::Test => "test",
        Purpose::Heartbeat => "heartbeat",
    }
}

/// A duration in milliseconds.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
