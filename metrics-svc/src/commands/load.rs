//! `vmwatch-metrics load` loads the rows of an older database from JSON Lines files.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use bson::{Bson, Document, RawDocumentBuf};
use indicatif::{ProgressBar, ProgressStyle};
use vmwatch_api::{
    InstanceId,
    time::{CreateDate, UtcOffset},
};
use vmwatch_blocks::RowIdentity;

use crate::{
    MetricsError,
    blocks::{self, CLOSED_AFTER, HOUR_MICROS, hour_of},
    documents::{SAMPLED_AT, micros_of, row_id},
    history::{History, rebuild::Days},
    row_retention::RowRetention,
    store::{RowKind, RowStore, Unstored},
};

/// Number of loaded rows that are written to the database together.
const BATCH: usize = 20_000;
/// Number of blocks that are written to the database together.
const BLOCKS: usize = 1000;
/// Maximum length of a line in bytes; a row of the documented API has about 350.
const MAX_LINE: u64 = 64 * 1024;
/// Maximum number of invalid lines that are printed; further ones are only counted.
const MAX_SHOWN: u64 = 10;
/// Maximum number of pairs of a VM and a day that are collected before the rollups of these days are built. This
/// corresponds to 27 years of one VM, or one day of ten thousand VMs.
const MAX_DAYS: usize = 10_000;

/// Rows that become one block.
type Group = (RowKind, InstanceId, Span, Dated);

/// Which rows may share a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Span {
    /// Those of an hour that has ended, which starts at this time (Unix microseconds).
    Hour(i64),
    /// Those of this moment (Unix microseconds), in an hour that has not ended.
    Moment(i64),
}

/// Whether rows have an internal date, so that they expire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Dated {
    Yes,
    No,
}

struct Loader {
    retention: Arc<RowRetention>,
    days: Days,
    rows: BTreeMap<Group, Vec<RawDocumentBuf>>,
    waiting: usize,
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
        read: 0,
        flat: 0,
        bad: 0,
    };
    for path in files {
        load_file(&mut loader, store, history, path, offset).await?;
    }
    loader.write(store).await?;
    loader.roll_up(history).await?;
    let done = format!(
        "loaded {} rows, skipped {} invalid lines",
        loader.read, loader.bad
    );
    if loader.flat > 0 {
        println!(
            "{} of the rows have values that only the flat collections can hold; they were stored there",
            loader.flat
        );
    }
    if loader.bad > 0 {
        println!("{done}");
        return Err(MetricsError::Refused(
            "some invalid lines were skipped; correct them and load the file again".into(),
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
        let file = File::open(path)
            .map_err(|error| MetricsError::Refused(format!("{} cannot be read: {error}", path.display())))?;
        let size = file.metadata()?.len();
        (Box::new(file), Some(size))
    };
    let progress = progress(size, path);
    let mut lines = BufReader::new(progress.wrap_read(input));
    let mut line = Vec::new();
    for number in 1_u64.. {
        line.clear();
        if lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match row(&line, offset) {
            Ok(row) => loader.add(row, history),
            Err(reason) => loader.note_bad(&progress, path, number, &reason),
        }
        if loader.waiting >= BATCH {
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

fn progress(size: Option<u64>, path: &Path) -> ProgressBar {
    let bar = size.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    bar.set_style(style(
        "{msg}  {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
    ));
    bar.with_message(path.display().to_string())
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A row parsed from a line of the file.
#[derive(Debug)]
struct Row {
    kind: RowKind,
    instance: InstanceId,
    /// Time of `create_date`, Unix microseconds.
    at: i64,
    document: RawDocumentBuf,
}

impl Loader {
    fn add(&mut self, row: Row, history: &History) {
        if row.kind == RowKind::Vm {
            let at_ms = u64::try_from(row.at.div_euclid(1000)).unwrap_or(0);
            self.days.insert(history.day_of(row.instance.clone(), at_ms));
        }
        let closed = SystemTime::now().checked_sub(CLOSED_AFTER).map_or(0, micros_of);
        let hour = hour_of(row.at);
        let span = if hour.saturating_add(HOUR_MICROS) <= closed {
            Span::Hour(hour)
        } else {
            Span::Moment(row.at)
        };
        let dated = match row.document.get_datetime(SAMPLED_AT) {
            Ok(_) => Dated::Yes,
            Err(_) => Dated::No,
        };
        let group = (row.kind, row.instance, span, dated);
        self.rows.entry(group).or_default().push(row.document);
        self.waiting += 1;
    }

    /// Rebuilds the rollups of the collected days. The rows of these days must have been written already.
    async fn roll_up(&mut self, history: &History) -> Result<(), MetricsError> {
        let days = std::mem::take(&mut self.days);
        let bar = ProgressBar::new(days.len() as u64).with_message("days whose rollups are built");
        bar.set_style(style("{msg}  {wide_bar} {pos}/{len}  {eta} left"));
        history.rebuild_days(&days, || bar.inc(1)).await?;
        bar.finish();
        Ok(())
    }

    fn note_bad(&mut self, progress: &ProgressBar, path: &Path, number: u64, reason: &str) {
        self.bad += 1;
        if self.bad <= MAX_SHOWN {
            progress.suspend(|| eprintln!("{}:{number}: {reason}", path.display()));
        }
    }

    async fn write(&mut self, store: &RowStore) -> Result<(), MetricsError> {
        let mut blocks = Vec::new();
        for ((kind, instance, _, dated), documents) in std::mem::take(&mut self.rows) {
            let keep = (dated == Dated::Yes).then(|| self.retention.of(kind, &instance));
            let (block, unfit) = store.encode(|encoder| {
                let mut rows = encoder.rows(kind, instance.as_str());
                let mut unfit = Vec::new();
                for document in documents {
                    if blocks::push(&mut rows, &document, None).is_err() {
                        unfit.push(document);
                    }
                }
                let block = encoder.encode(kind, instance.as_str(), &rows, keep)?;
                Ok::<_, MetricsError>((block, unfit))
            })?;
            blocks.extend(block);
            self.flat += unfit.len() as u64;
            check(&store.insert_flat(kind, &unfit).await?)?;
            if blocks.len() >= BLOCKS {
                check(&store.insert_blocks(&blocks).await?)?;
                blocks.clear();
            }
        }
        check(&store.insert_blocks(&blocks).await?)?;
        self.read += self.waiting as u64;
        self.waiting = 0;
        Ok(())
    }
}

fn check(unstored: &[Unstored]) -> Result<(), MetricsError> {
    unstored.first().map_or(Ok(()), |unstored| {
        Err(MetricsError::Refused(format!(
            "the database refused rows: {}",
            unstored.words
        )))
    })
}

/// Parses a line into a row with the documented fields, and adds an `_id` if the row has none.
fn row(line: &[u8], offset: UtcOffset) -> Result<Row, String> {
    let json: serde_json::Value =
        serde_json::from_slice(line).map_err(|error| format!("the line is not JSON: {error}"))?;
    let bson = Bson::try_from(json).map_err(|error| format!("the line is not Extended JSON: {error}"))?;
    let Bson::Document(mut row) = bson else {
        return Err("the line is not a JSON object".to_owned());
    };
    let text = |key: &str| {
        row.get_str(key)
            .map_err(|_| format!("`{key}` is missing or not a string"))
    };
    let instance: InstanceId = text("instance_id")?
        .parse()
        .map_err(|error| format!("instance_id {error}"))?;
    let date: CreateDate = text("create_date")?
        .parse()
        .map_err(|error| format!("create_date {error}"))?;
    let (kind, identity) = if row.contains_key("pid") {
        let started = number(&row, "running_time").unwrap_or(0.0);
        let pid = match row.get("pid") {
            Some(Bson::Int32(pid)) => u32::try_from(*pid).ok(),
            Some(Bson::Int64(pid)) => u32::try_from(*pid).ok(),
            _ => None,
        };
        let pid = pid.ok_or("`pid` is not a process id")?;
        (RowKind::Process, RowIdentity::Process { pid, started })
    } else if row.contains_key("proc") {
        (RowKind::Vm, RowIdentity::Vm)
    } else {
        return Err("neither a process row (it has no `pid`) nor a VM row (it has no `proc`)".to_owned());
    };
    let moment = date
        .moment(offset)
        .map_err(|error| format!("create_date {error}"))?;
    let at = micros_of(moment);
    if !row.contains_key("_id") {
        let second = at.div_euclid(1_000_000);
        row.insert("_id", row_id(instance.as_str(), date.as_str(), second, identity));
    }
    let document = RawDocumentBuf::try_from(&row).map_err(|error| error.to_string())?;
    Ok(Row {
        kind,
        instance,
        at,
        document,
    })
}

fn number(row: &Document, key: &str) -> Option<f64> {
    match row.get(key)? {
        Bson::Double(number) => Some(*number),
        Bson::Int32(number) => Some(f64::from(*number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<(RowKind, Document), String> {
        let row = row(line.as_bytes(), "+08:00".parse().unwrap())?;
        Ok((row.kind, row.document.try_into().unwrap()))
    }

    #[test]
    fn loaded_rows_keep_ids_and_types_of_the_export() {
        let line = r#"{"_id":{"$oid":"58690637594c10403e25b049"},"instance_id":"vm","create_date":"2017-01-01T21:37:59.680873","proc":95,"mem":{"$numberDouble":"8.0"}}"#;
        let (kind, row) = read(line).unwrap();
        assert_eq!(kind, RowKind::Vm);
        assert_eq!(
            row.get_object_id("_id").unwrap().to_hex(),
            "58690637594c10403e25b049"
        );
        assert_eq!(
            (row.get_i32("proc").unwrap(), row.get_f64("mem").unwrap()),
            (95, 8.0)
        );
    }

    #[test]
    fn loaded_row_without_id_gets_the_id_that_ingestion_would_give() {
        let line = r#"{"instance_id":"vm-1","create_date":"2017-01-01T21:37:59.001065","proc":95}"#;
        let (_, row) = read(line).unwrap();
        assert_eq!(
            row.get_object_id("_id").unwrap().to_hex(),
            "586906378b3cb134ee7c3336"
        );
    }

    #[test]
    fn invalid_line_is_rejected_with_reason() {
        for (line, reason) in [
            ("{", "the line is not JSON"),
            ("[1]", "the line is not a JSON object"),
            (
                r#"{"create_date":"2017-01-01T21:37:59.001065","proc":1}"#,
                "`instance_id` is missing",
            ),
            (
                r#"{"instance_id":"a.b","create_date":"2017-01-01T21:37:59.001065","proc":1}"#,
                "instance_id must",
            ),
            (
                r#"{"instance_id":"a","create_date":"2017-1-01T21:37:58.999841","proc":1}"#,
                "create_date must",
            ),
            (
                r#"{"instance_id":"a","create_date":"2017-01-01T21:37:59.001065"}"#,
                "neither",
            ),
            (
                r#"{"instance_id":"a","create_date":"2017-01-01T21:37:59.001065","pid":"1"}"#,
                "`pid`",
            ),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.starts_with(reason), "{line}: {error}");
        }
    }
}
