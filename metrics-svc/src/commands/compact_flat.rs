//! `vmwatch-metrics compact-flat` moves the rows of the flat collections into blocks.
//!
//! ```text
//! flat rows of a VM, by date ─> batch ─> blocks ─ wait ─> process names ─> ids of the rows in readable blocks
//!    ─> delete these flat rows
//! ```
//!
//! A flat row is deleted only after its `_id` was read back from a block. The wait before that lets reads end that began
//! before the block was written, and that would find the row in neither. A command that is killed leaves rows in both, which
//! readers answer once; the next one makes the same blocks of the same rows. For the same reason two may run at once.

mod written;

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use bson::{DateTime, RawDocumentBuf, doc};
use indicatif::ProgressBar;
use mongodb::Collection;
use tokio::time::{Instant, sleep_until};
use vmwatch_api::InstanceId;

use self::written::Written;
use super::{
    pack::{Dated, Group, Span, check},
    progress_style,
};
use crate::{
    MetricsError,
    deadline::Deadline,
    documents::SAMPLED_AT,
    history::History,
    reads::micros_of_date,
    store::{RowKind, RowStore},
};

/// Size of a batch in bytes at which it is written before the next hour begins, so that the rows of an hour are in one
/// block.
const BATCH_BYTES: usize = 8 << 20;
/// Size of a batch in bytes at which it is written at the next date, and the one at which it is written at once.
const FULL_BATCH_BYTES: usize = 16 << 20;
const MAX_BATCH_BYTES: usize = 24 << 20;
/// Maximum number of batches whose flat rows have not been deleted yet. A batch takes some 200 bytes here.
const MAX_WRITTEN: usize = 20_000;
/// Number of flat rows that the database returns together.
const FOUND_TOGETHER: u32 = 5000;
/// Time limit for adding the process names of a batch.
const NAMES_LIMIT: Duration = Duration::from_mins(5);

/// What the user asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    /// Whether to change nothing.
    pub(super) dry_run: bool,
    /// Time between writing a block and deleting the flat rows that it has.
    pub(super) delete_after: Duration,
}

/// Consecutive flat rows of one VM.
#[derive(Debug, Default)]
struct Batch {
    groups: BTreeMap<(Span, Dated), Vec<RawDocumentBuf>>,
    /// `create_date` and effective date of the first and the last row.
    first: Option<(String, i64)>,
    last: Option<(String, i64)>,
    bytes: usize,
    /// Number of rows between the first and the last that are not moved.
    skipped: u64,
}

struct Mover<'a> {
    store: &'a RowStore,
    history: &'a History,
    options: Options,
    progress: ProgressBar,
    /// The batches whose flat rows have not been deleted yet, oldest first.
    written: VecDeque<(Instant, Written)>,
    counts: Counts,
}

/// Numbers of rows.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    moved: u64,
    /// Rows that no block can hold.
    unfit: u64,
    /// Rows past their retention, which the database deletes.
    expired: u64,
    /// Rows that are in no readable block.
    unread: u64,
}

/// Moves all flat rows into blocks.
pub(super) async fn run(
    store: &RowStore,
    history: &History,
    options: Options,
) -> Result<String, MetricsError> {
    let mut mover = Mover {
        store,
        history,
        options,
        progress: ProgressBar::hidden(),
        written: VecDeque::new(),
        counts: Counts::default(),
    };
    for kind in RowKind::FLAT {
        mover.move_kind(kind).await?;
    }
    mover.finish_all().await?;
    let counts = mover.counts;
    if options.dry_run {
        return Ok(format!(
            "{} rows would be moved; {} rows would stay flat, because no block can hold them",
            counts.moved, counts.unfit
        ));
    }
    for rows in store.flat_collections() {
        println!(
            "{}: {} rows left",
            rows.name(),
            rows.count_documents(doc! {}).await?
        );
    }
    let done = counts.to_string();
    if counts.unread > 0 {
        println!("{done}");
        return Err(MetricsError::Refused(format!(
            "{} rows stay flat, because they could not be read from blocks; `vmwatch-metrics usage` lists unreadable \
             blocks, and another run moves rows that were written during this one",
            counts.unread
        )));
    }
    Ok(done)
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "moved {} rows into blocks", self.moved)?;
        if self.unfit > 0 {
            write!(
                f,
                "; {} rows stay flat, because no block can hold them",
                self.unfit
            )?;
        }
        if self.expired > 0 {
            let expired = self.expired;
            write!(
                f,
                "; {expired} rows are past their retention, and the database deletes them"
            )?;
        }
        Ok(())
    }
}

impl Mover<'_> {
    async fn move_kind(&mut self, kind: RowKind) -> Result<(), MetricsError> {
        let Some(rows) = self.store.collection(kind) else {
            return Ok(());
        };
        let total = rows.estimated_document_count().await?;
        println!("{}: {total} rows", rows.name());
        self.progress = ProgressBar::new(total).with_message(format!("rows of {}", rows.name()));
        self.progress.set_style(progress_style(
            "{msg}  {wide_bar} {pos}/{len}  {per_sec}  {eta} left",
        ));
        let instances = rows.distinct("instance_id", doc! {}).await?;
        // Rows of a VM with an invalid id cannot be queried. They stay flat.
        for instance in instances.iter().filter_map(|id| id.as_str()?.parse().ok()) {
            self.move_vm(rows, kind, &instance).await?;
        }
        self.progress.finish_and_clear();
        Ok(())
    }

    async fn move_vm(
        &mut self,
        rows: &Collection<RawDocumentBuf>,
        kind: RowKind,
        instance: &InstanceId,
    ) -> Result<(), MetricsError> {
        let keep = self.history.retention.of(kind, instance);
        let expired =
            DateTime::now().timestamp_millis() - i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
        let mut found = rows
            .find(doc! { "instance_id": instance.as_str() })
            .sort(doc! { "create_date": 1, "_id": 1 })
            .batch_size(FOUND_TOGETHER)
            .await?;
        let mut batch = Batch::default();
        while found.advance().await? {
            self.progress.inc(1);
            let row = found.current();
            let date = row.get_str("create_date").ok();
            let Some((date, at)) =
                date.and_then(|date| Some((date, micros_of_date(date, self.store.offset())?)))
            else {
                self.counts.unfit += 1;
                continue;
            };
            let span = Span::of(at);
            if batch.is_due(span, date) {
                self.write(kind, instance, std::mem::take(&mut batch)).await?;
            }
            batch.extend_to(date, at);
            if row
                .get_datetime(SAMPLED_AT)
                .is_ok_and(|date| date.timestamp_millis() <= expired)
            {
                self.counts.expired += 1;
                batch.skipped += 1;
            } else {
                batch.add(span, row.to_owned());
            }
        }
        self.write(kind, instance, batch).await
    }

    /// Writes the blocks of a batch, and deletes the flat rows of those written long enough ago.
    async fn write(
        &mut self,
        kind: RowKind,
        instance: &InstanceId,
        batch: Batch,
    ) -> Result<(), MetricsError> {
        let (Some(first), Some(last)) = (batch.first, batch.last) else {
            return Ok(());
        };
        let keep = self.history.retention.of(kind, instance);
        let (mut blocks, mut unfit, mut rows_count) = (Vec::new(), 0, 0);
        for ((_, dated), rows) in batch.groups {
            rows_count += rows.len() as u64;
            let group = Group {
                kind,
                instance,
                dated,
                rows,
            };
            let packed = group.pack(self.store, keep)?;
            blocks.extend(packed.blocks);
            unfit += packed.unfit.len() as u64;
        }
        self.counts.unfit += unfit;
        if self.options.dry_run {
            self.counts.moved += rows_count - unfit;
            return Ok(());
        }
        check(&self.store.insert_blocks(&blocks).await?)?;
        let written = Written {
            kind,
            instance: instance.clone(),
            dates: (first.0, last.0),
            time: (first.1, last.1),
            skipped: batch.skipped + unfit,
        };
        self.written
            .push_back((Instant::now() + self.options.delete_after, written));
        while self.written.len() > MAX_WRITTEN
            || self
                .written
                .front()
                .is_some_and(|(due, _)| *due <= Instant::now())
        {
            self.finish_next().await?;
        }
        Ok(())
    }

    async fn finish_all(&mut self) -> Result<(), MetricsError> {
        if let Some((due, _)) = self.written.back() {
            let left = due.saturating_duration_since(Instant::now()).as_secs();
            println!("all blocks are written; their flat rows are deleted within {left} s");
        }
        while !self.written.is_empty() {
            self.finish_next().await?;
        }
        Ok(())
    }

    /// Deletes the flat rows of the oldest batch when it is time.
    async fn finish_next(&mut self) -> Result<(), MetricsError> {
        if let Some((due, written)) = self.written.pop_front() {
            sleep_until(due).await;
            // The rows must not be missing in the names once they are only in blocks.
            if written.kind == RowKind::Process {
                let time = written.time.0..written.time.1.saturating_add(1);
                self.history
                    .rebuild_names(&written.instance, time, Deadline::after(NAMES_LIMIT))
                    .await?;
            }
            let deleted = written.delete_flat(self.store).await?;
            self.counts.moved += deleted.rows;
            self.counts.unread += deleted.unread;
        }
        Ok(())
    }
}

impl Batch {
    /// Whether the batch is to be written before a row of this date is added.
    fn is_due(&self, span: Span, date: &str) -> bool {
        let is_new_date = self.last.as_ref().is_some_and(|(last, _)| last != date);
        let is_new_span = self
            .groups
            .last_key_value()
            .is_some_and(|((last, _), _)| *last != span);
        self.bytes >= MAX_BATCH_BYTES
            || (is_new_date && self.bytes >= FULL_BATCH_BYTES)
            || (is_new_date && is_new_span && self.bytes >= BATCH_BYTES)
    }

    fn extend_to(&mut self, date: &str, at: i64) {
        if self.last.as_ref().is_none_or(|(last, _)| last != date) {
            self.last = Some((date.to_owned(), at));
        }
        if self.first.is_none() {
            self.first.clone_from(&self.last);
        }
    }

    fn add(&mut self, span: Span, row: RawDocumentBuf) {
        self.bytes += row.as_bytes().len();
        let dated = Dated::of(&row);
        self.groups.entry((span, dated)).or_default().push(row);
    }
}
