//! From JetStream into the store: nothing is acknowledged before it is stored, and nothing malformed blocks the rest.
//!
//! ```text
//! pull ─> check, make documents ─> batch (rows or time) ─> insert, majority ─> acknowledge
//!             └ malformed ─> dead letter, terminate          └ database away: keep, say "in progress", try again
//! ```
//!
//! One batch is filled while the one before is written: memory is bounded by two batches and one pull.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_nats::{
    HeaderMap,
    jetstream::{
        AckKind, Context, Message,
        consumer::{PullConsumer, pull},
    },
};
use futures::StreamExt;
use metrics::{counter, gauge, histogram};
use shared::{
    api::metrics::{DEAD_LETTER_SUBJECT_PREFIX, SAMPLE_PART_BYTES, SAMPLE_SUBJECT_PREFIX, Sample},
    bus::Bus,
    time::UtcOffset,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    MetricsError,
    config::{BatchSettings, MetricsSettings},
    documents::Documents,
    store::{RowKind, RowStore},
    streams::ACK_WAIT,
};

/// Bytes asked for in one pull: eight of the largest parts.
const PULL_BYTES: usize = 8 * SAMPLE_PART_BYTES;
/// A sample that was delivered so often and never stored kills whoever takes it; it is put aside.
const MOST_DELIVERIES: i64 = 20;
/// Between tries while the database is away.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a stop waits for the insert that is under way.
const LAST_CHANCE: Duration = Duration::from_secs(3);
/// JetStream answers in milliseconds or not at all.
const JETSTREAM_DEADLINE: Duration = Duration::from_secs(5);

/// The headers of a dead letter.
pub mod dead_letter {
    /// Why the sample was refused.
    pub const REASON: &str = "Vmwatch-Reason";
    /// The subject that it came on.
    pub const SUBJECT: &str = "Vmwatch-Subject";
}

/// Moves samples into the store.
pub struct Ingest {
    jetstream: Context,
    store: Arc<RowStore>,
    consumer: PullConsumer,
    settings: BatchSettings,
    offset: UtcOffset,
}

/// Documents to write, and the messages that they came from.
#[derive(Default)]
struct Batch {
    documents: Documents,
    /// Of each document the index of its message, by collection.
    vm_sources: Vec<usize>,
    process_sources: Vec<usize>,
    messages: Vec<Message>,
}

impl Batch {
    fn rows(&self) -> usize {
        self.vm_sources.len() + self.process_sources.len()
    }

    fn add(&mut self, documents: Documents, message: Message) {
        let source = self.messages.len();
        self.vm_sources.extend(documents.vms.iter().map(|_| source));
        self.process_sources
            .extend(documents.processes.iter().map(|_| source));
        self.documents.vms.extend(documents.vms);
        self.documents.processes.extend(documents.processes);
        self.messages.push(message);
    }
}

impl Ingest {
    /// Prepares ingestion.
    pub fn new(bus: &Bus, store: Arc<RowStore>, consumer: PullConsumer, settings: &MetricsSettings) -> Self {
        Self {
            jetstream: bus.jetstream().clone(),
            store,
            consumer,
            settings: settings.batch,
            offset: settings.rows.offset,
        }
    }

    /// Runs until shutdown; what was pulled and not yet stored then is delivered again, to whoever is there.
    pub async fn run(self, shutdown: CancellationToken) {
        let this = Arc::new(self);
        let (batches, mut full) = mpsc::channel::<Batch>(1);
        let writer = {
            let (this, shutdown) = (Arc::clone(&this), shutdown.clone());
            tokio::spawn(async move {
                while let Some(batch) = full.recv().await {
                    this.write(batch, &shutdown).await;
                }
            })
        };
        while !shutdown.is_cancelled() {
            if let Err(error) = this.pull(&batches, &shutdown).await {
                warn!(
                    cause = error.cause(),
                    "the sample stream cannot be read; trying again"
                );
                shutdown
                    .run_until_cancelled(tokio::time::sleep(Duration::from_secs(1)))
                    .await;
            }
        }
        drop(batches);
        if let Err(error) = writer.await {
            warn!(%error, "the batch writer ended by a defect");
        }
        info!("ingestion stopped");
    }

    /// Pulls and fills batches until shutdown or an error.
    async fn pull(
        &self,
        batches: &mpsc::Sender<Batch>,
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
            let waiting = !batch.messages.is_empty();
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = tokio::time::sleep_until(due), if waiting => {}
                message = messages.next() => match message {
                    None => break,
                    Some(Err(error)) => {
                        hand_over(batches, &mut batch).await;
                        return Err(MetricsError::jetstream(error));
                    }
                    Some(Ok(message)) => {
                        if !waiting {
                            due = Instant::now() + self.settings.wait;
                        }
                        self.take(&mut batch, message).await;
                        if batch.rows() < self.settings.rows {
                            continue;
                        }
                    }
                },
            }
            hand_over(batches, &mut batch).await;
        }
        hand_over(batches, &mut batch).await;
        Ok(())
    }

    /// Adds a message to the batch, or puts it aside.
    async fn take(&self, batch: &mut Batch, message: Message) {
        let delivered = message.info().map_or(1, |info| info.delivered);
        if delivered > MOST_DELIVERIES {
            let reason = format!("it was delivered {MOST_DELIVERIES} times and never stored");
            self.put_aside(&message, &reason).await;
            return;
        }
        match self.documents(&message) {
            Ok(documents) => batch.add(documents, message),
            Err(reason) => self.put_aside(&message, &reason).await,
        }
    }

    fn documents(&self, message: &Message) -> Result<Documents, String> {
        if message.payload.len() > SAMPLE_PART_BYTES {
            return Err(format!("it is larger than {SAMPLE_PART_BYTES} bytes"));
        }
        let sample: Sample =
            serde_json::from_slice(&message.payload).map_err(|error| format!("it is no sample: {error}"))?;
        if message.subject.strip_prefix(SAMPLE_SUBJECT_PREFIX) != Some(sample.instance_id.as_str()) {
            return Err("its instance_id is not that of its subject".to_owned());
        }
        Documents::of(&sample, self.offset, SystemTime::now()).map_err(|refusal| refusal.to_string())
    }

    /// To the dead letters, and only then out of the stream.
    async fn put_aside(&self, message: &Message, reason: &str) {
        counter!("vmwatch_samples_refused_total").increment(1);
        warn!(subject = %message.subject, reason, "a sample was refused; see `vmwatch-metrics dead-letters list`");
        let mut headers = HeaderMap::new();
        headers.insert(dead_letter::REASON, reason.replace(['\r', '\n'], " "));
        headers.insert(dead_letter::SUBJECT, message.subject.as_str());
        if let Ok(info) = message.info() {
            // The same message is put aside once, however often it is tried.
            headers.insert("Nats-Msg-Id", format!("{}:{}", info.stream, info.stream_sequence));
        }
        let instance = message
            .subject
            .strip_prefix(SAMPLE_SUBJECT_PREFIX)
            .unwrap_or("unknown");
        let subject = format!("{DEAD_LETTER_SUBJECT_PREFIX}{instance}");
        let stored = async {
            self.jetstream
                .publish_with_headers(subject, headers, message.payload.clone())
                .await
                .map_err(MetricsError::jetstream)?
                .await
                .map_err(MetricsError::jetstream)
        };
        match tokio::time::timeout(JETSTREAM_DEADLINE, stored).await {
            Ok(Ok(_)) => acknowledge(message, AckKind::Term).await,
            // Not acknowledged: it is delivered again, and put aside then.
            Ok(Err(error)) => warn!(
                cause = error.cause(),
                "a refused sample could not be put aside yet"
            ),
            Err(_) => warn!("a refused sample could not be put aside in time"),
        }
    }

    /// Writes a batch, for as long as it takes, and acknowledges it.
    async fn write(&self, batch: Batch, shutdown: &CancellationToken) {
        let rows = batch.rows();
        gauge!("vmwatch_ingest_waiting_rows").set(u32::try_from(rows).unwrap_or(u32::MAX));
        let batch = Arc::new(batch);
        let mut pause = FIRST_PAUSE;
        let refused = loop {
            match self.try_to_write(&batch, shutdown).await {
                Some(Ok(refused)) => break refused,
                Some(Err(error)) => {
                    warn!(
                        cause = error.cause(),
                        rows, "the database did not take a batch; trying again"
                    );
                    batch.say_in_progress().await;
                }
                None => {}
            }
            if shutdown
                .run_until_cancelled(tokio::time::sleep(pause))
                .await
                .is_none()
            {
                info!(
                    rows,
                    "stopping with a batch unstored: JetStream delivers it again"
                );
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        gauge!("vmwatch_ingest_waiting_rows").set(0);
        counter!("vmwatch_rows_stored_total").increment(rows as u64);
        histogram!("vmwatch_ingest_batch_rows").record(u32::try_from(rows).unwrap_or(u32::MAX));
        let refusals = batch.refusals(refused);
        for (source, message) in batch.messages.iter().enumerate() {
            match refusals.iter().find(|(refused, _)| *refused == source) {
                Some((_, reason)) => self.put_aside(message, reason).await,
                None => acknowledge(message, AckKind::Ack).await,
            }
        }
    }

    /// One insert, waited for however long it takes: a driver's call is not safe to drop half-way, and another one
    /// beside it would double the load of a database that is slow. `None` at shutdown.
    async fn try_to_write(
        &self,
        batch: &Arc<Batch>,
        shutdown: &CancellationToken,
    ) -> Option<Result<Refused, MetricsError>> {
        let started = Instant::now();
        let mut inserting = tokio::spawn(insert(Arc::clone(&self.store), Arc::clone(batch)));
        loop {
            tokio::select! {
                inserted = &mut inserting => {
                    histogram!("vmwatch_ingest_insert_seconds").record(started.elapsed().as_secs_f64());
                    return Some(inserted.unwrap_or_else(|defect| Err(MetricsError::Io(defect.into()))));
                }
                () = tokio::time::sleep(ACK_WAIT / 3) => batch.say_in_progress().await,
                () = shutdown.cancelled() => {
                    // A last chance, so that a stop under load rarely leaves a batch to be delivered again.
                    let last = tokio::time::timeout(LAST_CHANCE, &mut inserting).await.ok()?;
                    return Some(last.unwrap_or_else(|defect| Err(MetricsError::Io(defect.into()))));
                }
            }
        }
    }
}

/// Both collections at once; the documents that the database refuses for good.
async fn insert(store: Arc<RowStore>, batch: Arc<Batch>) -> Result<Refused, MetricsError> {
    let (vms, processes) = tokio::try_join!(
        store.insert(RowKind::Vm, &batch.documents.vms),
        store.insert(RowKind::Process, &batch.documents.processes)
    )?;
    Ok(Refused { vms, processes })
}

/// Documents that the database refused for good, with its words.
struct Refused {
    vms: Vec<(usize, String)>,
    processes: Vec<(usize, String)>,
}

impl Batch {
    /// Keeps JetStream from delivering the batch to another replica as well.
    async fn say_in_progress(&self) {
        for message in &self.messages {
            acknowledge(message, AckKind::Progress).await;
        }
    }

    /// By message rather than by document.
    fn refusals(&self, refused: Refused) -> Vec<(usize, String)> {
        let source = |sources: &[usize], (index, words): (usize, String)| {
            Some((*sources.get(index)?, format!("the database refused it: {words}")))
        };
        let vms = refused
            .vms
            .into_iter()
            .filter_map(|document| source(&self.vm_sources, document));
        let processes = refused
            .processes
            .into_iter()
            .filter_map(|document| source(&self.process_sources, document));
        vms.chain(processes).collect()
    }
}

async fn hand_over(batches: &mpsc::Sender<Batch>, batch: &mut Batch) {
    // The writer outlives the sender: it ends when the channel is closed.
    if !batch.messages.is_empty() && batches.send(std::mem::take(batch)).await.is_err() {
        warn!("the batch writer is gone: JetStream delivers the batch again");
    }
}

async fn acknowledge(message: &Message, kind: AckKind) {
    // A lost acknowledgement costs a redelivery, which the row's `_id` makes harmless.
    if let Err(error) = message.ack_with(kind).await {
        warn!(%error, "an acknowledgement could not be sent");
    }
}
