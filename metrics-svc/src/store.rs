//! The collections of rows in MongoDB: the blocks, and two flat collections with one document per row, which other
//! software has filled. Flat collections are only read.

use std::{
    future::IntoFuture,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bson::{Document, RawDocumentBuf, doc};
use mongodb::{
    Collection, Database, IndexModel,
    error::{ErrorKind, WriteFailure},
    options::{IndexOptions, InsertManyOptions},
};
use tokio::{sync::Semaphore, time::Instant};
use tracing::Instrument;
use vmwatch_api::{Service, time::UtcOffset};
use vmwatch_store::{StoreSettings, command_span};

pub use crate::row_kind::RowKind;
use crate::{
    MetricsError,
    blocks::{self, BlockEncoder, HourQueue},
    config::{RetentionSettings, RowSettings},
    database::find,
    deadline::Deadline,
    retention,
};

/// MongoDB error code for a duplicate key, which means that the row is stored already.
pub(crate) const DUPLICATE_KEY: i32 = 11_000;

/// The collection of dirty buckets, after the prefix of derived collections.
pub(crate) const DIRTY_BUCKETS: &str = "dirty_buckets";
/// The collection of the state of background work, after the prefix of derived collections.
pub(crate) const STATE: &str = "state";
/// Id of the document that exists once rollups and names contain the rows that were stored before these existed.
pub(crate) const REBUILT: &str = "rebuilt";

/// Maximum number of requests at once that decode more than a few blocks.
pub(crate) const LARGE_READS: usize = 4;

/// How long a cursor of a read may be open if the setting of compaction is not known.
const LONGEST_READ: Duration = Duration::from_secs(24);

/// A document that the database did not store when it was inserted with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unstored {
    /// Index of the document among those of the insert.
    pub index: usize,
    /// The database's error code.
    pub code: i32,
    /// The database's error message.
    pub words: String,
}

/// Access to the rows in the database.
pub struct RowStore {
    /// Collections for reads on behalf of requests.
    reads: RowCollections,
    /// Collections for writes, and for reads on which later writes depend.
    durable: RowCollections,
    offset: UtcOffset,
    encoder: Mutex<BlockEncoder>,
    /// The hours that compaction has work in.
    pub(crate) hours: HourQueue,
    /// How long a cursor of a read may be open.
    longest_read: Duration,
    /// Number of batches of samples that wait until the batch before them is written.
    waiting_batches: AtomicUsize,
    /// Permits of requests that decode more than a few blocks.
    pub(crate) large_reads: Arc<Semaphore>,
    /// When each flat collection is checked again for rows, and whether it had any.
    flat: [Mutex<FlatCheck>; 2],
    flat_check: Duration,
}

/// Whether a flat collection has rows.
#[derive(Debug, Default, Clone, Copy)]
struct FlatCheck {
    checked: Option<Instant>,
    has_rows: bool,
}

/// The collections of rows, accessed through one database client.
struct RowCollections {
    database: Database,
    blocks: Collection<RawDocumentBuf>,
    vms: Collection<RawDocumentBuf>,
    processes: Collection<RawDocumentBuf>,
}

impl RowStore {
    /// Opens the collections, without sending a command to the database yet.
    pub async fn open(store: &StoreSettings, rows: &RowSettings) -> Result<Self, MetricsError> {
        let name = Service::Metrics.name();
        // Acknowledged samples are deleted from the stream, so a write must be on the disks of a majority before that.
        let durable = store.open_durable(&format!("{name}-durable")).await?;
        let hours = durable.collection(&format!("{}_hours", rows.blocks));
        Ok(Self {
            reads: RowCollections::of(store.open(name).await?, rows),
            durable: RowCollections::of(durable, rows),
            hours: HourQueue::new(hours),
            longest_read: LONGEST_READ,
            waiting_batches: AtomicUsize::new(0),
            offset: rows.offset,
            encoder: Mutex::new(BlockEncoder::new(rows.offset.as_millis())?),
            large_reads: Arc::new(Semaphore::new(LARGE_READS)),
            flat: Default::default(),
            flat_check: rows.flat_check,
        })
    }

    /// Limits the time for which a cursor of a read may be open.
    #[must_use]
    pub(crate) const fn with_longest_read(mut self, longest_read: Duration) -> Self {
        self.longest_read = longest_read;
        self
    }

    /// How long a cursor of a read may be open.
    pub(crate) const fn longest_read(&self) -> Duration {
        self.longest_read
    }

    /// Counts a batch of samples as waiting while `handing_over` runs.
    pub(crate) async fn batch_waits<T>(&self, handing_over: impl Future<Output = T>) -> T {
        self.waiting_batches.fetch_add(1, Ordering::Relaxed);
        let handed_over = handing_over.await;
        self.waiting_batches.fetch_sub(1, Ordering::Relaxed);
        handed_over
    }

    /// Whether samples wait to be written, or as many requests as possible decode many blocks.
    pub(crate) fn is_busy(&self) -> bool {
        self.waiting_batches.load(Ordering::Relaxed) > 0 || self.large_reads.available_permits() == 0
    }

    /// Creates the indexes, and applies the retention settings to the collections.
    pub async fn prepare(&self, retention: &RetentionSettings) -> Result<(), MetricsError> {
        let index = |keys: Document, name: &str| {
            let options = IndexOptions::builder().name(name.to_owned()).build();
            IndexModel::builder().keys(keys).options(options).build()
        };
        let by_time = || {
            index(
                doc! { "instance_id": 1, "create_date": 1, "_id": 1 },
                "instance_date",
            )
        };
        let by_name = index(
            doc! { "instance_id": 1, "cmd": 1, "create_date": 1, "_id": 1 },
            "instance_cmd_date",
        );
        let RowCollections {
            database,
            blocks,
            vms,
            processes,
        } = &self.durable;
        blocks::prepare(blocks).await?;
        vms.create_index(by_time()).await?;
        processes.create_indexes([by_time(), by_name]).await?;
        retention::apply(database, vms, retention.vms).await?;
        retention::apply(database, processes, retention.processes).await
    }

    /// Returns the collection of blocks, for writes and for reads on which later writes depend.
    pub(crate) const fn blocks(&self) -> &Collection<RawDocumentBuf> {
        &self.durable.blocks
    }

    /// Returns the collection of blocks, for reads on behalf of requests.
    pub(crate) const fn reading_blocks(&self) -> &Collection<RawDocumentBuf> {
        &self.reads.blocks
    }

    /// Returns the flat collection of this kind of rows, for writes and for reads on which later writes depend; `None` if
    /// rows of this kind are only in blocks.
    pub const fn collection(&self, kind: RowKind) -> Option<&Collection<RawDocumentBuf>> {
        self.durable.collection(kind)
    }

    /// Returns the flat collection of this kind of rows, for reads on behalf of requests; `None` if rows of this kind are
    /// only in blocks.
    pub(crate) const fn reading(&self, kind: RowKind) -> Option<&Collection<RawDocumentBuf>> {
        self.reads.collection(kind)
    }

    /// Returns the flat collections, for writes and for reads on which later writes depend.
    pub(crate) fn flat_collections(&self) -> impl Iterator<Item = &Collection<RawDocumentBuf>> {
        RowKind::FLAT.into_iter().filter_map(|kind| self.collection(kind))
    }

    /// Opens a collection that is derived from the VM rows and named after their collection, such as `vm_samples_5m`.
    /// For writes and for reads on which later writes depend.
    pub(crate) fn beside<T: Send + Sync>(&self, suffix: &str) -> Collection<T> {
        self.durable.beside(suffix)
    }

    /// Opens a derived collection like [`RowStore::beside`], for reads on behalf of requests.
    pub(crate) fn reading_beside<T: Send + Sync>(&self, suffix: &str) -> Collection<T> {
        self.reads.beside(suffix)
    }

    /// The database itself, for commands that do not concern rows.
    pub(crate) const fn database(&self) -> &Database {
        &self.durable.database
    }

    /// Closes the connections to the database when a program ends.
    pub(crate) async fn close(&self) {
        tokio::join!(
            vmwatch_store::close(&self.reads.database),
            vmwatch_store::close(&self.durable.database)
        );
    }

    /// UTC offset of every `create_date`.
    pub(crate) const fn offset(&self) -> UtcOffset {
        self.offset
    }

    /// Encodes blocks. Nothing else may be awaited meanwhile, because there is one encoder.
    pub(crate) fn encode<T>(&self, encode: impl FnOnce(&mut BlockEncoder) -> T) -> T {
        encode(&mut self.encoder.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the flat collection of this kind of rows if it may have rows, for reads on which later writes depend if
    /// they are durable. It is checked at intervals, so that empty ones cost nothing.
    pub(crate) async fn flat_rows(
        &self,
        kind: RowKind,
        durable: bool,
        deadline: Deadline,
    ) -> Result<Option<&Collection<RawDocumentBuf>>, MetricsError> {
        let [vms, processes] = &self.flat;
        let check = match kind {
            RowKind::Vm => vms,
            RowKind::Process => processes,
            RowKind::Filesystem | RowKind::Hypervisor => return Ok(None),
        };
        let wanted = if durable {
            self.collection(kind)
        } else {
            self.reading(kind)
        };
        let Some(rows) = self.reading(kind) else {
            return Ok(None);
        };
        let known = *check.lock().unwrap_or_else(PoisonError::into_inner);
        if known
            .checked
            .is_some_and(|checked| checked.elapsed() < self.flat_check)
        {
            return Ok(wanted.filter(|_| known.has_rows));
        }
        let query = rows
            .find_one(doc! {})
            .projection(doc! { "_id": 1 })
            .max_time(deadline.left()?);
        let has_rows = find(rows, query).await?.is_some();
        *check.lock().unwrap_or_else(PoisonError::into_inner) = FlatCheck {
            checked: Some(Instant::now()),
            has_rows,
        };
        Ok(wanted.filter(|_| has_rows))
    }

    /// Inserts the documents of blocks, and notes their hours for compaction. A block that exists already counts as
    /// stored. Returns the documents that the database did not store.
    pub(crate) async fn insert_blocks(
        &self,
        documents: &[RawDocumentBuf],
    ) -> Result<Vec<Unstored>, MetricsError> {
        let unstored = insert(self.blocks(), documents).await?;
        self.hours.note(documents).await?;
        Ok(unstored)
    }

    /// Inserts flat rows that no block can hold, like [`RowStore::insert_blocks`].
    pub(crate) async fn insert_flat(
        &self,
        kind: RowKind,
        documents: &[RawDocumentBuf],
    ) -> Result<Vec<Unstored>, MetricsError> {
        match self.collection(kind) {
            Some(rows) => insert(rows, documents).await,
            None => Err(MetricsError::Refused(
                "rows of filesystems and hypervisors are only in blocks".to_owned(),
            )),
        }
    }
}

async fn insert(
    collection: &Collection<RawDocumentBuf>,
    documents: &[RawDocumentBuf],
) -> Result<Vec<Unstored>, MetricsError> {
    if documents.is_empty() {
        return Ok(Vec::new());
    }
    let unordered = InsertManyOptions::builder().ordered(false).build();
    let inserting = collection.insert_many(documents).with_options(unordered);
    let span = command_span("insert", collection.name());
    let Err(error) = inserting.into_future().instrument(span).await else {
        return Ok(Vec::new());
    };
    match *error.kind {
        ErrorKind::InsertMany(ref failed) if failed.write_concern_error.is_none() => {
            let write_errors = failed.write_errors.as_deref().unwrap_or_default();
            let real = write_errors.iter().filter(|write| write.code != DUPLICATE_KEY);
            let unstored = real.map(|write| Unstored {
                index: write.index,
                code: write.code,
                words: write.message.clone(),
            });
            Ok(unstored.collect())
        }
        ErrorKind::Write(WriteFailure::WriteError(ref write)) if write.code == DUPLICATE_KEY => {
            Ok(Vec::new())
        }
        _ => Err(error.into()),
    }
}

impl RowCollections {
    fn of(database: Database, rows: &RowSettings) -> Self {
        Self {
            blocks: database.collection(&rows.blocks),
            vms: database.collection(&rows.vms),
            processes: database.collection(&rows.processes),
            database,
        }
    }

    const fn collection(&self, kind: RowKind) -> Option<&Collection<RawDocumentBuf>> {
        match kind {
            RowKind::Vm => Some(&self.vms),
            RowKind::Process => Some(&self.processes),
            RowKind::Filesystem | RowKind::Hypervisor => None,
        }
    }

    fn beside<T: Send + Sync>(&self, suffix: &str) -> Collection<T> {
        self.database.collection(&format!("{}_{suffix}", self.vms.name()))
    }
}
