//! A batch into the database, for as long as that takes, and its acknowledgement.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{AckKind, Context};
use metrics::{counter, gauge, histogram};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, warn};

use super::{
    batch::{Batch, Refused, acknowledge},
    dead_letter::put_aside,
};
use crate::{MetricsError, events::Events, history::History, store::RowStore};

/// Between tries while the database is away: the first pause, which doubles up to a share of the ack wait.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A document that the database refuses so often is refused for good. It is not believed at once: a disk that is full
/// or a server that stops refuses single documents as well.
const MOST_REFUSALS: u32 = 5;
/// How long a stop waits for the insert that is under way.
const LAST_CHANCE: Duration = Duration::from_secs(3);

/// Writes batches, one at a time.
pub(super) struct Writer {
    pub(super) store: Arc<RowStore>,
    pub(super) history: Arc<History>,
    pub(super) events: Events,
    pub(super) jetstream: Context,
    /// See [`StreamSettings::ack_wait`](crate::config::StreamSettings::ack_wait).
    pub(super) ack_wait: Duration,
}

impl Writer {
    /// Stores a batch and acknowledges it; at shutdown it may be left to be delivered again.
    pub(super) async fn write(&self, batch: Batch, shutdown: &CancellationToken) {
        let rows = batch.rows();
        gauge!("vmwatch_ingest_waiting_rows").set(u32::try_from(rows).unwrap_or(u32::MAX));
        let batch = Arc::new(batch);
        let Some(refused) = self.store(&batch, shutdown).await else {
            info!(
                rows,
                "stopping with a batch unstored: JetStream delivers it again"
            );
            return;
        };
        gauge!("vmwatch_ingest_waiting_rows").set(0);
        counter!("vmwatch_rows_stored_total").increment((rows - refused.len()) as u64);
        histogram!("vmwatch_ingest_batch_rows").record(u32::try_from(rows).unwrap_or(u32::MAX));
        batch.tell(&self.events, &refused);
        for (place, message) in batch.messages().iter().enumerate() {
            match refused.iter().find(|refused| refused.source == place) {
                Some(Refused { words, .. }) => {
                    put_aside(
                        &self.jetstream,
                        message,
                        &format!("the database refused it: {words}"),
                    )
                    .await;
                }
                None => acknowledge(message, AckKind::Ack).await,
            }
        }
    }

    /// Tries until the database has the batch, but for what it refuses again and again; `None` at shutdown.
    async fn store(&self, batch: &Arc<Batch>, shutdown: &CancellationToken) -> Option<Vec<Refused>> {
        let mut pause = FIRST_PAUSE;
        let mut refusals = 0;
        loop {
            match self.attempt(batch, shutdown).await? {
                Ok(refused) if refused.is_empty() => return Some(refused),
                Ok(refused) => {
                    refusals += 1;
                    if refusals == MOST_REFUSALS {
                        return Some(refused);
                    }
                    let words = refused.first().map(|refused| refused.words.as_str());
                    warn!(
                        documents = refused.len(),
                        words, "the database refused documents; trying again"
                    );
                }
                Err(error) => {
                    let (cause, rows) = (error.cause(), batch.rows());
                    warn!(cause, rows, "the database did not take a batch; trying again");
                }
            }
            batch.say_in_progress().await;
            shutdown.run_until_cancelled(sleep(pause)).await?;
            // With an attempt that is two thirds of it, this stays within the ack wait.
            pause = (pause * 2).min(self.ack_wait / 6);
        }
    }

    /// One insert; `None` if it is not over soon after a shutdown.
    ///
    /// One that takes too long is left to itself, since a driver's call is not safe to drop half-way: a server that
    /// vanished without a word would hold it for a quarter of an hour, and the rows' `_id`s make it harmless
    /// should it come through after all.
    async fn attempt(
        &self,
        batch: &Arc<Batch>,
        shutdown: &CancellationToken,
    ) -> Option<Result<Vec<Refused>, MetricsError>> {
        let started = Instant::now();
        let (store, history, batch) = (
            Arc::clone(&self.store),
            Arc::clone(&self.history),
            Arc::clone(batch),
        );
        let mut inserting =
            tokio::spawn(async move { batch.insert(&store, &history.marks).await }.in_current_span());
        let limit = self.ack_wait * 2 / 3;
        let inserted = tokio::select! {
            inserted = timeout(limit, &mut inserting) => inserted,
            // A last chance, so that a stop under load rarely leaves a batch to be delivered again.
            () = shutdown.cancelled() => Ok(timeout(LAST_CHANCE, &mut inserting).await.ok()?),
        };
        histogram!("vmwatch_ingest_insert_seconds").record(started.elapsed().as_secs_f64());
        Some(match inserted {
            Ok(inserted) => inserted.unwrap_or_else(|defect| Err(MetricsError::Io(defect.into()))),
            Err(_) => Err(MetricsError::Unanswered(limit)),
        })
    }
}
