//! Moves samples from JetStream into the database. A sample is acknowledged only after it is stored, and a malformed
//! sample does not block others.
//!
//! ```text
//! pull ─> check, make documents ─> batch (rows or time) ─> encode blocks ─> insert, majority ─> acknowledge
//!             │ above its VM's rate ─> return to the stream    ├ database unreachable: keep, say "in progress", retry
//!             └ malformed ─> terminate, one dead letter        ├ refused for a fault of the row: dead letter
//!               per minute and VM                              └ refused for a transient reason: retry, then return
//! ```
//!
//! A message that is delivered for the fifth time and still not stored may have crashed the service. Such a suspect
//! message is written alone, and a record in the database marks the attempt. After three crashes that left such a
//! record, the message becomes a dead letter ([`suspects`]).
//!
//! One batch is filled while the previous one is written. Memory is therefore bounded by three batches (one being
//! written, one queued, one being filled) and one pull.

mod arrivals;
mod batch;
pub mod dead_letter;
mod expired;
pub mod message;
mod rate;
mod refusals;
pub(crate) mod suspects;
mod verdict;
mod writer;

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{
    AckKind, Message,
    consumer::{PullConsumer, pull},
};
use futures::StreamExt;
use metrics::counter;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::{SUBJECT_PREFIX, agents::VmLimit, metrics::SAMPLE_SUBJECT_PREFIX, time::UtcOffset};
use vmwatch_bus::Bus;

use self::{
    batch::{Batch, acknowledge},
    message::read,
    rate::{Cost, Decision, Delivery, Rates},
    refusals::Refusals,
    writer::{Work, Writer},
};
use crate::{
    MetricsError,
    config::{BatchSettings, MetricsSettings, RateSettings, StreamSettings},
    documents::Documents,
    evaluation::Evaluations,
    events::Events,
    history::Histories,
    store::RowStore,
    streams,
};

/// Maximum number of bytes requested in one pull from JetStream, and number of bytes at which a batch is written.
const PULL_BYTES: usize = 4 << 20;
/// From this delivery on, a message is written to the database separately from other messages, because earlier attempts
/// may have crashed the service.
const ALONE_AT_DELIVERY: i64 = 5;
/// Pause before the next attempt to read the stream of samples.
const PAUSE: Duration = Duration::from_secs(1);

/// Where the writer puts and reports what was ingested.
#[derive(Clone)]
pub(crate) struct Sinks {
    pub(crate) store: Arc<RowStore>,
    pub(crate) histories: Histories,
    pub(crate) events: Events,
    pub(crate) evaluations: Arc<Evaluations>,
}

/// Moves samples from JetStream into the database.
pub struct Ingest {
    bus: Bus,
    sinks: Sinks,
    consumer: PullConsumer,
    batch: BatchSettings,
    stream: StreamSettings,
    rate: RateSettings,
    offset: UtcOffset,
}

/// State that is kept across reconnections to the stream: rate limits per VM and recent refusals.
struct Intake {
    rates: Rates,
    refusals: Refusals,
}

impl Ingest {
    /// Prepares the ingestion of samples.
    pub(crate) fn new(bus: &Bus, sinks: Sinks, consumer: PullConsumer, settings: &MetricsSettings) -> Self {
        Self {
            bus: bus.clone(),
            sinks,
            consumer,
            batch: settings.batch,
            stream: settings.stream,
            rate: settings.rate,
            offset: settings.rows.offset,
        }
    }

    /// Ingests samples until shutdown, or until the writer task panics. JetStream redelivers samples that were received
    /// but not stored by then.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let (batches, full) = mpsc::channel(1);
        let writing = tokio::spawn(write_all(self.writer(), full, shutdown.clone()));
        let (refusals, publishing) = Refusals::start(self.bus.clone(), self.rate.dead_letter_interval);
        let mut intake = Intake {
            rates: Rates::new(self.rate),
            refusals,
        };
        // If the writer task has panicked, nothing would be stored any more, so stop.
        while !shutdown.is_cancelled() && !batches.is_closed() {
            if let Err(error) = self.pull(&mut intake, &batches, &shutdown).await {
                let cause = error.cause();
                warn!(cause, "reading the stream of samples failed; retrying");
                shutdown.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
                self.prepare_again(&shutdown).await;
            }
        }
        drop((batches, intake));
        for task in [writing, publishing] {
            if let Err(error) = task.await {
                warn!(%error, "a background task for storing samples panicked");
            }
        }
        // Wait until the last acknowledgements are sent; otherwise their samples would be redelivered.
        self.bus.flush(PAUSE).await;
        info!("storing samples stopped");
    }

    fn writer(&self) -> Writer {
        Writer::new(
            self.sinks.clone(),
            &self.bus,
            self.offset,
            // Use the `ack_wait` of the existing consumer, because `setup` may not have changed it to the configured
            // value yet.
            self.consumer.cached_info().config.ack_wait,
        )
    }

    /// Recreates the stream and the consumer if they were deleted or if the NATS server lost its data.
    async fn prepare_again(&mut self, shutdown: &CancellationToken) {
        let prepared = streams::prepare(&self.bus, &self.stream);
        match shutdown.run_until_cancelled(prepared).await {
            Some(Ok(consumer)) => self.consumer = consumer,
            Some(Err(error)) => warn!(
                cause = error.cause(),
                "creating the stream of samples failed; retrying"
            ),
            None => {}
        }
    }

    /// Receives messages and fills batches until shutdown or an error.
    async fn pull(
        &self,
        intake: &mut Intake,
        batches: &mpsc::Sender<Work>,
        shutdown: &CancellationToken,
    ) -> Result<(), MetricsError> {
        let mut messages: pull::Stream = self
            .consumer
            .stream()
            .max_bytes_per_batch(PULL_BYTES)
            .expires(Duration::from_secs(10))
            .heartbeat(Duration::from_secs(3))
            .messages()
            .await
            .map_err(MetricsError::jetstream)?;
        let mut batch = Batch::default();
        let mut due = Instant::now();
        loop {
            let waiting = !batch.messages().is_empty();
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = batches.closed() => break,
                () = tokio::time::sleep_until(due), if waiting => {}
                message = messages.next() => match message {
                    None => break,
                    Some(Err(error)) => {
                        self.hand_over(batches, &mut batch).await;
                        return Err(MetricsError::jetstream(error));
                    }
                    Some(Ok(message)) => {
                        if !waiting {
                            due = Instant::now() + self.batch.wait;
                        }
                        if let Some(suspect) = self.take(intake, &mut batch, message).await {
                            self.hand_over(batches, &mut batch).await;
                            self.send(batches, Work::Alone(Box::new(suspect))).await;
                            continue;
                        }
                        if batch.rows() < self.batch.rows && batch.bytes() < PULL_BYTES {
                            continue;
                        }
                    }
                },
            }
            self.hand_over(batches, &mut batch).await;
        }
        self.hand_over(batches, &mut batch).await;
        Ok(())
    }

    async fn hand_over(&self, batches: &mpsc::Sender<Work>, batch: &mut Batch) {
        if !batch.messages().is_empty() {
            self.send(batches, Work::Batch(std::mem::take(batch))).await;
        }
    }

    async fn send(&self, batches: &mpsc::Sender<Work>, work: Work) {
        // The writer task runs until the channel is closed, so sending fails only if the task has panicked.
        if self.sinks.store.batch_waits(batches.send(work)).await.is_err() {
            warn!("the task that writes batches has ended; JetStream will redeliver this batch");
        }
    }

    /// Adds a message to the batch, returns it to the stream, or refuses it. A message that may crash the service is
    /// given back to the caller, which writes it alone. Malformed messages count towards the rate of their VM as well.
    async fn take(&self, intake: &mut Intake, batch: &mut Batch, message: Message) -> Option<Message> {
        let documents = read(&message, self.offset, &self.sinks.histories.agent.retention);
        let good = documents.as_ref().ok();
        let cost = Cost {
            bytes: message.payload.len(),
            rows: good.map_or(0, Documents::rows),
            five_minutes: good.and_then(|documents| documents.five_minutes(self.offset)),
        };
        let delivery = message.info().map_or(Delivery::UNKNOWN, |info| Delivery {
            stream_sequence: info.stream_sequence,
            delivered: info.delivered,
        });
        let instance = message
            .subject
            .strip_prefix(SAMPLE_SUBJECT_PREFIX)
            // Samples of a hypervisor count separately from those of the agent. No id of a VM contains a dot.
            .or_else(|| message.subject.strip_prefix(SUBJECT_PREFIX))
            .unwrap_or_default()
            .to_owned();
        let returns = match intake.rates.decide(&instance, cost, delivery) {
            Decision::Take { returns } => returns,
            Decision::Return { delay, report } => {
                self.report(&instance, report);
                counter!("vmwatch_samples_above_rate_total").increment(1);
                acknowledge(&message, AckKind::Nak(Some(delay))).await;
                return None;
            }
        };
        // A delivery is no failed attempt if the message was returned only because its VM was above its rate.
        if delivery.delivered - returns >= ALONE_AT_DELIVERY {
            return Some(message);
        }
        match documents {
            Ok(documents) => {
                if let Some(refused) = &documents.refused
                    && intake.refusals.refuse_rows(&instance, &message, refused)
                {
                    self.report(&instance, Some(VmLimit::DeadLetters));
                }
                batch.add(documents, message);
            }
            Err(refused) => {
                // The list of VMs shows the event as the reason.
                let is_shown = refused.event.is_some();
                if let Some(event) = refused.event {
                    self.sinks.events.publish_unstored(event);
                }
                if intake.refusals.refuse(&instance, message, refused.reason).await && !is_shown {
                    self.report(&instance, Some(VmLimit::DeadLetters));
                }
            }
        }
        None
    }

    /// Reports that a VM is above a limit.
    fn report(&self, instance: &str, limit: Option<VmLimit>) {
        if let (Some(limit), Ok(id)) = (limit, instance.parse()) {
            self.sinks.events.publish_over_limit(id, limit);
        }
    }
}

async fn write_all(writer: Writer, mut full: mpsc::Receiver<Work>, shutdown: CancellationToken) {
    while let Some(work) = full.recv().await {
        writer.work(work, &shutdown).await;
    }
}
