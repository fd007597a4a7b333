//! Counts how often a suspect message has crashed the service. Before a suspect message is written to the database
//! alone, a record of the attempt is stored there; it is removed when the write has ended, whatever its result. A
//! record that remains therefore means that the service crashed.
//!
//! ```text
//! vm_samples_suspects  { _id: "<sequence>-<published>", attempts: 2, sampled_at }
//! ```
//!
//! While the database is unreachable no record can be stored, so an outage of the database does not count as a crash.

use std::time::{Duration, SystemTime};

use async_nats::jetstream::Message;
use bson::{DateTime, Document, doc};
use mongodb::{Collection, options::ReturnDocument};
use tokio::time::timeout;

use crate::{MetricsError, documents::SAMPLED_AT, retention, store::RowStore};

/// Retention of records about suspect messages that were never delivered again.
const KEEP: Duration = Duration::from_hours(720);
/// Deadline of one write of a record to the database.
const DEADLINE: Duration = Duration::from_secs(5);

/// The collection of records about suspect messages.
#[derive(Clone)]
pub(crate) struct Suspects {
    records: Collection<Document>,
}

impl Suspects {
    /// Opens the collection of records about suspect messages, which is in the same database as the rows.
    pub(crate) fn new(rows: &RowStore) -> Self {
        Self {
            records: rows.beside("suspects"),
        }
    }

    /// Applies the retention to the records about suspect messages.
    pub(crate) async fn prepare(&self, rows: &RowStore) -> Result<(), MetricsError> {
        retention::apply(rows.database(), &self.records.clone_with_type(), KEEP).await
    }

    /// Records that a suspect message is about to be written. Returns the number of earlier attempts that never ended
    /// because the service crashed.
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

    /// Removes the record of a suspect message after its write has ended.
    pub(super) async fn end(&self, message: &str) -> Result<(), MetricsError> {
        let (records, id) = (self.records.clone(), message.to_owned());
        let removing = async move { records.delete_one(doc! { "_id": id }).await };
        bounded(removing).await.map(drop)
    }
}

/// Key of a message that may crash the service. It is unique even if the stream of the message is recreated.
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

/// Waits for a database command in a separate task, because dropping a call of the MongoDB driver half-way is not safe.
async fn bounded<T: Send + 'static>(
    command: impl Future<Output = mongodb::error::Result<T>> + Send + 'static,
) -> Result<T, MetricsError> {
    match timeout(DEADLINE, tokio::spawn(command)).await {
        Ok(Ok(done)) => Ok(done?),
        Ok(Err(panic)) => Err(MetricsError::Io(panic.into())),
        Err(_) => Err(MetricsError::Unanswered(DEADLINE)),
    }
}
