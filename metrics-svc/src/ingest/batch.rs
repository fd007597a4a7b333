//! Documents that are written together, and the messages that they came from.

use async_nats::jetstream::{AckKind, Message};
use tracing::warn;

use crate::{
    MetricsError,
    documents::Documents,
    store::{RowKind, RowStore},
};

/// Documents, each with the place of its message.
#[derive(Default)]
pub(super) struct Batch {
    documents: Documents,
    vm_sources: Vec<usize>,
    process_sources: Vec<usize>,
    messages: Vec<Message>,
}

/// A message of a batch, by its place, that holds a document which the database refuses, and the database's words.
pub(super) struct Refused {
    pub(super) source: usize,
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
        self.messages.push(message);
    }

    /// Into both collections at once.
    pub(super) async fn insert(&self, store: &RowStore) -> Result<Vec<Refused>, MetricsError> {
        // Both are waited for, also where one fails: a driver's call is not safe to drop half-way.
        let (vms, processes) = tokio::join!(
            store.insert(RowKind::Vm, &self.documents.vms),
            store.insert(RowKind::Process, &self.documents.processes)
        );
        let vms = vms?.into_iter().map(|refused| (&self.vm_sources, refused));
        let processes = processes?
            .into_iter()
            .map(|refused| (&self.process_sources, refused));
        let refused = vms.chain(processes).filter_map(|(sources, (index, words))| {
            let source = *sources.get(index)?;
            Some(Refused { source, words })
        });
        Ok(refused.collect())
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
