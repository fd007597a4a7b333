//! Selects the documents of names that a search reads, sorted by VM and day.

use std::collections::{BTreeSet, VecDeque};

use bson::{DateTime, Document, RawDocument, RawDocumentBuf, doc};
use mongodb::Cursor;
use tokio::time::Instant;
use vmwatch_api::{InstanceId, Scope};

use super::Search;
use crate::{
    MetricsError,
    database::find,
    names::{self, DAY_MILLIS, ProcessNames},
    processes::Processes,
};

/// If more documents have the name, all documents are read in order, until the page is full.
const MAX_IDS: usize = 1000;
/// Maximum number of full documents of a page.
const MAX_FULL: usize = 2000;
/// Number of documents that are read together by their ids.
const CHUNK: usize = 500;
/// Number of documents that are read together in order. A database that sorts them in memory sorts only these.
const TOGETHER: i64 = 1000;
/// If a search in a limited scope has more days, the documents of each VM are read on their own.
const MAX_DAYS: usize = 31;
/// Number of documents that the database returns together. A full document has up to six megabytes, and a
/// reply at most sixteen.
const BATCH: u32 = 100;

/// The documents that a search reads.
pub(super) struct Days<'a> {
    names: &'a ProcessNames,
    /// Filters, in order, each of which selects some documents.
    filters: VecDeque<Document>,
    cursor: Option<Cursor<RawDocumentBuf>>,
    /// Number of documents of the cursor that were read in order; `None` if they are read by their ids.
    in_order: Option<i64>,
    /// The VMs of a limited scope whose documents are still to be read, in order.
    vms: VecDeque<InstanceId>,
    /// The last of the VMs of a limited scope whose documents are being read, and the last one whose documents were read.
    reading: Option<InstanceId>,
    pub(super) passed: Option<InstanceId>,
    /// Whether there are further documents, for the next page.
    pub(super) is_cut: bool,
}

impl<'a> Days<'a> {
    pub(super) async fn select(
        processes: &'a Processes,
        search: &Search,
        scope: &Scope,
        after: Option<&InstanceId>,
    ) -> Result<Self, MetricsError> {
        let names = &processes.names;
        let mut days = Self {
            names,
            filters: VecDeque::new(),
            cursor: None,
            in_order: None,
            vms: VecDeque::new(),
            reading: None,
            passed: None,
            is_cut: false,
        };
        match scope {
            Scope::All => match ids(names, search).await? {
                Some(mut ids) => {
                    let after = after.map(names::end_of_vm).unwrap_or_default();
                    let mut full = full(names, search, &after).await?;
                    if full.len() > MAX_FULL
                        && let Some(end) = full.last().map(|end| names::start_of_vm(end))
                    {
                        // All documents of a VM must be on the same page. A search has fewer days than `MAX_FULL`.
                        days.is_cut = true;
                        full.split_off(&end);
                        ids.split_off(&end);
                    }
                    ids.append(&mut full);
                    days.filters = of_ids(ids.split_off(&after)).into();
                }
                None => days.filters = [in_order(search, after)].into(),
            },
            Scope::Only(instances) => {
                let later = |instance: &&InstanceId| after.is_none_or(|after| *instance > after);
                let instances: BTreeSet<_> = instances.iter().filter(later).collect();
                days.vms = instances.into_iter().cloned().collect();
            }
            Scope::Unknown => {}
        }
        Ok(days)
    }

    /// The next document.
    pub(super) async fn next(&mut self, search: &Search) -> Result<Option<&RawDocument>, MetricsError> {
        loop {
            if let Some(cursor) = &mut self.cursor {
                if cursor.advance().await? {
                    self.in_order = self.in_order.map(|count| count + 1);
                    if self.in_order == Some(TOGETHER) {
                        self.filters.extend(in_order_after(search, cursor.current())?);
                    }
                    break;
                }
                self.cursor = None;
                self.passed = self.reading.take().or(self.passed.take());
            }
            let next = self.filters.pop_front().or_else(|| self.next_vms(search));
            let Some(filter) = next else {
                return Ok(None);
            };
            let by_id = filter.contains_key("_id");
            self.in_order = (!by_id).then_some(0);
            let documents = self.names.documents();
            let query = documents
                .find(filter)
                .batch_size(BATCH)
                .max_time(search.deadline.left()?);
            let query = if by_id {
                query.sort(doc! { "_id": 1 })
            } else {
                query.sort(doc! { "instance_id": 1, "day": 1 }).limit(TOGETHER)
            };
            self.cursor = Some(find(documents, query).await?);
        }
        Ok(self.cursor.as_ref().map(Cursor::current))
    }

    /// A filter for the documents of the next VMs of a limited scope. The page ends here if its time is over, so that it
    /// makes progress even if none of the VMs has documents.
    fn next_vms(&mut self, search: &Search) -> Option<Document> {
        if self.vms.is_empty() {
            return None;
        }
        if self.passed.is_some() && Instant::now() >= search.ends_at {
            self.is_cut = true;
            return None;
        }
        let (first, last) = search.days();
        let days = usize::try_from((last - first) / DAY_MILLIS + 1).unwrap_or(usize::MAX);
        let count = if days > MAX_DAYS { 1 } else { CHUNK / days };
        let vms: Vec<InstanceId> = self.vms.drain(..count.min(self.vms.len())).collect();
        self.reading = vms.last().cloned();
        if let [vm] = vms.as_slice() {
            let days = doc! { "$gte": names::key(vm, first), "$lte": names::key(vm, last) };
            return Some(doc! { "_id": days });
        }
        let keys = vms.iter().flat_map(|vm| {
            let days = (0_i64..).map(|day| first + day * DAY_MILLIS);
            days.take_while(|day_ms| *day_ms <= last)
                .map(|day_ms| names::key(vm, day_ms))
        });
        Some(doc! { "_id": { "$in": keys.collect::<Vec<_>>() } })
    }
}

fn within_days(search: &Search) -> Document {
    let (first, last) = search.days();
    doc! { "$gte": DateTime::from_millis(first), "$lte": DateTime::from_millis(last) }
}

fn of_ids(ids: BTreeSet<String>) -> Vec<Document> {
    let ids: Vec<String> = ids.into_iter().collect();
    let chunks = ids.chunks(CHUNK);
    chunks.map(|ids| doc! { "_id": { "$in": ids } }).collect()
}

/// All documents after a VM, in order.
fn in_order(search: &Search, after: Option<&InstanceId>) -> Document {
    let after = after.map_or("", InstanceId::as_str);
    doc! { "instance_id": { "$gt": after }, "day": within_days(search) }
}

/// All documents after this one, in order: those of its VM, and those of later VMs.
fn in_order_after(search: &Search, document: &RawDocument) -> Result<[Document; 2], MetricsError> {
    let instance = document.get_str("instance_id")?;
    let mut days = within_days(search);
    days.insert("$gt", document.get_datetime("day")?);
    Ok([
        doc! { "instance_id": instance, "day": days },
        doc! { "instance_id": { "$gt": instance }, "day": within_days(search) },
    ])
}

/// The ids of the documents that have one of the names; `None` if there are many.
async fn ids(names: &ProcessNames, search: &Search) -> Result<Option<BTreeSet<String>>, MetricsError> {
    let mut ids = BTreeSet::new();
    for mut filter in search.wanted.array_filters("names") {
        filter.insert("day", within_days(search));
        let found = read_ids(names, filter, MAX_IDS + 1, None, search).await?;
        if found.len() > MAX_IDS {
            return Ok(None);
        }
        ids.extend(found);
    }
    Ok(Some(ids))
}

/// The ids of the first full documents, at most one more than [`MAX_FULL`].
async fn full(names: &ProcessNames, search: &Search, after: &str) -> Result<BTreeSet<String>, MetricsError> {
    let filter = doc! { "full": within_days(search), "_id": { "$gte": after } };
    let found = read_ids(names, filter, MAX_FULL + 1, Some(doc! { "_id": 1 }), search).await?;
    Ok(found.into_iter().collect())
}

async fn read_ids(
    names: &ProcessNames,
    filter: Document,
    most: usize,
    sort: Option<Document>,
    search: &Search,
) -> Result<Vec<String>, MetricsError> {
    let documents = names.documents();
    let query = documents
        .find(filter)
        .projection(doc! { "_id": 1 })
        .limit(i64::try_from(most).unwrap_or(i64::MAX))
        .batch_size(u32::try_from(most).unwrap_or(u32::MAX))
        .max_time(search.deadline.left()?);
    let query = match sort {
        Some(sort) => query.sort(sort),
        None => query,
    };
    let mut cursor = find(documents, query).await?;
    let mut ids = Vec::new();
    while cursor.advance().await? {
        ids.push(cursor.current().get_str("_id")?.to_owned());
    }
    Ok(ids)
}
