//! Rows as one document each, as the software of 2017 stored them: what vmwatch is compared with.

use std::{sync::Arc, time::Duration};

use bson::{Document, RawDocumentBuf, doc};
use futures::{StreamExt, TryStreamExt, stream};
use metrics_svc::documents::Documents;
use mongodb::{
    Collection, Database, IndexModel,
    options::{Acknowledgment, CollectionOptions, IndexOptions, WriteConcern},
};

/// Number of rows that are inserted together.
const BATCH_ROWS: usize = 2000;
/// A retention that deletes no rows.
const KEPT: Duration = Duration::from_hours(24 * 365 * 50);

/// Two collections with one document per row, with the indexes that vmwatch had when it stored rows this way.
#[derive(Clone)]
pub(crate) struct FlatRows {
    vms: Collection<RawDocumentBuf>,
    processes: Collection<RawDocumentBuf>,
}

impl FlatRows {
    /// Opens the collections; their names begin with `prefix`.
    pub(crate) fn open(database: &Database, prefix: &str) -> Self {
        let concern = WriteConcern::builder()
            .w(Acknowledgment::Majority)
            .journal(true)
            .build();
        let options = CollectionOptions::builder().write_concern(concern).build();
        let collection =
            |name: &str| database.collection_with_options(&format!("{prefix}{name}"), options.clone());
        Self {
            vms: collection("vm_samples"),
            processes: collection("process_samples"),
        }
    }

    /// Creates the indexes.
    pub(crate) async fn prepare(&self) -> anyhow::Result<()> {
        let index = |keys: Document| IndexModel::builder().keys(keys).build();
        let by_time = || index(doc! { "instance_id": 1, "create_date": 1, "_id": 1 });
        let by_name = index(doc! { "instance_id": 1, "cmd": 1, "create_date": 1, "_id": 1 });
        let retention = || {
            let expires = IndexOptions::builder().expire_after(KEPT).build();
            IndexModel::builder()
                .keys(doc! { "sampled_at": 1 })
                .options(expires)
                .build()
        };
        self.vms.create_indexes([by_time(), retention()]).await?;
        self.processes
            .create_indexes([by_time(), by_name, retention()])
            .await?;
        Ok(())
    }

    /// Inserts documents in batches, of which `concurrency` are written at the same time.
    pub(crate) async fn insert(&self, batches: &[Arc<Documents>], concurrency: usize) -> anyhow::Result<()> {
        stream::iter(batches.iter().cloned())
            .map(|batch| tokio::spawn(self.clone().insert_batch(batch)))
            .buffer_unordered(concurrency)
            .map_err(anyhow::Error::from)
            .try_for_each(async |inserted| inserted.map_err(anyhow::Error::from))
            .await
    }

    /// Inserts a batch into both collections concurrently, as metrics-svc did.
    async fn insert_batch(self, batch: Arc<Documents>) -> mongodb::error::Result<()> {
        let into = async |collection: &Collection<RawDocumentBuf>, documents: &[_]| {
            if documents.is_empty() {
                return Ok(());
            }
            collection.insert_many(documents).ordered(false).await.map(drop)
        };
        let (vms, processes) = tokio::join!(
            into(&self.vms, &batch.vms),
            into(&self.processes, &batch.processes)
        );
        vms.and(processes)
    }

    /// Number of stored process rows.
    pub(crate) async fn process_rows(&self) -> anyhow::Result<u64> {
        Ok(self.processes.count_documents(doc! {}).await?)
    }
}

/// Divides documents into batches.
pub(crate) fn batches(documents: impl IntoIterator<Item = Documents>) -> Vec<Arc<Documents>> {
    let (mut batches, mut batch) = (Vec::new(), Documents::default());
    for documents in documents {
        batch.vms.extend(documents.vms);
        batch.processes.extend(documents.processes);
        if batch.rows() >= BATCH_ROWS {
            batches.push(Arc::new(std::mem::take(&mut batch)));
        }
    }
    batches.push(Arc::new(batch));
    batches
}
