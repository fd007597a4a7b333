//! Records what came of attempts, and what follows for other messages of the channel.

use metrics::counter;
use mongodb::bson::{Document, doc};
use tracing::warn;
use vmwatch_api::alerts::{
    RecordId,
    channels::{Attempt, MAX_ATTEMPTS_KEPT, Purpose},
};

use super::{Outbox, name, unchanged};
use crate::{
    AlertError,
    store::{StoredMessage, signed},
};

impl Outbox {
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
