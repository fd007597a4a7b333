//! `vmwatch-metrics load` loads the rows of an older database from files with JSON Lines or one JSON array.

mod objects;
mod row;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use bson::RawDocumentBuf;
use indicatif::ProgressBar;
use vmwatch_api::{InstanceId, time::UtcOffset};

use self::{objects::Objects, row::Row};
use super::{
    pack::{Dated, Group, Span, check},
    progress_style,
};
use crate::{
    MetricsError,
    history::{History, rebuild::Days},
    row_retention::RowRetention,
    store::{RowKind, RowStore},
};

/// Number of loaded rows that are written to the database together, and their maximum size in bytes. More rows make fewer
/// blocks if the rows of an hour are not next to each other.
const BATCH: usize = 65_536;
const BATCH_BYTES: usize = 16 << 20;
/// Number of blocks that are written to the database together.
const BLOCKS: usize = 1000;
/// Maximum number of invalid rows that are printed; further ones are only counted.
const MAX_SHOWN: u64 = 10;
/// Maximum number of pairs of a VM and a day that are collected before the rollups of these days are built. This
/// corresponds to 27 years of one VM, or one day of ten thousand VMs.
const MAX_DAYS: usize = 10_000;

/// What the rows of a [`Group`] have in common.
type Key = (RowKind, InstanceId, Span, Dated);

struct Loader {
    retention: Arc<RowRetention>,
    days: Days,
    rows: BTreeMap<Key, Vec<RawDocumentBuf>>,
    waiting: usize,
    waiting_bytes: usize,
    read: u64,
    /// Number of rows that no block can hold, so that they were stored flat.
    flat: u64,
    bad: u64,
}

/// Loads the files. Rows that exist already are kept unchanged, so loading the same files again is safe.
///
/// Loading them again also completes an interrupted load, because the rollups of every day in the files are rebuilt.
pub(super) async fn run(
    store: &RowStore,
    history: &History,
    files: &[PathBuf],
    offset: UtcOffset,
) -> Result<String, MetricsError> {
    let mut loader = Loader {
        retention: Arc::clone(&history.retention),
        days: Days::new(),
        rows: BTreeMap::new(),
        waiting: 0,
        waiting_bytes: 0,
        read: 0,
        flat: 0,
        bad: 0,
    };
    for path in files {
        if path != Path::new("-") {
            // Nothing is loaded if a file is not an export.
            open(path, open_file(path)?)?;
        }
    }
    for path in files {
        load_file(&mut loader, store, history, path, offset).await?;
    }
    loader.write(store).await?;
    loader.roll_up(history).await?;
    let done = format!("loaded {} rows, skipped {} invalid ones", loader.read, loader.bad);
    if loader.flat > 0 {
        println!(
            "{} of the rows have values that only the flat collections can hold; they were stored there",
            loader.flat
        );
    }
    if loader.bad > 0 {
        println!("{done}");
        return Err(MetricsError::Refused(
            "some invalid rows were skipped; correct them and load the file again".into(),
        ));
    }
    Ok(done)
}

async fn load_file(
    loader: &mut Loader,
    store: &RowStore,
    history: &History,
    path: &Path,
    offset: UtcOffset,
) -> Result<(), MetricsError> {
    let (input, size): (Box<dyn Read>, Option<u64>) = if path == Path::new("-") {
        (Box::new(std::io::stdin()), None)
    } else {
        let file = open_file(path)?;
        let size = file.metadata()?.len();
        (Box::new(file), Some(size))
    };
    let progress = progress(size, path);
    let mut objects = open(path, progress.wrap_read(input))?;
    let unit = objects.unit();
    while let Some((number, object)) = objects.next()? {
        match object.and_then(|object| row::parse(object, offset)) {
            Ok(row) => loader.add(row, history),
            Err(reason) => loader.note_bad(
                &progress,
                &format!("{}, {unit} {number}", path.display()),
                &reason,
            ),
        }
        if loader.waiting >= BATCH || loader.waiting_bytes >= BATCH_BYTES {
            loader.write(store).await?;
        }
        if loader.days.len() >= MAX_DAYS {
            loader.write(store).await?;
            progress.suspend(|| println!("building the rollups of {MAX_DAYS} days"));
            loader.roll_up(history).await?;
        }
    }
    progress.finish();
    Ok(())
}

fn open_file(path: &Path) -> Result<File, MetricsError> {
    let unreadable = |error| MetricsError::Refused(format!("{} cannot be read: {error}", path.display()));
    File::open(path).map_err(unreadable)
}

/// Recognises the format of an export.
fn open<R: Read>(path: &Path, input: R) -> Result<Objects<impl BufRead + use<R>>, MetricsError> {
    Objects::open(BufReader::new(input))?
        .map_err(|reason| MetricsError::Refused(format!("{} cannot be loaded: {reason}", path.display())))
}

fn progress(size: Option<u64>, path: &Path) -> ProgressBar {
    let bar = size.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    bar.set_style(progress_style(
        "{msg}  {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
    ));
    bar.with_message(path.display().to_string())
}

impl Loader {
    fn add(&mut self, row: Row, history: &History) {
        let at_ms = u64::try_from(row.at.div_euclid(1000)).unwrap_or(0);
        self.days.insert(history.day_of(row.instance.clone(), at_ms));
        let dated = Dated::of(&row.document);
        self.waiting += 1;
        self.waiting_bytes += row.document.as_bytes().len();
        let key = (row.kind, row.instance, Span::of(row.at), dated);
        self.rows.entry(key).or_default().push(row.document);
    }

    /// Rebuilds the rollups of the collected days. The rows of these days must have been written already.
    async fn roll_up(&mut self, history: &History) -> Result<(), MetricsError> {
        let days = std::mem::take(&mut self.days);
        let bar = ProgressBar::new(days.len() as u64).with_message("days whose rollups are built");
        bar.set_style(progress_style("{msg}  {wide_bar} {pos}/{len}  {eta} left"));
        history.rebuild_days(&days, || bar.inc(1)).await?;
        bar.finish();
        Ok(())
    }

    fn note_bad(&mut self, progress: &ProgressBar, place: &str, reason: &str) {
        self.bad += 1;
        if self.bad <= MAX_SHOWN {
            progress.suspend(|| eprintln!("{place}: {reason}"));
        }
    }

    async fn write(&mut self, store: &RowStore) -> Result<(), MetricsError> {
        let mut blocks = Vec::new();
        for ((kind, instance, _, dated), rows) in std::mem::take(&mut self.rows) {
            let keep = self.retention.of(kind, &instance);
            let group = Group {
                kind,
                instance: &instance,
                dated,
                rows,
            };
            let packed = group.pack(store, keep)?;
            blocks.extend(packed.blocks);
            self.flat += packed.unfit.len() as u64;
            check(&store.insert_flat(kind, &packed.unfit).await?)?;
            if blocks.len() >= BLOCKS {
                check(&store.insert_blocks(&blocks).await?)?;
                blocks.clear();
            }
        }
        check(&store.insert_blocks(&blocks).await?)?;
        self.read += self.waiting as u64;
        (self.waiting, self.waiting_bytes) = (0, 0);
        Ok(())
    }
}
