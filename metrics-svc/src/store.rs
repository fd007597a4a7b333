//! The rows in MongoDB: two collections, one flat document a row.

use std::{
    future::IntoFuture,
    time::{Duration, SystemTime},
};

use bson::{Document, RawDocumentBuf, doc};
use mongodb::{
    Collection, Database, IndexModel,
    error::{ErrorKind, WriteFailure},
    options::{CollectionOptions, IndexOptions, InsertManyOptions, WriteConcern},
};
use shared::{
    api::{
        InstanceId, Service,
        metrics::{Limit, PROCESS_ROW_KEYS, Rows, VM_ROW_KEYS},
    },
    store::{StoreSettings, command_span},
    time::{CreateDate, UtcOffset},
};
use tracing::Instrument;

use crate::{
    MetricsError,
    config::{RetentionSettings, RowSettings},
    database::find,
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
}

/// The newest rows as far as they are found.
struct Search<'a> {
    query: Query<'a>,
    /// The deadline of each command.
    limit: Duration,
    /// A JSON array that is not closed yet.
    rows: Vec<u8>,
    missing: usize,
    /// From here on all is found.
    before: Option<CreateDate>,
}

/// The rows in the database.
pub struct RowStore {
    database: Database,
    vms: Collection<RawDocumentBuf>,
    processes: Collection<RawDocumentBuf>,
    durable: CollectionOptions,
    offset: UtcOffset,
}

impl RowStore {
    /// Prepares the collections; nothing is asked of the database yet.
    pub async fn open(store: &StoreSettings, rows: &RowSettings) -> Result<Self, MetricsError> {
        let database = store.open(Service::Metrics.name()).await?;
        // An acknowledged sample is on the disk of a majority: it is deleted from the stream after that.
        let mut durable = WriteConcern::majority();
        durable.journal = Some(true);
        let durable = CollectionOptions::builder().write_concern(durable).build();
        let collection = |name: &str| database.collection_with_options(name, durable.clone());
        let (vms, processes) = (collection(&rows.vms), collection(&rows.processes));
        Ok(Self {
            vms,
            processes,
            database,
            durable,
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
        self.vms.create_index(by_time()).await?;
        self.processes.create_indexes([by_time(), by_name]).await?;
        retention::apply(&self.database, &self.vms, retention.vms).await?;
        retention::apply(&self.database, &self.processes, retention.processes).await
    }

    /// The collection of a kind.
    pub const fn collection(&self, kind: RowKind) -> &Collection<RawDocumentBuf> {
        match kind {
            RowKind::Vm => &self.vms,
            RowKind::Process => &self.processes,
        }
    }

    /// A collection that is kept beside the VM rows and made of them: `vm_samples_5m`, where those are `vm_samples`.
    pub(crate) fn beside<T: Send + Sync>(&self, suffix: &str) -> Collection<T> {
        let name = format!("{}_{suffix}", self.vms.name());
        self.database.collection_with_options(&name, self.durable.clone())
    }

    /// The database itself.
    pub(crate) const fn database(&self) -> &Database {
        &self.database
    }

    /// The offset of every `create_date`.
    pub(crate) const fn offset(&self) -> UtcOffset {
        self.offset
    }

    /// The newest rows, newest first, as a JSON array in the documented key order.
    ///
    /// It asks for the recent past first and widens the range until it has enough; of a VM that is silent it looks
    /// back from the last report. So the cost depends on what is answered, not on the length of the history, on a
    /// database that walks the index in order and on one that sorts what is in range.
    pub async fn latest(&self, query: Query<'_>, limit: Duration) -> Result<Rows, MetricsError> {
        let mut search = Search {
            query,
            limit,
            rows: Vec::from(b"["),
            missing: usize::from(query.limit.get()),
            before: None,
        };
        let mut end = SystemTime::now();
        for back in RECENT {
            self.look(&mut search, end.checked_sub(back)).await?;
        }
        if search.rows.len() == 1 {
            end = last_report(self, query.instance, limit).await?.unwrap_or(end);
        }
        for back in STEPS {
            self.look(&mut search, end.checked_sub(back)).await?;
        }
        self.look(&mut search, None).await?;
        search.rows.push(b']');
        let text = String::from_utf8(search.rows)
            .map_err(|error| MetricsError::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))?;
        Ok(Rows::from_json(text)?)
    }

    /// Adds what is missing from a range that begins then, or at the beginning of all, and ends where the search has
    /// come to.
    async fn look(&self, search: &mut Search<'_>, from: Option<SystemTime>) -> Result<(), MetricsError> {
        let from = from.map(|moment| CreateDate::at(moment, self.offset));
        let searched = from.is_some() && search.before.is_some() && from >= search.before;
        if search.missing == 0 || searched {
            return Ok(());
        }
        let kind = search.query.kind;
        let rows_of = self.collection(kind);
        let most = i64::try_from(search.missing).unwrap_or(i64::MAX);
        let query = rows_of
            .find(search.filter(from.as_ref()))
            .sort(doc! { "create_date": -1, "_id": -1 })
            .limit(most)
            .batch_size(u32::try_from(most).unwrap_or(u32::MAX))
            .max_time(search.limit);
        let mut cursor = find(rows_of, query).await?;
        while search.missing > 0 && cursor.advance().await? {
            if search.rows.len() > 1 {
                search.rows.push(b',');
            }
            let (rows, row) = (&mut search.rows, cursor.current());
            match kind {
                RowKind::Vm => row_json::push_row(rows, row, &VM_ROW_KEYS)?,
                RowKind::Process => row_json::push_row(rows, row, &PROCESS_ROW_KEYS)?,
            }
            search.missing -= 1;
        }
        search.before = from;
        Ok(())
    }

    /// Stores documents; those that are stored already count as stored. The indexes of documents that the database
    /// refuses for good come back with its words.
    pub async fn insert(
        &self,
        kind: RowKind,
        documents: &[RawDocumentBuf],
    ) -> Result<Vec<(usize, String)>, MetricsError> {
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
                Ok(real.map(|write| (write.index, write.message.clone())).collect())
            }
            ErrorKind::Write(WriteFailure::WriteError(ref write)) if write.code == DUPLICATE_KEY => {
                Ok(Vec::new())
            }
            _ => Err(error.into()),
        }
    }
}

impl Search<'_> {
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
