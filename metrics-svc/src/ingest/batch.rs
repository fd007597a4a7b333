//! A batch of documents that are written to the database together, with the messages that they came from.

use async_nats::jetstream::{AckKind, Message};
use tracing::{Span, info_span, warn};
use vmwatch_api::metrics::SAMPLE_STREAM;
use vmwatch_bus::link_to_publisher;

use super::verdict::Verdict;
use crate::{
    MetricsError,
    documents::Documents,
    events::Events,
    history::dirty_buckets::DirtyBuckets,
    store::{RowKind, RowStore},
};

/// Maximum number of span links of a batch: OpenTelemetry's default. The publishers of further messages are not linked.
const MAX_LINKS: usize = 128;

/// Documents, each with the index of the message that it came from.
#[derive(Default)]
pub(super) struct Batch {
    documents: Documents,
    vm_sources: Vec<usize>,
    process_sources: Vec<usize>,
    messages: Vec<Message>,
    /// Index, within the batch, of the last message in which an agent reported that it had dropped sample parts.
    dropper: Option<usize>,
}

/// A document that the database refused: the index of its message, and the database's error code and message.
pub(super) struct Refused {
    pub(super) source: usize,
    pub(super) code: i32,
    pub(super) words: String,
}

impl Batch {
    pub(super) fn rows(&self) -> usize {
        self.vm_sources.len() + self.process_sources.len()
    }

    pub(super) fn messages(&self) -> &[Message] {
        &self.messages
    }

    pub(super) fn add(&mut self, documents: Documents, message: Message) {
        let source = self.messages.len();
        self.vm_sources.extend(documents.vms.iter().map(|_| source));
        self.process_sources
            .extend(documents.processes.iter().map(|_| source));
        self.documents.vms.extend(documents.vms);
        self.documents.processes.extend(documents.processes);
        if documents.dropped_parts > 0 {
            self.documents.dropped_parts += documents.dropped_parts;
            self.dropper = Some(source);
        }
        self.messages.push(message);
    }

    /// Returns the number of parts that agents reported as dropped, and the subject of the last message that reported
    /// any.
    pub(super) fn dropped_by_agents(&self) -> Option<(u64, &str)> {
        let message = self.messages.get(self.dropper?)?;
        Some((self.documents.dropped_parts, message.subject.as_str()))
    }

    /// Creates the tracing span for processing the batch, by OpenTelemetry's semantic conventions for messaging: a new
    /// trace that is linked to the spans that published the messages.
    pub(super) fn span(&self) -> Span {
        let span = info_span!(
            parent: None,
            "batch",
            otel.name = format!("process {SAMPLE_STREAM}"),
            otel.kind = "consumer",
            messaging.system = "nats",
            messaging.operation.name = "process",
            messaging.operation.type = "process",
            messaging.destination.name = SAMPLE_STREAM,
            messaging.batch.message_count = self.messages.len(),
        );
        for message in self.messages.iter().take(MAX_LINKS) {
            link_to_publisher(&span, message.headers.as_ref());
        }
        span
    }

    /// Inserts the VM rows and the process rows and adds the dirty buckets, all three concurrently.
    pub(super) async fn insert(
        &self,
        store: &RowStore,
        dirty_buckets: &DirtyBuckets,
    ) -> Result<Vec<Refused>, MetricsError> {
        // Wait for all three even if one fails, because dropping a call of the MongoDB driver half-way is not safe.
        let (vms, processes, marked) = tokio::join!(
            store.insert(RowKind::Vm, &self.documents.vms),
            store.insert(RowKind::Process, &self.documents.processes),
            dirty_buckets.add(&self.documents.vms)
        );
        marked?;
        let vms = vms?.into_iter().map(|refused| (&self.vm_sources, refused));
        let processes = processes?
            .into_iter()
            .map(|refused| (&self.process_sources, refused));
        let refused = vms.chain(processes).filter_map(|(sources, unstored)| {
            Some(Refused {
                source: *sources.get(unstored.index)?,
                code: unstored.code,
                words: unstored.words,
            })
        });
        Ok(refused.collect())
    }

    /// Publishes live events about the stored rows.
    pub(super) fn publish_events(&self, events: &Events, verdicts: &[Verdict]) {
        let stored = |source: usize| verdicts.get(source) == Some(&Verdict::Stored);
        for (row, &source) in self.documents.vms.iter().zip(&self.vm_sources) {
            if stored(source) {
                events.publish_sample(row);
            }
        }
        let mut rows = self.documents.processes.as_slice();
        for sources in self.process_sources.chunk_by(|one, other| one == other) {
            let (of_one, rest) = rows.split_at_checked(sources.len()).unwrap_or((rows, &[]));
            if sources.first().is_some_and(|&source| stored(source)) {
                events.publish_processes(of_one);
            }
            rows = rest;
        }
    }

    /// Tells JetStream that the batch is still being processed, so that it does not redeliver the batch.
    pub(super) async fn extend_ack_wait(&self) {
        for message in &self.messages {
            acknowledge(message, AckKind::Progress).await;
        }
    }
}

pub(super) async fn acknowledge(message: &Message, kind: AckKind) {
    // A lost acknowledgement only causes a redelivery, which is harmless because the rows have stable ids.
    if let Err(error) = message.ack_with(kind).await {
        warn!(%error, "acknowledging a sample message failed; JetStream will redeliver it");
    }
}
