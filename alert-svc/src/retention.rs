//! Deletes what is kept for a limited time: resolved alerts, delivered messages, ended silences, and messages of
//! removed channels. Every replica does this, because deleting twice does no harm.

use std::time::Duration;

use futures::TryStreamExt;
use metrics::counter;
use mongodb::bson::{Document, doc};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::time::unix_millis;
use vmwatch_service::jitter::jittered;

use crate::{
    AlertError,
    store::{Store, signed},
};

/// Interval between two passes.
const INTERVAL: Duration = Duration::from_hours(1);
/// Time for which delivered messages are kept.
const MESSAGES_KEPT: Duration = Duration::from_hours(30 * 24);
/// Time for which delivered heartbeats are kept. A channel may send one every ten seconds.
const HEARTBEATS_KEPT: Duration = Duration::from_hours(24);
/// Time for which ended silences are kept.
pub(crate) const SILENCES_KEPT: Duration = Duration::from_hours(7 * 24);
/// Age of a waiting message from which on it is deleted if its channel does not exist. A younger one may belong to a
/// channel that was created after the list of channels was read.
const ORPHANS_KEPT: Duration = Duration::from_hours(1);

/// Deletes what is older than its retention, until shutdown.
pub(crate) async fn follow(store: Store, alerts_kept: Duration, shutdown: CancellationToken) {
    loop {
        match shutdown.run_until_cancelled(pass(&store, alerts_kept)).await {
            None => return,
            Some(Ok(deleted)) => debug!(deleted, "deleted expired alerts, messages and silences"),
            Some(Err(error)) => {
                counter!("vmwatch_alert_retention_failed_total").increment(1);
                warn!(%error, "deleting expired alerts, messages and silences failed; retrying later");
            }
        }
        let pause = tokio::time::sleep(jittered(INTERVAL, 0.1));
        if shutdown.run_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}

/// Deletes what has expired. Returns the number of deleted documents.
async fn pass(store: &Store, alerts_kept: Duration) -> Result<u64, AlertError> {
    let now_ms = unix_millis();
    let before = |kept: Duration| {
        let kept_ms = u64::try_from(kept.as_millis()).unwrap_or(u64::MAX);
        doc! { "$lt": signed(now_ms.saturating_sub(kept_ms)) }
    };
    // An alert whose end has not been notified yet is kept: the notifier may have been unable to send for a long time.
    let alerts = doc! { "open": false, "unnotified": false, "alert.resolved_ms": before(alerts_kept) };
    let alerts = store.alerts.delete_many(alerts).await?;
    let messages = doc! { "message.delivered_ms": before(MESSAGES_KEPT) };
    let messages = store.messages.delete_many(messages).await?;
    let heartbeats = doc! {
        "message.purpose": "heartbeat",
        "message.delivered_ms": before(HEARTBEATS_KEPT),
    };
    let heartbeats = store.messages.delete_many(heartbeats).await?;
    let silences = doc! { "until_ms": before(SILENCES_KEPT) };
    let silences = store.silences.delete_many(silences).await?;
    let orphans = doc! {
        "due_ms": { "$exists": true },
        "message.created_ms": before(ORPHANS_KEPT),
        "message.channel_id": { "$nin": channel_ids(store).await? },
    };
    let orphans = store.messages.delete_many(orphans).await?;
    Ok([alerts, messages, heartbeats, silences, orphans]
        .iter()
        .map(|deleted| deleted.deleted_count)
        .sum())
}

async fn channel_ids(store: &Store) -> Result<Vec<String>, AlertError> {
    let channels = store.channels.clone_with_type::<Document>();
    let found = channels.find(doc! {}).projection(doc! { "_id": 1 });
    let found: Vec<Document> = found.await?.try_collect().await?;
    let ids = found.iter().filter_map(|channel| channel.get_str("_id").ok());
    Ok(ids.map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use mongodb::Collection;
    use testkit::Database;

    use super::*;

    const HOUR_MS: u64 = 3_600_000;

    /// When something happened this many hours ago.
    fn ago(hours: u64) -> i64 {
        signed(unix_millis() - hours * HOUR_MS)
    }

    async fn insert<T: Send + Sync>(collection: &Collection<T>, documents: Vec<Document>) {
        let collection = collection.clone_with_type::<Document>();
        collection.insert_many(documents).await.unwrap();
    }

    async fn ids<T: Send + Sync>(collection: &Collection<T>) -> Vec<String> {
        let documents = collection.clone_with_type::<Document>();
        let found = documents.find(doc! {}).sort(doc! { "_id": 1 }).await.unwrap();
        let found: Vec<Document> = found.try_collect().await.unwrap();
        let ids = found.iter().map(|document| document.get_str("_id").unwrap());
        ids.map(str::to_owned).collect()
    }

    fn alert(id: &str, open: bool, unnotified: bool, hours: u64) -> Document {
        let state = if open {
            doc! { "since_ms": ago(hours) }
        } else {
            doc! { "resolved_ms": ago(hours) }
        };
        doc! { "_id": id, "open": open, "unnotified": unnotified, "alert": state }
    }

    fn delivered(id: &str, purpose: &str, hours: u64) -> Document {
        let message = doc! { "channel_id": "known", "purpose": purpose, "delivered_ms": ago(hours) };
        doc! { "_id": id, "message": message }
    }

    fn waiting(id: &str, channel: &str, hours: u64) -> Document {
        let message = doc! { "channel_id": channel, "purpose": "change", "created_ms": ago(hours) };
        doc! { "_id": id, "message": message, "due_ms": ago(hours) }
    }

    #[tokio::test]
    async fn only_what_has_expired_is_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::start(folder.path()).await;
        let store = Store::new(&database.handle());
        let alerts = vec![
            alert("expired", false, false, 91 * 24),
            alert("recent", false, false, 89 * 24),
            alert("still open", true, false, 200 * 24),
            alert("unnotified", false, true, 200 * 24),
        ];
        insert(&store.alerts, alerts).await;
        let messages = vec![
            delivered("expired", "change", 31 * 24),
            delivered("recent", "change", 29 * 24),
            delivered("expired heartbeat", "heartbeat", 25),
            delivered("recent heartbeat", "heartbeat", 23),
            waiting("waiting", "known", 200 * 24),
            waiting("orphan", "removed", 2),
            waiting("of a new channel", "unseen", 0),
        ];
        insert(&store.messages, messages).await;
        insert(&store.channels, vec![doc! { "_id": "known" }]).await;
        let silences = [("expired", 8 * 24), ("ended", 6 * 24)].map(|(id, hours)| {
            doc! { "_id": id, "until_ms": ago(hours) }
        });
        insert(&store.silences, silences.to_vec()).await;

        let kept = Duration::from_hours(90 * 24);
        assert_eq!(pass(&store, kept).await.unwrap(), 5);
        assert_eq!(ids(&store.alerts).await, ["recent", "still open", "unnotified"]);
        assert_eq!(
            ids(&store.messages).await,
            ["of a new channel", "recent", "recent heartbeat", "waiting"]
        );
        assert_eq!(ids(&store.silences).await, ["ended"]);
        assert_eq!(pass(&store, kept).await.unwrap(), 0);
    }
}
