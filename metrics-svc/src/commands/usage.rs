//! `vmwatch-metrics usage` prints how much space the stored rows take: by kind and level of blocks, and by VM. It also
//! finds blocks that cannot be read.

mod count;
mod text;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use bson::{DateTime, Document, RawBsonRef, RawDocument, RawDocumentBuf, doc};
use indicatif::ProgressBar;
use mongodb::Collection;
use serde::Serialize;
use vmwatch_service::config::ByteSize;

use self::count::Count;
use super::progress_style;
use crate::{
    MetricsError,
    config::RetentionSettings,
    history::History,
    names,
    store::{RowKind, RowStore},
};

/// Number of documents that the database returns together. A block may have some MiB.
const BATCH: u32 = 100;
/// The growth is measured over this time before now.
const DAY: Duration = Duration::from_hours(24);

/// The space that rows take. Sizes are those of the documents, before the database compresses them and without indexes.
#[derive(Debug, Default, Serialize)]
struct Usage {
    bytes: u64,
    blocks: Vec<Blocks>,
    process_names: Size,
    /// Number of rows in the flat collections.
    flat_rows: FlatRows,
    /// Blocks that never expire, because their rows have no internal date.
    undated_blocks: Size,
    vms: usize,
    largest_vms: Vec<Vm>,
    unreadable: Unreadable,
    growth: Growth,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk: Option<Disk>,
}

/// The blocks of one kind and level.
#[derive(Debug, Serialize)]
struct Blocks {
    kind: String,
    level: i32,
    documents: u64,
    rows: u64,
    bytes: u64,
    bytes_per_row: f64,
}

#[derive(Debug, Default, Clone, Copy, Serialize)]
struct Size {
    documents: u64,
    bytes: u64,
}

#[derive(Debug, Default, Clone, Copy, Serialize)]
struct FlatRows {
    vm: u64,
    process: u64,
}

#[derive(Debug, Serialize)]
struct Vm {
    instance_id: String,
    bytes: u64,
    rows: u64,
}

#[derive(Debug, Default, Serialize)]
struct Unreadable {
    /// Whether the content of the blocks was read.
    checked: bool,
    blocks: u64,
    by_reason: BTreeMap<&'static str, u64>,
    /// The first of these blocks.
    first: Vec<UnreadableBlock>,
}

#[derive(Debug, Serialize)]
struct UnreadableBlock {
    id: String,
    instance_id: String,
    reason: &'static str,
}

/// How the blocks grow if as many rows arrive each day as in the last 24 hours.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
struct Growth {
    bytes_per_day: u64,
    /// Size at which the blocks stop growing, because as much expires as arrives.
    final_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Disk {
    bytes: u64,
    /// Days until the disk is full; `None` if it never is.
    days_left: Option<u64>,
}

/// What the user asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    pub(super) disk: Option<ByteSize>,
    pub(super) json: bool,
    /// Whether to read the content of the blocks.
    pub(super) check: bool,
}

pub(super) async fn run(
    store: &RowStore,
    history: &History,
    options: Options,
) -> Result<String, MetricsError> {
    let since = SystemTime::now().checked_sub(DAY);
    let since = since.map_or(DateTime::MIN, DateTime::from_system_time);
    let mut count = Count::new(options.check);
    let blocks = store.reading_blocks();
    let mut wanted = doc! { "instance_id": 1, "kind": 1, "level": 1, "from": 1, "rows": 1, "expires": 1 };
    if options.check {
        wanted.insert("data", 1);
    }
    each_sized(blocks, wanted, |block, bytes| count.add(block, bytes, since)).await?;
    let mut names = Size::default();
    each_sized(
        &store.reading_beside(names::COLLECTION),
        doc! { "_id": 1 },
        |_, bytes| names.add(bytes),
    )
    .await?;
    // The labels of VMs are unknown to this command, so the longest retention applies.
    let retention = RetentionSettings {
        vms: history.retention.longest(RowKind::Vm),
        processes: history.retention.longest(RowKind::Process),
    };
    let mut usage = count.usage(names, retention, options.disk);
    let flat = async |kind| match store.reading(kind) {
        Some(rows) => rows.count_documents(doc! {}).await,
        None => Ok(0),
    };
    usage.flat_rows = FlatRows {
        vm: flat(RowKind::Vm).await?,
        process: flat(RowKind::Process).await?,
    };
    if options.json {
        Ok(serde_json::to_string(&usage)?)
    } else {
        Ok(text::of(&usage))
    }
}

/// Reads the wanted fields of all documents, and their sizes.
async fn each_sized(
    collection: &Collection<RawDocumentBuf>,
    mut wanted: Document,
    mut each: impl FnMut(&RawDocument, u64),
) -> Result<(), MetricsError> {
    let progress = ProgressBar::new(collection.estimated_document_count().await?)
        .with_message(format!("documents of {} read", collection.name()));
    progress.set_style(progress_style("{msg}  {wide_bar} {pos}/{len}  {eta} left"));
    wanted.insert("bytes", doc! { "$bsonSize": "$$ROOT" });
    let mut documents = collection
        .aggregate([doc! { "$project": wanted }])
        .batch_size(BATCH)
        .with_type::<RawDocumentBuf>()
        .await?;
    while documents.advance().await? {
        let document = documents.current();
        let bytes = match document.get("bytes")? {
            Some(RawBsonRef::Int32(bytes)) => u64::try_from(bytes).unwrap_or(0),
            Some(RawBsonRef::Int64(bytes)) => u64::try_from(bytes).unwrap_or(0),
            _ => 0,
        };
        each(document, bytes);
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(())
}

impl Size {
    const fn add(&mut self, bytes: u64) {
        self.documents += 1;
        self.bytes += bytes;
    }
}

impl Growth {
    fn days_left(self, bytes: u64, disk: u64) -> Option<u64> {
        if bytes.max(self.final_bytes) <= disk {
            return None;
        }
        disk.saturating_sub(bytes).checked_div(self.bytes_per_day)
    }
}
