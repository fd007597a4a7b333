//! Deletes everything that is stored of a removed VM.
//!
//! Documents are deleted in batches, and the entry in the list of VMs last. If the deletion ends early, at its deadline
//! or because the service was killed, the VM is still listed, and a repetition of the request continues. Samples that
//! arrive later create the VM again.
//!
//! Background work that has read rows before the removal may write what it computed from them afterwards. A removal is
//! therefore recorded first, and repeated for this data later ([`leftovers`]).

mod leftovers;

use std::{sync::Arc, time::Duration};

use bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::Collection;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    InstanceId, Method,
    lifecycle::Target,
    removal::{HistoryRemove, Removed},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Context, audit::Audit};

use crate::{
    MetricsError,
    agent_status::AgentStatuses,
    database::find,
    deadline::Deadline,
    events::Events,
    history::{Histories, History},
    newest::NewestRows,
    store::RowStore,
};

/// Number of documents that are deleted together.
const BATCH: u32 = 1000;

/// Collection of recorded removals, after the prefix of derived collections.
const REMOVALS: &str = "removals";

/// Deletes derived data that background work wrote after the removal of a VM, until shutdown.
pub(crate) async fn follow(
    rows: Arc<RowStore>,
    histories: Histories,
    interval: Duration,
    shutdown: CancellationToken,
) {
    leftovers::follow(&rows, &histories, interval, &shutdown).await;
}

/// Deletes the history of VMs.
pub(crate) struct Removal {
    pub(crate) rows: Arc<RowStore>,
    pub(crate) histories: Histories,
    pub(crate) newest: Arc<NewestRows>,
    pub(crate) statuses: Arc<AgentStatuses>,
    pub(crate) audit: Audit,
    pub(crate) events: Events,
}

impl Removal {
    /// Deletes the history of a VM, with audit records before and after.
    pub(crate) async fn remove(self: Arc<Self>, context: Context, target: Target) -> Result<Removed, Fault> {
        let id = &target.instance_id;
        // The answer must reach the caller before its deadline.
        let deadline = Deadline::after(context.remaining() / 10 * 9);
        let mut records = 0;
        let deleting = self.delete(id, deadline, &mut records);
        let method = &HistoryRemove::INFO;
        let deleted = self
            .audit
            .announced(&context, method, id, String::new(), deleting);
        match deleted.await {
            Ok(()) => {
                self.newest.remove(id);
                self.statuses.forget(id).await;
                self.events.publish_removed(id);
                Ok(Removed { records })
            }
            Err(MetricsError::DeadlinePassed) => Err(Fault::new(
                FaultKind::Timeout,
                format!("{records} records were deleted and more are left; repeat the request to continue"),
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes all documents of a VM and adds their number to `records`.
    async fn delete(
        &self,
        id: &InstanceId,
        deadline: Deadline,
        records: &mut u64,
    ) -> Result<(), MetricsError> {
        let (rows, histories) = (&self.rows, &self.histories);
        leftovers::record(rows, id, deadline).await?;
        // Rollups and names are computed from rows that dirty buckets name, so neither is left when they are deleted.
        let dirty = histories.both().map(|history| history.dirty_buckets.documents());
        let parts = dirty.into_iter().chain([rows.blocks()]);
        for documents in parts.chain(rows.flat_collections()) {
            let filter = doc! { "instance_id": id.as_str() };
            delete_all(documents, &filter, deadline, records).await?;
        }
        for history in histories.both() {
            delete_derived(history, id, deadline, records).await?;
        }
        Ok(())
    }
}

/// Deletes the derived data of a VM: rollups and process names, and the entry in the list of VMs last.
async fn delete_derived(
    history: &History,
    id: &InstanceId,
    deadline: Deadline,
    records: &mut u64,
) -> Result<(), MetricsError> {
    let names = history.has_names().then(|| history.names.documents());
    let names = names.map(|names| (names, doc! { "instance_id": id.as_str() }));
    let entry = (history.instances.documents(), doc! { "_id": id.as_str() });
    let parts = names.into_iter().chain(history.rollup_documents(id));
    for (documents, filter) in parts.chain([entry]) {
        delete_all(documents, &filter, deadline, records).await?;
    }
    Ok(())
}

/// Deletes all documents that match a filter, in batches.
async fn delete_all(
    documents: &Collection<RawDocumentBuf>,
    filter: &Document,
    deadline: Deadline,
    records: &mut u64,
) -> Result<(), MetricsError> {
    loop {
        let query = documents
            .find(filter.clone())
            .projection(doc! { "_id": 1 })
            .limit(BATCH.into())
            .batch_size(BATCH)
            .max_time(deadline.left()?);
        let mut cursor = find(documents, query).await?;
        let mut ids = Vec::new();
        while cursor.advance().await? {
            let id = cursor.current().get("_id")?.map(Bson::try_from);
            ids.extend(id.transpose()?);
        }
        if ids.is_empty() {
            return Ok(());
        }
        *records += delete_batch(documents.clone(), ids, deadline).await?;
    }
}

/// Deletes the documents with these ids and returns their number. The command runs in a separate task, because dropping
/// a call of the MongoDB driver half-way is not safe.
async fn delete_batch(
    documents: Collection<RawDocumentBuf>,
    ids: Vec<Bson>,
    deadline: Deadline,
) -> Result<u64, MetricsError> {
    let deleting = async move { documents.delete_many(doc! { "_id": { "$in": ids } }).await };
    match timeout(deadline.left()?, tokio::spawn(deleting)).await {
        Ok(Ok(deleted)) => Ok(deleted?.deleted_count),
        Ok(Err(panic)) => Err(MetricsError::Io(panic.into())),
        Err(_) => Err(MetricsError::DeadlinePassed),
    }
}
