//! Batches into the database, for as long as that takes, and their acknowledgement.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{AckKind, Context, Message};
use metrics::{counter, gauge, histogram};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, warn};
use vmwatch_api::time::UtcOffset;

use super::{
    batch::{Batch, Refused, acknowledge},
    dead_letter::put_aside,
    read,
    suspects::{self, Suspects},
    verdict::{Verdict, verdicts},
};
use crate::{MetricsError, events::Events, history::History, store::RowStore};

/// Between tries while the database does not take a batch: the first pause, which doubles up to a share of the ack wait.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Tries after which the messages that the database takes are no longer kept waiting for those that it does not.
const MOST_TRIES: u32 = 3;
/// How long a batch is held that the database answers without taking any of it. Then its messages go back to the stream,
/// so that one whose refusal never passes does not stop all others.
const LONGEST_HOLD: Duration = Duration::from_mins(1);
/// How long a message that was not stored waits in the stream for its next delivery.
const RETURN_DELAY: Duration = Duration::from_secs(10);
/// Inserts that wait at once for a database that does not answer. One that takes too long is left to itself.
const MOST_ATTEMPTS: usize = 8;
/// A message with which the service crashed so often becomes a dead letter.
const MOST_CRASHES: i64 = 3;
/// How long a stop waits for the insert that is under way.
const LAST_CHANCE: Duration = Duration::from_secs(3);

/// What is to be written.
pub(super) enum Work {
    /// Messages that were read.
    Batch(Batch),
    /// A message that was delivered often and never stored: it is read and written while nothing else is.
    Alone(Box<Message>),
}

/// Writes one batch at a time.
pub(super) struct Writer {
    pub(super) store: Arc<RowStore>,
    pub(super) history: Arc<History>,
    pub(super) events: Events,
    pub(super) jetstream: Context,
    pub(super) suspects: Suspects,
    pub(super) offset: UtcOffset,
    /// See [`StreamSettings::ack_wait`](crate::config::StreamSettings::ack_wait).
    pub(super) ack_wait: Duration,
    attempts: Arc<Semaphore>,
}

/// What the database answered last for a batch.
struct Outcome {
    verdicts: Vec<Verdict>,
    unstored: usize,
}

impl Writer {
    pub(super) fn new(
        store: &Arc<RowStore>,
        history: &Arc<History>,
        events: Events,
        jetstream: &Context,
        offset: UtcOffset,
        ack_wait: Duration,
    ) -> Self {
        Self {
            suspects: Suspects::beside(store),
            store: Arc::clone(store),
            history: Arc::clone(history),
            events,
            jetstream: jetstream.clone(),
            offset,
            ack_wait,
            attempts: Arc::new(Semaphore::new(MOST_ATTEMPTS)),
        }
    }

    /// Writes what is to be written; at shutdown it may be left to be delivered again.
    pub(super) async fn work(&self, work: Work, shutdown: &CancellationToken) {
        match work {
            Work::Batch(batch) => {
                let span = batch.span();
                self.write(batch, shutdown).instrument(span).await;
            }
            Work::Alone(message) => {
                let key = suspects::key(&message);
                if self.write_alone(&key, *message, shutdown).await.is_none() {
                    return;
                }
                if let Err(error) = self.suspects.end(&key).await {
                    let cause = error.cause();
                    warn!(cause, "a message that is written is still recorded as suspect");
                }
            }
        }
    }

    /// Reads and writes a message that may crash the service; `None` at a shutdown before anything was begun.
    async fn write_alone(&self, key: &str, message: Message, shutdown: &CancellationToken) -> Option<()> {
        counter!("vmwatch_samples_written_alone_total").increment(1);
        let crashes = self.begin_alone(key, &message, shutdown).await?;
        if crashes >= MOST_CRASHES {
            let reason = format!("the service crashed {crashes} times while it was written");
            put_aside(&self.jetstream, &message, &reason).await;
            return Some(());
        }
        match read(&message, self.offset) {
            Ok(documents) => {
                let mut batch = Batch::default();
                batch.add(documents, message);
                let span = batch.span();
                self.write(batch, shutdown).instrument(span).await;
            }
            Err(reason) => put_aside(&self.jetstream, &message, &reason).await,
        }
        Some(())
    }

    /// Records that a message is about to be written, once the database can be reached.
    async fn begin_alone(&self, key: &str, message: &Message, shutdown: &CancellationToken) -> Option<i64> {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.suspects.begin(key).await {
                Ok(crashes) => return Some(crashes),
                Err(error) => {
                    let cause = error.cause();
                    warn!(
                        cause,
                        "the database did not take the record of a suspect; retrying"
                    );
                }
            }
            acknowledge(message, AckKind::Progress).await;
            shutdown.run_until_cancelled(sleep(pause)).await?;
            pause = (pause * 2).min(self.ack_wait / 6);
        }
    }

    /// Stores a batch and settles its messages; at shutdown it may be left to be delivered again.
    async fn write(&self, batch: Batch, shutdown: &CancellationToken) {
        let rows = batch.rows();
        gauge!("vmwatch_ingest_waiting_rows").set(u32::try_from(rows).unwrap_or(u32::MAX));
        let batch = Arc::new(batch);
        let Some(Outcome { verdicts, unstored }) = self.store(&batch, shutdown).await else {
            info!(
                rows,
                "stopping with a batch unstored: JetStream delivers it again"
            );
            return;
        };
        gauge!("vmwatch_ingest_waiting_rows").set(0);
        counter!("vmwatch_rows_stored_total").increment((rows - unstored) as u64);
        if let Some((parts, subject)) = batch.dropped_by_agents() {
            counter!("vmwatch_parts_dropped_by_agents_total").increment(parts);
            warn!(
                parts,
                subject, "agents dropped parts of samples; the subject is that of the last one"
            );
        }
        histogram!("vmwatch_ingest_batch_rows").record(u32::try_from(rows).unwrap_or(u32::MAX));
        batch.tell(&self.events, &verdicts);
        for (message, verdict) in batch.messages().iter().zip(&verdicts) {
            match verdict {
                Verdict::Stored => acknowledge(message, AckKind::Ack).await,
                Verdict::Refused(words) => {
                    let reason = format!("the database refused it: {words}");
                    put_aside(&self.jetstream, message, &reason).await;
                }
                Verdict::Again => {
                    counter!("vmwatch_samples_returned_total").increment(1);
                    acknowledge(message, AckKind::Nak(Some(RETURN_DELAY))).await;
                }
            }
        }
    }

    /// Tries until the database has the batch, or has answered often enough without taking some of it; `None` at shutdown.
    async fn store(&self, batch: &Arc<Batch>, shutdown: &CancellationToken) -> Option<Outcome> {
        let (mut pause, mut tries, begun) = (FIRST_PAUSE, 0, Instant::now());
        loop {
            match self.attempt(batch, shutdown).await? {
                Ok(refused) => {
                    let verdicts = verdicts(batch.messages().len(), &refused);
                    let unstored = refused.len();
                    tries += 1;
                    let others_pass = verdicts.iter().any(|verdict| *verdict != Verdict::Again);
                    let given_up = others_pass && tries >= MOST_TRIES || begun.elapsed() > LONGEST_HOLD;
                    if given_up || !verdicts.contains(&Verdict::Again) {
                        return Some(Outcome { verdicts, unstored });
                    }
                    let (code, words) = refused
                        .first()
                        .map(|refused| (refused.code, &refused.words))
                        .unzip();
                    warn!(unstored, code, words, "the database refused documents; retrying");
                }
                Err(error) => {
                    let (cause, rows) = (error.cause(), batch.rows());
                    warn!(cause, rows, "the database did not take a batch; retrying");
                }
            }
            counter!("vmwatch_ingest_retries_total").increment(1);
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
    /// should it come through after all. Only so many are left so.
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
        let limit = self.ack_wait * 2 / 3;
        let waiting = timeout(limit, Arc::clone(&self.attempts).acquire_owned());
        let Ok(permit) = shutdown.run_until_cancelled(waiting).await? else {
            return Some(Err(MetricsError::Unanswered(limit)));
        };
        let insert = async move {
            let inserted = batch.insert(&store, &history.marks).await;
            drop(permit);
            inserted
        };
        let mut inserting = tokio::spawn(insert.in_current_span());
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
