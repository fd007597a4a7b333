//! Documents that are written together, and the messages that they came from.

use async_nats::jetstream::{AckKind, Message};
use tracing::{Span, info_span, warn};
use vmwatch_api::metrics::SAMPLE_STREAM;
use vmwatch_bus::link_to_publisher;

use super::verdict::Verdict;
use crate::{
    MetricsError,
    documents::Documents,
    events::Events,
    history::marks::Marks,
    store::{RowKind, RowStore},
};

/// What OpenTelemetry keeps of a span's links by default; the publishers of further messages are not linked.
const MOST_LINKS: usize = 128;

/// Documents, each with the place of its message.
#[derive(Default)]
pub(super) struct Batch {
    documents: Documents,
    vm_sources: Vec<usize>,
    process_sources: Vec<usize>,
    messages: Vec<Message>,
    /// The last message whose agent has dropped parts.
    dropper: Option<usize>,
}

/// A document that the database did not store: the place of its message in the batch, and the database's code and words.
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

    /// How many parts agents have dropped, and the subject of the last of these agents.
    pub(super) fn dropped_by_agents(&self) -> Option<(u64, &str)> {
        let message = self.messages.get(self.dropper?)?;
        Some((self.documents.dropped_parts, message.subject.as_str()))
    }

    /// The span of all that is done with it, by OpenTelemetry's semantic conventions for messaging: a trace of its own,
    /// linked to the spans that published its messages.
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
        for message in self.messages.iter().take(MOST_LINKS) {
            link_to_publisher(&span, message.headers.as_ref());
        }
        span
    }

    /// Into both collections at once, with the marks that the rollups follow.
    pub(super) async fn insert(&self, store: &RowStore, marks: &Marks) -> Result<Vec<Refused>, MetricsError> {
        // All are waited for, also where one fails: a driver's call is not safe to drop half-way.
        let (vms, processes, marked) = tokio::join!(
            store.insert(RowKind::Vm, &self.documents.vms),
            store.insert(RowKind::Process, &self.documents.processes),
            marks.add(&self.documents.vms)
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

    /// Tells live readers of what is stored now.
    pub(super) fn tell(&self, events: &Events, verdicts: &[Verdict]) {
        let stored = |source: usize| verdicts.get(source) == Some(&Verdict::Stored);
        for (row, &source) in self.documents.vms.iter().zip(&self.vm_sources) {
            if stored(source) {
                events.tell_sample(row);
            }
        }
        let mut rows = self.documents.processes.as_slice();
        for sources in self.process_sources.chunk_by(|one, other| one == other) {
            let (of_one, rest) = rows.split_at_checked(sources.len()).unwrap_or((rows, &[]));
            if sources.first().is_some_and(|&source| stored(source)) {
                events.tell_processes(of_one);
            }
            rows = rest;
        }
    }

    /// Keeps JetStream from delivering the batch to another replica as well.
    pub(super) async fn say_in_progress(&self) {
        for message in &self.messages {
            acknowledge(message, AckKind::Progress).await;
        }
    }
}

pub(super) async fn acknowledge(message: &Message, kind: AckKind) {
    // A lost acknowledgement costs a redelivery, which the row's `_id` makes harmless.
    if let Err(error) = message.ack_with(kind).await {
        warn!(%error, "an acknowledgement could not be sent");
    }
}
