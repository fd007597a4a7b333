//! The rows of VMs and processes in MongoDB: two collections, with one flat document per row.

use std::{
    future::IntoFuture,
    time::{Duration, SystemTime},
};

use bson::{Document, RawBsonRef, RawDocument, RawDocumentBuf, doc, oid::ObjectId};
use mongodb::{
    Collection, Database, IndexModel,
    error::{ErrorKind, WriteFailure},
    options::{IndexOptions, InsertManyOptions},
};
use tracing::Instrument;
use vmwatch_api::{
    InstanceId, PageRoom, Service,
    metrics::{Limit, NextRows, PROCESS_ROW_KEYS, RowId, RowPage, RowPosition, Rows, VM_ROW_KEYS},
    time::{CreateDate, UtcOffset},
};
use vmwatch_store::{StoreSettings, command_span};

use crate::{
    MetricsError,
    config::{RetentionSettings, RowSettings},
    database::find,
    deadline::Deadline,
    instances::last_report,
    retention, row_json,
};

/// MongoDB error code for a duplicate key, which means that the row is stored already.
pub(crate) const DUPLICATE_KEY: i32 = 11_000;

/// Time ranges that [`RowStore::latest`] searches first. For a VM that reports every ten seconds, the shorter one
/// contains its newest ten rows.
const RECENT: [Duration; 2] = [Duration::from_mins(2), Duration::from_mins(30)];
/// Time ranges that [`RowStore::latest`] searches next: back from now or, if the VM is silent, from its last report.
const STEPS: [Duration; 5] = [
    Duration::from_mins(2),
    Duration::from_mins(30),
    Duration::from_hours(8),
    Duration::from_hours(144),
    Duration::from_hours(2400),
];

/// The two kinds of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowKind {
    /// Rows with the values of VMs.
    Vm,
    /// Rows with the values of processes.
    Process,
}

/// A query for the newest rows of a VM.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// Whether to read VM rows or process rows.
    pub kind: RowKind,
    /// The VM whose rows to read.
    pub instance: &'a InstanceId,
    /// Only rows of processes with this name.
    pub cmd: Option<&'a str>,
    /// Maximum number of rows in the answer.
    pub limit: Limit,
    /// Only rows that come after this row in the answer, so that they are older.
    pub before: Option<&'a RowPosition>,
}

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

/// A search for the newest rows, with the rows found so far.
struct Search<'a> {
    query: Query<'a>,
    /// Deadline of the whole search.
    deadline: Deadline,
    /// The rows found so far, as a JSON array without its closing bracket.
    rows: Vec<u8>,
    room: PageRoom,
    /// Date from which on the search has found all rows.
    before: Option<CreateDate>,
    /// The last row that was added to the page.
    last: LastRow,
    /// Whether a row was found that did not fit into the page.
    full: bool,
}

/// Date and id of a row, which mark the end of a page.
#[derive(Debug, Default)]
struct LastRow {
    create_date: String,
    id: Option<ObjectId>,
}

/// Access to the rows in the database.
pub struct RowStore {
    /// Collections for reads on behalf of requests.
    reads: RowCollections,
    /// Collections for writes, and for reads on which later writes depend.
    durable: RowCollections,
    offset: UtcOffset,
}

/// The collections of rows, accessed through one database client.
struct RowCollections {
    database: Database,
    vms: Collection<RawDocumentBuf>,
    processes: Collection<RawDocumentBuf>,
}

impl RowStore {
    /// Opens the collections, without sending a command to the database yet.
    pub async fn open(store: &StoreSettings, rows: &RowSettings) -> Result<Self, MetricsError> {
        let name = Service::Metrics.name();
        // Acknowledged samples are deleted from the stream, so a write must be on the disks of a majority before that.
        let durable = store.open_durable(&format!("{name}-durable")).await?;
        Ok(Self {
            reads: RowCollections::of(store.open(name).await?, rows),
            durable: RowCollections::of(durable, rows),
            offset: rows.offset,
        })
    }

    /// Creates the indexes, and applies the retention settings to the collections.
    pub async fn prepare(&self, retention: &RetentionSettings) -> Result<(), MetricsError> {
        let index = |keys: Document, name: &str| {
            let options = IndexOptions::builder().name(name.to_owned()).build();
            IndexModel::builder().keys(keys).options(options).build()
        };
        // The indexes are ascending although the newest rows are read first: MongoDB can read an index in both
        // directions, and the substitute for MongoDB in development limits a time range only in an ascending index.
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
            vms,
            processes,
        } = &self.durable;
        vms.create_index(by_time()).await?;
        processes.create_indexes([by_time(), by_name]).await?;
        retention::apply(database, vms, retention.vms).await?;
        retention::apply(database, processes, retention.processes).await
    }

    /// Returns the collection of this kind of rows, for writes and for reads on which later writes depend.
    pub const fn collection(&self, kind: RowKind) -> &Collection<RawDocumentBuf> {
        self.durable.collection(kind)
    }

    /// Returns the collection of VM rows or process rows, for reads on behalf of requests.
    pub(crate) const fn reading(&self, kind: RowKind) -> &Collection<RawDocumentBuf> {
        self.reads.collection(kind)
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

    /// Reads a page of the newest rows, newest first, as a JSON array in the documented key order.
    ///
    /// The search begins with the recent past and widens the time range until the page is full. For a silent VM it goes
    /// back from the VM's last report. The cost therefore depends on the size of the answer and not on the length of
    /// the history, whether the database reads an index in order or sorts all rows in range.
    pub async fn latest(&self, query: Query<'_>, deadline: Deadline) -> Result<RowPage, MetricsError> {
        let mut search = Search {
            query,
            deadline,
            rows: Vec::from(b"["),
            room: PageRoom::new(usize::from(query.limit.get())),
            before: None,
            last: LastRow::default(),
            full: false,
        };
        if let Some(position) = query.before {
            let filter = search.rows_of_one_date(position)?;
            self.read(&mut search, filter).await?;
            search.before = Some(position.create_date.clone());
        }
        let mut end = SystemTime::now();
        for back in RECENT {
            self.look(&mut search, end.checked_sub(back)).await?;
        }
        if search.rows.len() == 1 {
            end = last_report(self, query.instance, deadline).await?.unwrap_or(end);
        }
        for back in STEPS {
            self.look(&mut search, end.checked_sub(back)).await?;
        }
        self.look(&mut search, None).await?;
        search.into_page()
    }

    /// Adds the rows between this time (or the beginning of the history) and the oldest time searched so far.
    async fn look(&self, search: &mut Search<'_>, from: Option<SystemTime>) -> Result<(), MetricsError> {
        let from = from.map(|moment| CreateDate::at(moment, self.offset));
        let searched = from.is_some() && search.before.is_some() && from >= search.before;
        if searched {
            return Ok(());
        }
        let filter = search.filter(from.as_ref());
        self.read(search, filter).await?;
        search.before = from;
        Ok(())
    }

    /// Adds the rows that match a filter, newest first, until the page is full.
    async fn read(&self, search: &mut Search<'_>, filter: Document) -> Result<(), MetricsError> {
        if search.is_over() {
            return Ok(());
        }
        let rows_of = self.reading(search.query.kind);
        let most = i64::try_from(search.room.items()).unwrap_or(i64::MAX);
        let query = rows_of
            .find(filter)
            .sort(doc! { "create_date": -1, "_id": -1 })
            .limit(most)
            .batch_size(u32::try_from(most).unwrap_or(u32::MAX))
            .max_time(search.deadline.left()?);
        let mut cursor = find(rows_of, query).await?;
        while !search.is_over() && cursor.advance().await? {
            search.add(cursor.current())?;
        }
        Ok(())
    }

    /// Inserts documents. A document that exists already counts as stored. Returns the documents that the database did
    /// not store.
    pub async fn insert(
        &self,
        kind: RowKind,
        documents: &[RawDocumentBuf],
    ) -> Result<Vec<Unstored>, MetricsError> {
        if documents.is_empty() {
            return Ok(Vec::new());
        }
        let unordered = InsertManyOptions::builder().ordered(false).build();
        let collection = self.collection(kind);
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
}

impl RowCollections {
    fn of(database: Database, rows: &RowSettings) -> Self {
        Self {
            vms: database.collection(&rows.vms),
            processes: database.collection(&rows.processes),
            database,
        }
    }

    const fn collection(&self, kind: RowKind) -> &Collection<RawDocumentBuf> {
        match kind {
            RowKind::Vm => &self.vms,
            RowKind::Process => &self.processes,
        }
    }

    fn beside<T: Send + Sync>(&self, suffix: &str) -> Collection<T> {
        self.database.collection(&format!("{}_{suffix}", self.vms.name()))
    }
}

impl Search<'_> {
    const fn is_over(&self) -> bool {
        self.full || self.room.items() == 0
    }

    /// Adds a row if it fits into the page.
    fn add(&mut self, row: &RawDocument) -> Result<(), MetricsError> {
        let before = self.rows.len();
        let rows = &mut self.rows;
        if before > 1 {
            rows.push(b',');
        }
        match self.query.kind {
            RowKind::Vm => row_json::push_row(rows, row, &VM_ROW_KEYS)?,
            RowKind::Process => row_json::push_row(rows, row, &PROCESS_ROW_KEYS)?,
        }
        if self.room.take(rows.len() - before) {
            self.last.set(row)
        } else {
            rows.truncate(before);
            self.full = true;
            Ok(())
        }
    }

    fn into_page(mut self) -> Result<RowPage, MetricsError> {
        self.rows.push(b']');
        let text = String::from_utf8(self.rows)
            .map_err(|error| MetricsError::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))?;
        let next = Limit::new(self.room.items() as u64).filter(|_| self.full);
        Ok(RowPage {
            rows: Rows::from_json(text)?,
            next: match next {
                Some(limit) => Some(NextRows {
                    limit,
                    before: self.last.position()?,
                }),
                None => None,
            },
        })
    }

    /// Filter for the rows that have the date of this row and come after it in the answer.
    fn rows_of_one_date(&self, position: &RowPosition) -> Result<Document, MetricsError> {
        let id: ObjectId = position.id.as_str().parse().map_err(|_| MetricsError::NoCursor)?;
        let mut filter = self.filter(None);
        filter.insert("create_date", position.create_date.as_str());
        filter.insert("_id", doc! { "$lt": id });
        Ok(filter)
    }

    /// Filter for the rows that have not been searched yet, from this date on.
    fn filter(&self, from: Option<&CreateDate>) -> Document {
        let mut filter = doc! { "instance_id": self.query.instance.as_str() };
        if let Some(cmd) = self.query.cmd {
            filter.insert("cmd", cmd);
        }
        let mut range = Document::new();
        if let Some(from) = from {
            range.insert("$gte", from.as_str());
        }
        if let Some(before) = &self.before {
            range.insert("$lt", before.as_str());
        }
        if !range.is_empty() {
            filter.insert("create_date", range);
        }
        filter
    }
}

impl LastRow {
    fn set(&mut self, row: &RawDocument) -> Result<(), MetricsError> {
        let date = row.get("create_date")?.and_then(RawBsonRef::as_str);
        date.unwrap_or_default().clone_into(&mut self.create_date);
        self.id = row.get("_id")?.and_then(RawBsonRef::as_object_id);
        Ok(())
    }

    fn position(&self) -> Result<RowPosition, MetricsError> {
        let id = self.id.and_then(|id| RowId::new(&id.to_hex()));
        Ok(RowPosition {
            create_date: self.create_date.parse().map_err(|_| MetricsError::NoCursor)?,
            id: id.ok_or(MetricsError::NoCursor)?,
        })
    }
}
