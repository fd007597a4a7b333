//! Writes batches of rows to the database, retrying as long as needed, and acknowledges their messages.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{AckKind, Message};
use metrics::{counter, gauge, histogram};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, warn};
use vmwatch_api::time::UtcOffset;
use vmwatch_bus::Bus;

use super::{
    Sinks,
    batch::{Batch, Refused, acknowledge},
    dead_letter::{publish_copy, refuse},
    message::read,
    suspects::{self, Suspects},
    verdict::{Verdict, verdicts},
};
use crate::MetricsError;

/// First pause between attempts while the database does not accept a batch. The pause doubles up to a sixth of the ack
/// wait.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Number of attempts after which a batch that is only partly stored is not retried: its stored messages are
/// acknowledged, and the others return to the stream.
const MAX_ATTEMPTS_FOR_REST: u32 = 3;
/// How long a batch is retried if the database answers but accepts none of its rows. After that its messages return to
/// the stream, so that a batch that is refused for good does not block all others.
const MAX_HOLD: Duration = Duration::from_mins(1);
/// Delay after which JetStream redelivers a message that was not stored.
const RETURN_DELAY: Duration = Duration::from_secs(10);
/// Maximum number of concurrent inserts that wait for an unresponsive database. An insert that takes too long is left
/// running, because it cannot be cancelled safely.
const MAX_ATTEMPTS: usize = 8;
/// Number of service crashes after which the message that caused them becomes a dead letter.
const MAX_CRASHES: i64 = 3;
/// How long shutdown waits for a running insert into the database.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(3);

/// What the writer task is asked to write.
pub(super) enum Work {
    /// Write a batch of decoded messages.
    Batch(Batch),
    /// A message that was delivered several times and never stored. It is decoded and written alone.
    Alone(Box<Message>),
}

/// Writes batches to the database, one at a time.
pub(super) struct Writer {
    pub(super) sinks: Sinks,
    pub(super) bus: Bus,
    pub(super) suspects: Suspects,
    pub(super) offset: UtcOffset,
    /// Time within which a message must be acknowledged:
    /// [`StreamSettings::ack_wait`](crate::config::StreamSettings::ack_wait).
    pub(super) ack_wait: Duration,
    attempts: Arc<Semaphore>,
}

/// The database's latest answer for a batch.
struct Outcome {
    verdicts: Vec<Verdict>,
    unstored: usize,
}

impl Writer {
    pub(super) fn new(sinks: Sinks, bus: &Bus, offset: UtcOffset, ack_wait: Duration) -> Self {
        Self {
            suspects: Suspects::new(&sinks.store),
            sinks,
            bus: bus.clone(),
            offset,
            ack_wait,
            attempts: Arc::new(Semaphore::new(MAX_ATTEMPTS)),
        }
    }

    /// Writes a batch or a single message. At shutdown the write may be skipped; JetStream then redelivers the
    /// messages.
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
                    warn!(
                        cause,
                        "failed to delete the database record that marks a sample message as a possible cause of crashes"
                    );
                }
            }
        }
    }

    /// Decodes and writes a message that may crash the service. Returns `None` if shutdown came before the write began.
    async fn write_alone(&self, key: &str, message: Message, shutdown: &CancellationToken) -> Option<()> {
        counter!("vmwatch_samples_written_alone_total").increment(1);
        let crashes = self.begin_alone(key, &message, shutdown).await?;
        if crashes >= MAX_CRASHES {
            let reason = format!("the service crashed {crashes} times while writing this sample");
            refuse(&self.bus, &message, &reason).await;
            return Some(());
        }
        match read(&message, self.offset, &self.sinks.histories.agent.retention) {
            Ok(documents) => {
                if let Some(refused) = &documents.refused {
                    counter!("vmwatch_rows_refused_total").increment(refused.count);
                    publish_copy(&self.bus, &message, &refused.reason).await;
                }
                let mut batch = Batch::default();
                batch.add(documents, message);
                let span = batch.span();
                self.write(batch, shutdown).instrument(span).await;
            }
            Err(refused) => {
                if let Some(event) = refused.event {
                    self.sinks.events.publish_unstored(event);
                }
                refuse(&self.bus, &message, &refused.reason).await;
            }
        }
        Some(())
    }

    /// Records that a suspect message is about to be written; retries until the database has stored this record.
    async fn begin_alone(&self, key: &str, message: &Message, shutdown: &CancellationToken) -> Option<i64> {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.suspects.begin(key).await {
                Ok(crashes) => return Some(crashes),
                Err(error) => {
                    let cause = error.cause();
                    warn!(
                        cause,
                        "failed to write the database record that marks a sample message as a possible cause of crashes; retrying"
                    );
                }
            }
            acknowledge(message, AckKind::Progress).await;
            shutdown.run_until_cancelled(sleep(pause)).await?;
            pause = (pause * 2).min(self.ack_wait / 6);
        }
    }

    /// Stores a batch and acknowledges its messages. At shutdown both may be skipped; JetStream then redelivers the
    /// messages.
    async fn write(&self, batch: Batch, shutdown: &CancellationToken) {
        let rows = batch.rows();
        gauge!("vmwatch_ingest_waiting_rows").set(u32::try_from(rows).unwrap_or(u32::MAX));
        let batch = Arc::new(batch);
        let Some(Outcome { verdicts, unstored }) = self.store(&batch, shutdown).await else {
            info!(
                rows,
                "the service stopped before a batch of samples was stored; JetStream will redeliver it"
            );
            return;
        };
        gauge!("vmwatch_ingest_waiting_rows").set(0);
        counter!("vmwatch_rows_stored_total").increment((rows - unstored) as u64);
        if let Some((parts, subject)) = batch.dropped_by_agents() {
            counter!("vmwatch_parts_dropped_by_agents_total").increment(parts);
            warn!(
                parts,
                subject, "agents have dropped parts of samples; `subject` names the last of these agents"
            );
        }
        if let Some((records, subject)) = batch.exit_records_lost_by_agents() {
            counter!("vmwatch_exit_records_lost_by_agents_total").increment(records);
            warn!(
                records,
                subject,
                "agents have lost records of ended processes, whose CPU time is estimated; `subject` names the last of these agents"
            );
        }
        histogram!("vmwatch_ingest_batch_rows").record(u32::try_from(rows).unwrap_or(u32::MAX));
        batch.publish_events(&self.sinks.events, &verdicts);
        let records = batch.evaluations(&verdicts, &self.sinks.evaluations.watched());
        self.sinks.evaluations.publish(records).await;
        for (message, verdict) in batch.messages().iter().zip(&verdicts) {
            match verdict {
                Verdict::Stored => acknowledge(message, AckKind::Ack).await,
                Verdict::Refused(words) => {
                    let reason = format!("the database refused rows of the sample: {words}");
                    refuse(&self.bus, message, &reason).await;
                }
                Verdict::Retry => {
                    counter!("vmwatch_samples_returned_total").increment(1);
                    acknowledge(message, AckKind::Nak(Some(RETURN_DELAY))).await;
                }
            }
        }
    }

    /// Retries until the database has stored the batch, or has repeatedly answered without storing all of it. Returns
    /// `None` at shutdown.
    async fn store(&self, batch: &Arc<Batch>, shutdown: &CancellationToken) -> Option<Outcome> {
        let (mut pause, mut tries, begun) = (FIRST_PAUSE, 0, Instant::now());
        loop {
            match self.attempt(batch, shutdown).await? {
                Ok(refused) => {
                    let verdicts = verdicts(batch.messages().len(), &refused);
                    let unstored = refused.iter().map(|refused| refused.rows).sum();
                    tries += 1;
                    let others_pass = verdicts.iter().any(|verdict| *verdict != Verdict::Retry);
                    let given_up =
                        others_pass && tries >= MAX_ATTEMPTS_FOR_REST || begun.elapsed() > MAX_HOLD;
                    if given_up || !verdicts.contains(&Verdict::Retry) {
                        return Some(Outcome { verdicts, unstored });
                    }
                    let (code, words) = refused
                        .first()
                        .map(|refused| (refused.code, &refused.words))
                        .unzip();
                    warn!(
                        unstored,
                        code, words, "the database refused some blocks of a batch; retrying"
                    );
                }
                Err(error) => {
                    let (cause, rows) = (error.cause(), batch.rows());
                    warn!(
                        cause,
                        rows, "writing a batch of samples to the database failed; retrying"
                    );
                }
            }
            counter!("vmwatch_ingest_retries_total").increment(1);
            batch.extend_ack_wait().await;
            shutdown.run_until_cancelled(sleep(pause)).await?;
            // An attempt takes at most two thirds of the ack wait, so attempt and pause together stay within the ack
            // wait.
            pause = (pause * 2).min(self.ack_wait / 6);
        }
    }

    /// Runs one insert; `None` if it does not end soon after shutdown.
    ///
    /// An insert that takes too long is left running, because dropping a call of the MongoDB driver half-way is not
    /// safe. If a database server vanishes without closing its connections, an insert can wait for a quarter of an
    /// hour. It is harmless if the insert still succeeds then, because the rows have stable ids. [`MAX_ATTEMPTS`]
    /// bounds the number of such inserts.
    async fn attempt(
        &self,
        batch: &Arc<Batch>,
        shutdown: &CancellationToken,
    ) -> Option<Result<Vec<Refused>, MetricsError>> {
        let started = Instant::now();
        let (sinks, batch) = (self.sinks.clone(), Arc::clone(batch));
        let limit = self.ack_wait * 2 / 3;
        let waiting = timeout(limit, Arc::clone(&self.attempts).acquire_owned());
        let Ok(permit) = shutdown.run_until_cancelled(waiting).await? else {
            return Some(Err(MetricsError::Unanswered(limit)));
        };
        let insert = async move {
            let inserted = batch.insert(&sinks.store, &sinks.histories).await;
            drop(permit);
            inserted
        };
        let mut inserting = tokio::spawn(insert.in_current_span());
        let inserted = tokio::select! {
            inserted = timeout(limit, &mut inserting) => inserted,
            // Wait for a short time, so that a shutdown under load rarely leaves a batch for redelivery.
            () = shutdown.cancelled() => Ok(timeout(SHUTDOWN_WAIT, &mut inserting).await.ok()?),
        };
        histogram!("vmwatch_ingest_insert_seconds").record(started.elapsed().as_secs_f64());
        Some(match inserted {
            Ok(inserted) => inserted.unwrap_or_else(|panic| Err(MetricsError::Io(panic.into()))),
            Err(_) => Err(MetricsError::Unanswered(limit)),
        })
    }
}
