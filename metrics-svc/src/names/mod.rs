//! Process names: one document per VM and day (UTC) with the names of all processes that ran, and statistics of
//! each name. They answer which VMs ran a process, and in which hours.
//!
//! ```text
//! vm_samples_process_names  { _id: "vm-1 2017-01-01", instance_id: "vm-1", day, names: ["bash", "nginx"], statistics,
//!                             generation, full, expires }
//! ```
//!
//! The history writes them from the rows that dirty buckets name (`history::names`). Merging rows repeatedly changes
//! nothing, and a document is replaced only if its `generation` is unchanged. So replicas may process the same rows, in
//! any order.
//!
//! A document has at most [`MAX_NAMES`] names of at most [`MAX_NAME`] bytes. Further and longer names are stored together
//! as the name [`OTHER_NAMES`]. Such a document is full: its field `full` has its day, and a search for a name that it
//! lacks reads the rows of that VM and day. A document expires with the last block whose rows it describes.

mod collect;
pub(crate) mod coverage;
mod document;
mod matching;
mod statistics;

use std::time::Duration;

use bson::{DateTime, Document, RawDocument, RawDocumentBuf, doc};
use metrics::counter;
use mongodb::{
    Collection, IndexModel,
    error::{ErrorKind, WriteFailure},
    options::IndexOptions,
};
use tracing::warn;
use vmwatch_api::{
    InstanceId,
    time::{CreateDate, UtcOffset},
};

use self::statistics::StatisticsError;
pub(crate) use self::{
    collect::Collector,
    document::{NamesOfDay, StoredNames},
    matching::NameMatch,
    statistics::{Hours, Statistics},
};
use crate::{
    MetricsError,
    blocks::Expires,
    database::find,
    deadline::Deadline,
    store::{DUPLICATE_KEY, RowStore},
};

/// The collection of process names, after the prefix of derived collections.
pub(crate) const COLLECTION: &str = "process_names";
/// Maximum number of names of a VM and day, besides [`OTHER_NAMES`].
pub(crate) const MAX_NAMES: usize = 20_000;
/// The name that stands for all names of a VM and day beyond the limits.
pub(crate) const OTHER_NAMES: &str = "(other)";
/// Maximum length of a name, in bytes.
pub(crate) const MAX_NAME: usize = 256;
/// Number of documents that are listed together.
const PAGE: i64 = 1000;
/// A day in milliseconds.
pub(crate) const DAY_MILLIS: i64 = 86_400_000;

/// Start of the day (UTC) that contains a time in Unix microseconds, in Unix milliseconds.
pub(crate) const fn day_of(micros: i64) -> i64 {
    let millis = micros.div_euclid(1000);
    millis - millis.rem_euclid(DAY_MILLIS)
}

/// The `_id` of a document, which sorts by VM and then by day: the separator sorts before the characters of instance ids.
pub(crate) fn key(instance: &InstanceId, day_ms: i64) -> String {
    let date = CreateDate::at_millis(u64::try_from(day_ms).unwrap_or(0), UtcOffset::UTC);
    let day = date.as_str().get(..10).unwrap_or_default();
    format!("{instance} {day}")
}

/// The beginning of the ids of all documents of the VM to which an id belongs; no id of an earlier VM sorts after it.
pub(crate) fn start_of_vm(id: &str) -> String {
    let vm = id.split_once(' ').map_or(id, |(vm, _)| vm);
    format!("{vm} ")
}

/// A text that sorts after the ids of all documents of a VM and before those of later VMs: "!" follows the separator.
pub(crate) fn end_of_vm(instance: &InstanceId) -> String {
    format!("{instance}!")
}

/// The collection of process names. It is always read from the primary, as the dirty buckets are, because these say up to
/// when the names are complete.
pub(crate) struct ProcessNames {
    names: Collection<RawDocumentBuf>,
}

/// What is stored of a VM and day, and the generation that a write replaces.
#[derive(Default)]
pub(crate) struct Before {
    pub(crate) names: NamesOfDay,
    /// Whether there is a document, and its generation unless that is unreadable.
    is_stored: bool,
    generation: Option<i64>,
}

impl ProcessNames {
    /// Opens the collection, which is in the same database as the rows.
    pub(crate) fn new(rows: &RowStore) -> Self {
        Self {
            names: rows.beside(COLLECTION),
        }
    }

    /// Creates the indexes.
    pub(crate) async fn prepare(&self) -> Result<(), MetricsError> {
        let index =
            |keys: Document, options: IndexOptions| IndexModel::builder().keys(keys).options(options).build();
        let named = |name: &str| IndexOptions::builder().name(name.to_owned()).build();
        // Nearly all documents lack this field, and a sparse index has no entries for them.
        let full = IndexOptions::builder()
            .name("full".to_owned())
            .sparse(true)
            .build();
        // MongoDB deletes a document at the time in its field `expires`.
        let retention = IndexOptions::builder()
            .name("expires".to_owned())
            .expire_after(Duration::ZERO)
            .build();
        let indexes = [
            index(doc! { "names": 1, "day": 1 }, named("names_day")),
            index(doc! { "instance_id": 1, "day": 1 }, named("instance_day")),
            index(doc! { "full": 1 }, full),
            index(doc! { "expires": 1 }, retention),
        ];
        self.names.create_indexes(indexes).await?;
        Ok(())
    }

    /// The collection itself.
    pub(crate) const fn documents(&self) -> &Collection<RawDocumentBuf> {
        &self.names
    }

    /// Reads what is stored of a VM and day, before it is replaced. A corrupt document counts as full and without names.
    pub(crate) async fn before(
        &self,
        instance: &InstanceId,
        day_ms: i64,
        deadline: Deadline,
    ) -> Result<Before, MetricsError> {
        let query = self
            .names
            .find_one(doc! { "_id": key(instance, day_ms) })
            .max_time(deadline.left()?);
        let Some(document) = find(&self.names, query).await? else {
            return Ok(Before::default());
        };
        let generation = document.get_i64("generation").ok();
        let names = match StoredNames::from_document(&document) {
            Ok(stored) => NamesOfDay::of_stored(&stored),
            Err(error) => {
                note_unreadable(&document, error);
                if let StatisticsError::NewerVersion(_) = error {
                    return Err(MetricsError::NewerNames);
                }
                NamesOfDay {
                    is_full: true,
                    ..NamesOfDay::default()
                }
            }
        };
        Ok(Before {
            names,
            is_stored: true,
            generation,
        })
    }

    /// Adds names to what is stored. Returns `false` if that was replaced meanwhile, so that nothing was written.
    pub(crate) async fn add(
        &self,
        instance: &InstanceId,
        day_ms: i64,
        before: &Before,
        found: &NamesOfDay,
    ) -> Result<bool, MetricsError> {
        let mut names = before.names.clone();
        names.merge(found);
        self.replace(instance, day_ms, before, &names).await
    }

    /// Sets when the names expire to the expiry of `all`, which are the names of all rows of the day. Returns `false` like
    /// [`ProcessNames::add`].
    pub(crate) async fn redate(
        &self,
        instance: &InstanceId,
        day_ms: i64,
        before: &Before,
        all: &NamesOfDay,
    ) -> Result<bool, MetricsError> {
        if !before.is_stored || all.expires == Expires::NoRows {
            return Ok(true);
        }
        let mut names = before.names.clone();
        names.merge(all);
        names.expires = all.expires;
        self.replace(instance, day_ms, before, &names).await
    }

    /// Reads the VM and day of documents that never expire, in the order of their `_id`s.
    pub(crate) async fn without_expiry(
        &self,
        after: &str,
    ) -> Result<Vec<(String, InstanceId, i64)>, MetricsError> {
        let mut cursor = self
            .names
            .find(doc! { "_id": { "$gt": after }, "expires": { "$exists": false } })
            .projection(doc! { "instance_id": 1, "day": 1 })
            .sort(doc! { "_id": 1 })
            .limit(PAGE)
            .await?;
        let mut found = Vec::new();
        while cursor.advance().await? {
            let document = cursor.current();
            let instance = document.get_str("instance_id")?.parse();
            let instance = instance
                .map_err(|_| MetricsError::Refused("process names have an invalid VM id".to_owned()))?;
            let day_ms = document.get_datetime("day")?.timestamp_millis();
            found.push((document.get_str("_id")?.to_owned(), instance, day_ms));
        }
        Ok(found)
    }

    async fn replace(
        &self,
        instance: &InstanceId,
        day_ms: i64,
        before: &Before,
        names: &NamesOfDay,
    ) -> Result<bool, MetricsError> {
        if *names == before.names {
            return Ok(true);
        }
        let mut fields = names.fields(day_ms);
        if !before.is_stored {
            fields.extend(doc! {
                "_id": key(instance, day_ms),
                "instance_id": instance.as_str(),
                "day": DateTime::from_millis(day_ms),
                "names": names.sorted(),
                "generation": 1_i64,
            });
            let into = self.names.clone_with_type::<Document>();
            return match into.insert_one(fields).await {
                Ok(_) => Ok(true),
                Err(error) if is_duplicate(&error) => Ok(false),
                Err(error) => Err(error.into()),
            };
        }
        // The names are written only if they change, because each of them has an entry in an index.
        if names.names.len() != before.names.names.len() {
            fields.insert("names", names.sorted());
        }
        fields.insert("generation", before.generation.unwrap_or(0).saturating_add(1));
        let mut change = doc! { "$set": fields };
        if names.expires == Expires::Never {
            change.insert("$unset", doc! { "expires": "" });
        }
        let stored = doc! { "_id": key(instance, day_ms), "generation": before.generation };
        Ok(self.names.update_one(stored, change).await?.matched_count == 1)
    }
}

/// Counts and logs a document that cannot be decoded.
pub(crate) fn note_unreadable(document: &RawDocument, error: StatisticsError) {
    counter!("vmwatch_process_names_unreadable_total").increment(1);
    warn!(day = ?document.get("_id"), %error, "the process names of a VM and day are unreadable");
}

fn is_duplicate(error: &mongodb::error::Error) -> bool {
    matches!(
        *error.kind,
        ErrorKind::Write(WriteFailure::WriteError(ref write)) if write.code == DUPLICATE_KEY
    )
}
