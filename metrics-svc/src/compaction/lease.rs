//! The lease of the replica that compacts. It only saves work: blocks stay correct if two replicas compact.
//!
//! The holder counts its renewals up in a document. Another replica takes the lease when the count has not changed for
//! some time on its own clock, so the clocks of replicas are never compared.

use std::time::Duration;

use bson::{DateTime, Document, doc};
use mongodb::{Collection, error::ErrorKind, error::WriteFailure};
use tokio::time::Instant;
use vmwatch_api::status::CompactionStatus;
use vmwatch_bus::random_id;

use crate::{
    MetricsError,
    store::{DUPLICATE_KEY, RowStore, STATE},
};

/// Minimum time between two records of the progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
const ID: &str = "compaction_lease";

/// The lease, from the view of one replica.
#[derive(Debug)]
pub(super) struct Lease {
    documents: Collection<Document>,
    replica: String,
    /// Time without a renewal after which another replica takes the lease.
    patience: Duration,
    renewed: Option<Instant>,
    /// When this replica last recorded the progress.
    noted: Option<Instant>,
    other: Option<(String, i64, Instant)>,
}

impl Lease {
    pub(super) fn new(store: &RowStore, patience: Duration) -> Self {
        Self {
            documents: store.beside(STATE),
            replica: random_id(),
            patience,
            renewed: None,
            noted: None,
            other: None,
        }
    }

    /// Takes or renews the lease. Returns whether this replica holds it.
    pub(super) async fn hold(&mut self) -> Result<bool, MetricsError> {
        if self.renewed.is_some_and(|at| at.elapsed() < self.patience / 4) {
            return Ok(true);
        }
        let found = self.documents.find_one(doc! { "_id": ID }).await?;
        let now = Instant::now();
        let holds = match found {
            None => self.create().await?,
            Some(lease) => {
                let holder = lease.get_str("holder").unwrap_or_default();
                let renewals = lease.get_i64("renewals").unwrap_or_default();
                let is_own = holder == self.replica;
                if !is_own && !holder.is_empty() && !self.has_expired(holder, renewals, now) {
                    false
                } else {
                    let taken = doc! {
                        "$set": { "holder": &self.replica, "renewals": renewals.wrapping_add(1) },
                    };
                    let unchanged = doc! { "_id": ID, "holder": holder, "renewals": renewals };
                    self.documents.update_one(unchanged, taken).await?.matched_count == 1
                }
            }
        };
        self.renewed = holds.then_some(now);
        Ok(holds)
    }

    async fn create(&self) -> Result<bool, MetricsError> {
        let lease = doc! { "_id": ID, "holder": &self.replica, "renewals": 0_i64 };
        match self.documents.insert_one(lease).await {
            Ok(_) => Ok(true),
            Err(error) if is_duplicate(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether another replica has not renewed the lease for some time.
    fn has_expired(&mut self, holder: &str, renewals: i64, now: Instant) -> bool {
        match &self.other {
            Some((seen, count, since)) if seen == holder && *count == renewals => {
                now.duration_since(*since) >= self.patience
            }
            _ => {
                self.other = Some((holder.to_owned(), renewals, now));
                false
            }
        }
    }

    /// Records the progress after a complete pass, for [`progress`].
    pub(super) async fn note_progress(&mut self, lag: Duration) -> Result<(), MetricsError> {
        if self.noted.is_some_and(|at| at.elapsed() < PROGRESS_INTERVAL) {
            return Ok(());
        }
        let lag = i64::try_from(lag.as_millis()).unwrap_or(i64::MAX);
        let progress = doc! { "$set": { "lag_ms": lag, "passed": DateTime::now() } };
        let own = doc! { "_id": ID, "holder": &self.replica };
        self.documents.update_one(own, progress).await?;
        self.noted = Some(Instant::now());
        Ok(())
    }

    /// Gives the lease to the replica that asks next.
    pub(super) async fn release(&mut self) -> Result<(), MetricsError> {
        if self.renewed.take().is_some() {
            let own = doc! { "_id": ID, "holder": &self.replica };
            self.documents
                .update_one(own, doc! { "$set": { "holder": "" } })
                .await?;
        }
        Ok(())
    }
}

/// The progress that the holder of the lease last recorded; `None` if there is none yet.
pub(crate) async fn progress(store: &RowStore) -> Result<Option<CompactionStatus>, MetricsError> {
    let documents: Collection<Document> = store.reading_beside(STATE);
    let Some(lease) = documents.find_one(doc! { "_id": ID }).await? else {
        return Ok(None);
    };
    let (Ok(lag), Ok(passed)) = (lease.get_i64("lag_ms"), lease.get_datetime("passed")) else {
        return Ok(None);
    };
    let now = DateTime::now().timestamp_millis();
    let ago = now.saturating_sub(passed.timestamp_millis());
    Ok(Some(CompactionStatus {
        lag_ms: u64::try_from(lag).unwrap_or(0),
        passed_ago_ms: u64::try_from(ago).unwrap_or(0),
    }))
}

/// Whether an insert failed because a document with the same `_id` exists.
pub(super) fn is_duplicate(error: &mongodb::error::Error) -> bool {
    matches!(*error.kind, ErrorKind::Write(WriteFailure::WriteError(ref write)) if write.code == DUPLICATE_KEY)
}
