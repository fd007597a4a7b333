//! A batch of rows that are written to the database together, with the messages that they came from.

use std::borrow::Cow;

use async_nats::jetstream::{AckKind, Message};
use bson::RawDocumentBuf;
use metrics::counter;
use tracing::{Span, info_span, warn};
use vmwatch_api::{alerts::evaluation::EvaluationRecord, metrics::SAMPLE_STREAM};
use vmwatch_bus::link_to_publisher;

use super::{
    arrivals::{self, ahead_key},
    verdict::{BAD_VALUE, Verdict},
};
use crate::{
    MetricsError, blocks,
    documents::Documents,
    evaluation::{WatchedTable, record},
    events::Events,
    history::Histories,
    row_retention::RowRetention,
    store::{RowKind, RowStore},
};

/// Maximum number of span links of a batch: OpenTelemetry's default. The publishers of further messages are not linked.
const MAX_LINKS: usize = 128;

/// Messages and the documents of their rows.
#[derive(Default)]
pub(super) struct Batch {
    documents: Vec<Documents>,
    messages: Vec<Message>,
    rows: usize,
    bytes: usize,
    dropped_parts: Losses,
    lost_exit_records: Losses,
}

/// What agents report as lost.
#[derive(Default)]
struct Losses {
    count: u64,
    /// Index, within the batch, of the last message that reported any.
    last: Option<usize>,
}

/// A block that was not stored: the index of its message, its number of rows, and the database's error code and message.
pub(super) struct Refused {
    pub(super) source: usize,
    pub(super) rows: usize,
    pub(super) code: i32,
    pub(super) words: String,
}

/// The blocks of a batch, each with the index of its message and its number of rows.
#[derive(Default)]
struct Blocks {
    documents: Vec<RawDocumentBuf>,
    sources: Vec<(usize, usize)>,
    refused: Vec<Refused>,
}

impl Losses {
    fn add(&mut self, count: u64, message: usize) {
        if count > 0 {
            self.count = self.count.saturating_add(count);
            self.last = Some(message);
        }
    }

    /// The number of losses, and the subject of the last message that reported any.
    fn of<'a>(&self, messages: &'a [Message]) -> Option<(u64, &'a str)> {
        let message = messages.get(self.last?)?;
        Some((self.count, message.subject.as_str()))
    }
}

impl Batch {
    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    /// Number of bytes of the messages.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn messages(&self) -> &[Message] {
        &self.messages
    }

    pub(super) fn add(&mut self, documents: Documents, message: Message) {
        self.rows += documents.rows();
        self.bytes += message.payload.len();
        self.dropped_parts
            .add(documents.dropped_parts, self.messages.len());
        self.lost_exit_records
            .add(documents.lost_exit_records, self.messages.len());
        self.documents.push(documents);
        self.messages.push(message);
    }

    /// Returns the number of parts that agents reported as dropped, and the subject of the last message that reported
    /// any.
    pub(super) fn dropped_by_agents(&self) -> Option<(u64, &str)> {
        self.dropped_parts.of(&self.messages)
    }

    /// Returns the number of times that agents lost records of ended processes, and the subject of the last message that
    /// reported any.
    pub(super) fn exit_records_lost_by_agents(&self) -> Option<(u64, &str)> {
        self.lost_exit_records.of(&self.messages)
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

    /// Inserts the rows as blocks, and adds the dirty buckets.
    pub(super) async fn insert(
        &self,
        store: &RowStore,
        histories: &Histories,
    ) -> Result<Vec<Refused>, MetricsError> {
        let mut new = Vec::with_capacity(self.documents.len());
        for documents in &self.documents {
            new.push(if documents.far_ahead {
                Cow::Owned(arrivals::new_rows(store, documents).await?)
            } else {
                Cow::Borrowed(documents)
            });
        }
        let mut blocks = Blocks::default();
        for (source, documents) in new.iter().enumerate() {
            for kind in RowKind::ALL {
                blocks.add(store, &histories.agent.retention, source, kind, documents)?;
            }
        }
        // Wait for all even if one fails, because dropping a call of the MongoDB driver half-way is not safe.
        let Histories { agent, hypervisor } = histories;
        let (unstored, of_agents, of_hypervisors) = tokio::join!(
            store.insert_blocks(&blocks.documents),
            agent.dirty_buckets.add(&new),
            hypervisor.dirty_buckets.add(&new)
        );
        of_agents?;
        of_hypervisors?;
        let mut refused = blocks.refused;
        refused.extend(unstored?.into_iter().filter_map(|unstored| {
            let &(source, rows) = blocks.sources.get(unstored.index)?;
            Some(Refused {
                source,
                rows,
                code: unstored.code,
                words: unstored.words,
            })
        }));
        Ok(refused)
    }

    /// Publishes live events about the stored rows, and counts those that were not stored because they had expired.
    pub(super) fn publish_events(&self, events: &Events, verdicts: &[Verdict]) {
        let stored = self.documents.iter().zip(verdicts);
        for (documents, _) in stored.filter(|(_, verdict)| **verdict == Verdict::Stored) {
            for row in &documents.vms {
                events.publish_sample(row, documents.sender);
            }
            for row in &documents.hypervisor {
                events.publish_hypervisor_sample(row);
            }
            if !documents.processes.is_empty() {
                events.publish_processes(&documents.processes);
            }
            if let Some(expired) = &documents.expired {
                counter!("vmwatch_rows_expired_total").increment(expired.count);
                if let Some(event) = &expired.event {
                    events.publish_unstored(event.clone());
                }
            }
        }
    }

    /// Makes the evaluation records of the stored messages.
    pub(super) fn evaluations(&self, verdicts: &[Verdict], watched: &WatchedTable) -> Vec<EvaluationRecord> {
        let stored = self.documents.iter().zip(verdicts);
        stored
            .filter(|(_, verdict)| **verdict == Verdict::Stored)
            .filter_map(|(documents, _)| record(documents, watched))
            .collect()
    }

    /// Tells JetStream that the batch is still being processed, so that it does not redeliver the batch.
    pub(super) async fn extend_ack_wait(&self) {
        for message in &self.messages {
            acknowledge(message, AckKind::Progress).await;
        }
    }
}

impl Blocks {
    /// Adds the block of a message's rows of one kind.
    fn add(
        &mut self,
        store: &RowStore,
        retention: &RowRetention,
        source: usize,
        kind: RowKind,
        message: &Documents,
    ) -> Result<(), MetricsError> {
        let documents = message.of(kind);
        let Some(first) = documents.first() else {
            return Ok(());
        };
        let instance = first.get_str("instance_id")?;
        let id = instance
            .parse()
            .map_err(|_| MetricsError::Refused("a row has an invalid `instance_id`".to_owned()))?;
        let keep = retention.of(kind, &id);
        let block = store.encode(|encoder| {
            let mut rows = encoder.rows(kind, instance);
            for document in documents {
                if let Err(unfit) = blocks::push(&mut rows, document, message.arrival) {
                    return Ok(Err(unfit));
                }
            }
            encoder.encode(kind, instance, &rows, Some(keep)).map(Ok)
        })?;
        match block {
            Ok(Some(mut block)) => {
                if message.far_ahead {
                    block.append(bson::cstr!("ahead"), ahead_key(kind, first)?);
                }
                self.documents.push(block);
                self.sources.push((source, documents.len()));
            }
            Ok(None) => {}
            Err(unfit) => self.refused.push(Refused {
                source,
                rows: documents.len(),
                code: BAD_VALUE,
                words: unfit.to_string(),
            }),
        }
        Ok(())
    }
}

pub(super) async fn acknowledge(message: &Message, kind: AckKind) {
    // A lost acknowledgement only causes a redelivery, which is harmless because the rows have stable ids.
    if let Err(error) = message.ack_with(kind).await {
        warn!(%error, "acknowledging a sample message failed; JetStream will redeliver it");
    }
}
