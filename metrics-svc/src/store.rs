//! The rows in MongoDB: two collections, one flat document a row.

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
    metrics::{Limit, NextRows, PROCESS_ROW_KEYS, RowId, RowPage, RowPlace, Rows, VM_ROW_KEYS},
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

/// The code of a unique index that says no: the row is stored already.
pub(crate) const DUPLICATE_KEY: i32 = 11_000;

/// How far back [`RowStore::latest`] looks first. A VM that reports each ten seconds has its newest ten rows in the
/// shorter.
const RECENT: [Duration; 2] = [Duration::from_mins(2), Duration::from_mins(30)];
/// How far back it looks then: from now, or from the last report of a VM that is silent.
const STEPS: [Duration; 5] = [
    Duration::from_mins(2),
    Duration::from_mins(30),
    Duration::from_hours(8),
    Duration::from_hours(144),
    Duration::from_hours(2400),
];

/// Which rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowKind {
    /// Of VMs.
    Vm,
    /// Of processes.
    Process,
}

/// Asks for the newest rows.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// Which rows.
    pub kind: RowKind,
    /// Of which VM.
    pub instance: &'a InstanceId,
    /// Of processes of this name only.
    pub cmd: Option<&'a str>,
    /// At most how many.
    pub limit: Limit,
    /// Only rows behind this place.
    pub before: Option<&'a RowPlace>,
}

/// A document of an insert that the database did not store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unstored {
    /// Its place among the documents of the insert.
    pub index: usize,
    /// MongoDB's error code.
    pub code: i32,
    /// The database's words.
    pub words: String,
}

/// The newest rows as far as they are found.
struct Search<'a> {
    query: Query<'a>,
    /// The deadline of each command.
    deadline: Deadline,
    /// A JSON array that is not closed yet.
    rows: Vec<u8>,
    room: PageRoom,
    /// From here on all is found.
    before: Option<CreateDate>,
    /// The last row of the page.
    last: LastRow,
    /// Whether a row was found that the page has no room for.
    full: bool,
}

/// What the place of a row is made of.
#[derive(Debug, Default)]
struct LastRow {
    create_date: String,
    id: Option<ObjectId>,
}

/// The rows in the database.
pub struct RowStore {
    /// For reads on behalf of requests.
    reads: RowCollections,
    /// For writes and for reads that later writes rest on.
    durable: RowCollections,
    offset: UtcOffset,
}

/// The collections of rows over one client.
struct RowCollections {
    database: Database,
    vms: Collection<RawDocumentBuf>,
    processes: Collection<RawDocumentBuf>,
}

impl RowStore {
    /// Prepares the collections; nothing is asked of the database yet.
    pub async fn open(store: &StoreSettings, rows: &RowSettings) -> Result<Self, MetricsError> {
        let name = Service::Metrics.name();
        // An acknowledged sample is on the disk of a majority: it is deleted from the stream after that.
        let durable = store.open_durable(&format!("{name}-durable")).await?;
        Ok(Self {
            reads: RowCollections::of(store.open(name).await?, rows),
            durable: RowCollections::of(durable, rows),
            offset: rows.offset,
        })
    }

    /// Makes the indexes, and fits the retention to the settings.
    pub async fn prepare(&self, retention: &RetentionSettings) -> Result<(), MetricsError> {
        let index = |keys: Document, name: &str| {
            let options = IndexOptions::builder().name(name.to_owned()).build();
            IndexModel::builder().keys(keys).options(options).build()
        };
        // Ascending, although the newest are asked for first: MongoDB walks an index either way, and the stand-in of
        // development bounds a range of time only in an ascending one.
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

    /// The collection of a kind, for writes and for reads that later writes rest on.
    pub const fn collection(&self, kind: RowKind) -> &Collection<RawDocumentBuf> {
        self.durable.collection(kind)
    }

    /// The collection of a kind, for reads on behalf of requests.
    pub(crate) const fn reading(&self, kind: RowKind) -> &Collection<RawDocumentBuf> {
        self.reads.collection(kind)
    }

    /// A collection that is kept beside the VM rows and made of them: `vm_samples_5m`, where those are `vm_samples`; for
    /// writes and for reads that later writes rest on.
    pub(crate) fn beside<T: Send + Sync>(&self, suffix: &str) -> Collection<T> {
        self.durable.beside(suffix)
    }

    /// As [`RowStore::beside`], for reads on behalf of requests.
    pub(crate) fn reading_beside<T: Send + Sync>(&self, suffix: &str) -> Collection<T> {
        self.reads.beside(suffix)
    }

    /// The database itself, for commands that are not about rows.
    pub(crate) const fn database(&self) -> &Database {
        &self.durable.database
    }

    /// Ends the connections, at the end of a program.
    pub(crate) async fn close(&self) {
        tokio::join!(
            vmwatch_store::close(&self.reads.database),
            vmwatch_store::close(&self.durable.database)
        );
    }

    /// The offset of every `create_date`.
    pub(crate) const fn offset(&self) -> UtcOffset {
        self.offset
    }

    /// A page of the newest rows, newest first, as a JSON array in the documented key order.
    ///
    /// It asks for the recent past first and widens the range until it has enough; of a VM that is silent it looks
    /// back from the last report. So the cost depends on what is answered, not on the length of the history, on a
    /// database that walks the index in order and on one that sorts what is in range.
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
        if let Some(place) = query.before {
            let filter = search.rows_of_one_date(place)?;
            self.read(&mut search, filter).await?;
            search.before = Some(place.create_date.clone());
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

    /// Adds what is missing from a range that begins then, or at the beginning of all, and ends where the search has
    /// come to.
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

    /// Adds the rows that pass a filter, newest first, until the page has no room for more.
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

    /// Stores documents; those that are stored already count as stored. The documents that the database did not store come
    /// back.
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

    /// Adds a row, if the page has room for it.
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
                    before: self.last.place()?,
                }),
                None => None,
            },
        })
    }

    /// The rows of the date of this place that come behind it.
    fn rows_of_one_date(&self, place: &RowPlace) -> Result<Document, MetricsError> {
        let id: ObjectId = place.id.as_str().parse().map_err(|_| MetricsError::NoCursor)?;
        let mut filter = self.filter(None);
        filter.insert("create_date", place.create_date.as_str());
        filter.insert("_id", doc! { "$lt": id });
        Ok(filter)
    }

    /// What is not found yet, from a date on.
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

    fn place(&self) -> Result<RowPlace, MetricsError> {
        let id = self.id.and_then(|id| RowId::new(&id.to_hex()));
        Ok(RowPlace {
            create_date: self.create_date.parse().map_err(|_| MetricsError::NoCursor)?,
            id: id.ok_or(MetricsError::NoCursor)?,
        })
    }
}
