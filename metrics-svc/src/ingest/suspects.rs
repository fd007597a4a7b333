//! Messages that may have ended the service: before one of them is written alone, that is on record in the database, and
//! once the writing has ended, whatever its end, it no longer is. So a record that is left tells of a crash.
//!
//! ```text
//! vm_samples_suspects  { _id: "<sequence>-<published>", attempts: 2, sampled_at }
//! ```
//!
//! A database that cannot be reached takes no record, so that its outages count for nothing.

use std::time::{Duration, SystemTime};

use async_nats::jetstream::Message;
use bson::{DateTime, Document, doc};
use mongodb::{Collection, options::ReturnDocument};
use tokio::time::timeout;

use crate::{MetricsError, documents::SAMPLED_AT, retention, store::RowStore};

/// Records of messages that never came again go after this time.
const KEEP: Duration = Duration::from_hours(720);
/// One small write; a database that takes longer is as good as unreachable.
const DEADLINE: Duration = Duration::from_secs(5);

/// The records.
#[derive(Clone)]
pub(crate) struct Suspects {
    records: Collection<Document>,
}

impl Suspects {
    /// The collection beside the rows.
    pub(crate) fn beside(rows: &RowStore) -> Self {
        Self {
            records: rows.beside("suspects"),
        }
    }

    /// Fits the retention.
    pub(crate) async fn prepare(&self, rows: &RowStore) -> Result<(), MetricsError> {
        retention::apply(rows.database(), &self.records.clone_with_type(), KEEP).await
    }

    /// Records that a message is about to be written; gives back how many writings of it began before and never ended.
    pub(super) async fn begin(&self, message: &str) -> Result<i64, MetricsError> {
        let (records, id) = (self.records.clone(), message.to_owned());
        let counting = async move {
            let count = doc! {
                "$inc": { "attempts": 1_i64 },
                "$set": { SAMPLED_AT: DateTime::from_system_time(SystemTime::now()) },
            };
            records
                .find_one_and_update(doc! { "_id": id }, count)
                .upsert(true)
                .return_document(ReturnDocument::After)
                .await
        };
        let counted = bounded(counting).await?;
        let attempts = counted.and_then(|record| record.get_i64("attempts").ok());
        Ok(attempts.unwrap_or(1).saturating_sub(1))
    }

    /// Removes the record of a message whose writing has ended.
    pub(super) async fn end(&self, message: &str) -> Result<(), MetricsError> {
        let (records, id) = (self.records.clone(), message.to_owned());
        let removing = async move { records.delete_one(doc! { "_id": id }).await };
        bounded(removing).await.map(drop)
    }
}

/// What tells a message from every other, also after its stream was made anew.
pub(super) fn key(message: &Message) -> String {
    message.info().map_or_else(
        |_| message.subject.to_string(),
        |info| {
            format!(
                "{}-{}",
                info.stream_sequence,
                info.published.unix_timestamp_nanos()
            )
        },
    )
}

/// Waits for a command of the database in a task of its own, since a driver's call is not safe to drop half-way.
async fn bounded<T: Send + 'static>(
    command: impl Future<Output = mongodb::error::Result<T>> + Send + 'static,
) -> Result<T, MetricsError> {
    match timeout(DEADLINE, tokio::spawn(command)).await {
        Ok(Ok(done)) => Ok(done?),
        Ok(Err(defect)) => Err(MetricsError::Io(defect.into())),
        Err(_) => Err(MetricsError::Unanswered(DEADLINE)),
    }
}
