//! The messages of channels, which are stored until they are delivered, and the rules for sending each at least once.
//!
//! - A message is stored before the alerts in it count as notified. Its keys say what it announces; a unique index on them keeps
//!   two messages from announcing the same.
//! - An attempt begins with a claim, which sets the time of the next attempt to the end of the claim. If the service is killed
//!   during the attempt, the message is sent again, with the same id.
//! - Each change names the revision that it is based on, so that a message cannot gain alerts while it is sent.
//! - The messages of an alert are sent in the order in which they were made.

mod add;

use std::{collections::HashSet, time::Duration};

use futures::TryStreamExt;
use metrics::counter;
use mongodb::{
    Collection, IndexModel,
    bson::{Document, doc},
    options::{IndexOptions, ReturnDocument},
};
use tracing::warn;
use vmwatch_api::alerts::{
    RecordId,
    channels::{Attempt, MAX_ATTEMPTS_KEPT, Purpose},
};

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

    /// Records that a claimed message was delivered.
    pub(crate) async fn delivered(
        &self,
        message: &StoredMessage,
        attempt: &Attempt,
        now_ms: u64,
    ) -> Result<(), AlertError> {
        let update = doc! {
            "$set": { "message.delivered_ms": signed(now_ms), "claimed": false },
            "$unset": { "due_ms": "", "message.next_ms": "" },
            "$inc": { "revision": 1_i64 },
            "$push": pushed(attempt),
        };
        self.record(message, update).await
    }

    /// Records that an attempt failed, and when the next one is due.
    pub(crate) async fn failed(
        &self,
        message: &StoredMessage,
        attempt: &Attempt,
        next_ms: u64,
    ) -> Result<(), AlertError> {
        let next_ms = signed(next_ms);
        let update = doc! {
            "$set": { "due_ms": next_ms, "message.next_ms": next_ms, "claimed": false },
            "$inc": { "revision": 1_i64 },
            "$push": pushed(attempt),
        };
        self.record(message, update).await
    }

    async fn record(&self, message: &StoredMessage, update: Document) -> Result<(), AlertError> {
        let recorded = self.messages.update_one(unchanged(message), update).await?;
        if recorded.matched_count == 0 {
            // The claim has expired, or the channel or its heartbeat was removed.
            counter!("vmwatch_alert_attempts_unrecorded_total").increment(1);
            warn!(
                message = message.id,
                "the message changed during an attempt, which was not recorded"
            );
        }
        Ok(())
    }

    /// Makes messages of a channel due, because one was delivered: those that may have waited for it and, if the receiver failed
    /// before, those that failed.
    pub(crate) async fn release(
        &self,
        channel: &RecordId,
        had_failed: bool,
        now_ms: u64,
    ) -> Result<(), AlertError> {
        let mut reasons = vec![doc! { "skipped": true }];
        if had_failed {
            reasons.push(doc! { "message.tries": { "$gt": 0_i64 } });
        }
        let now_ms = signed(now_ms);
        let waiting = doc! {
            "message.channel_id": channel.as_str(),
            "due_ms": { "$gt": now_ms },
            "claimed": false,
            "$or": reasons,
        };
        let due = doc! {
            "$set": { "due_ms": now_ms, "message.next_ms": now_ms, "skipped": false },
            "$inc": { "revision": 1_i64 },
        };
        self.messages.update_many(waiting, due).await?;
        Ok(())
    }

    /// Deletes older messages of a channel with this purpose that a newer one replaces: those that wait, and those that were
    /// made before `kept_ms`.
    pub(crate) async fn replace_older(
        &self,
        channel: &RecordId,
        purpose: Purpose,
        now_ms: u64,
        kept_ms: u64,
    ) -> Result<(), AlertError> {
        let older = doc! {
            "message.channel_id": channel.as_str(),
            "message.purpose": name(purpose),
            "$or": [
                { "due_ms": { "$exists": true }, "message.created_ms": { "$lt": signed(now_ms) }, "claimed": false },
                { "message.created_ms": { "$lt": signed(kept_ms) } },
            ],
        };
        self.messages.delete_many(older).await?;
        Ok(())
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

/// The statement that adds an attempt and keeps the newest ones.
fn pushed(attempt: &Attempt) -> Document {
    let attempt = doc! {
        "at_ms": signed(attempt.at_ms),
        "took_ms": signed(attempt.took_ms),
        "delivered": attempt.delivered,
        "answer": &attempt.answer,
    };
    let kept = i64::try_from(MAX_ATTEMPTS_KEPT).unwrap_or(i64::MAX);
    doc! { "message.attempts": { "$each": [attempt], "$slice": kept.saturating_neg() } }
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
