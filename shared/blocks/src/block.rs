//! Reads blocks.

use std::{cell::RefCell, ops::Range, sync::Arc};

use zstd::bulk::Decompressor;

use crate::{
    BlockError, CHECKSUM, Kind, Limits, MAGIC, MAX_COLUMNS, MAX_ROWS, VERSION,
    bytes::Reader,
    column::{Texts, read_cells},
    date::Date,
    layout::{self, ONE_SECTION_ROWS},
    numbers::read_integers,
    value::{Cell, Value},
};

thread_local! {
    /// The memory for decompression, some 160 KB for each thread that decodes blocks. Setting it up for each block would
    /// take longer than decoding a small one.
    static ZSTD: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// A block whose columns are decoded when they are asked for.
///
/// Rows are numbered from 0 in the order in which they are stored, by process and then by date; [`Block::sorted`]
/// returns them in the order of answers.
pub struct Block<'a> {
    kind: Kind,
    rows: usize,
    pub(crate) offset_micros: i64,
    dates: Vec<Date>,
    /// The index of each row's date.
    samples: Arc<[u32]>,
    /// The index of each row's process; empty if the rows have none.
    processes: Arc<[u32]>,
    process_count: usize,
    /// By how many microseconds the effective dates are earlier than the dates, where a row has such a difference.
    lags: Column,
    columns: Vec<Place<'a>>,
    sections: Vec<Section<'a>>,
    /// Decompressed content of the only section.
    whole: Option<Vec<u8>>,
    /// The number of bytes that may still be decoded.
    budget: usize,
}

/// Where a column is.
#[derive(Debug, Clone)]
struct Place<'a> {
    name: &'a str,
    section: usize,
    range: Range<usize>,
}

/// Compressed content, and its length when it is decompressed.
#[derive(Debug, Clone, Copy)]
struct Section<'a> {
    bytes: &'a [u8],
    length: usize,
}

/// The values of a field in all rows of a block.
#[derive(Debug, Clone, Default)]
pub struct Column {
    cells: Vec<Cell>,
    pub(crate) texts: Texts,
    /// Which cell a row has, if that is not the cell with its number.
    group: Option<Arc<[u32]>>,
}

impl Column {
    /// The value of a row; `Missing` if there is no such row.
    pub fn get(&self, row: usize) -> Value<'_> {
        self.cell(row).value(|index| self.texts.get(index))
    }

    pub(crate) fn cell(&self, row: usize) -> Cell {
        let at = match &self.group {
            None => Some(row),
            Some(group) => group.get(row).map(|at| *at as usize),
        };
        at.and_then(|at| self.cells.get(at))
            .copied()
            .unwrap_or(Cell::MISSING)
    }
}

impl<'a> Block<'a> {
    /// Checks the block, and reads how many rows it has and when they are from. Their values are decoded later; in
    /// total, no more bytes are decoded than the limits allow.
    pub fn open(bytes: &'a [u8], limits: Limits) -> Result<Self, BlockError> {
        let mut reader = Reader(unseal(bytes, MAGIC, VERSION)?);
        let kind = Kind::from_code(reader.byte()?).ok_or(BlockError::Corrupt("its kind is unknown"))?;
        let rows = reader.size(limits.rows.min(MAX_ROWS))?;
        let offset_micros = reader.signed()?;
        let date_count = reader.size(rows)?;
        let process_count = reader.size(rows)?;
        let in_range = (-86_400_000_000..=86_400_000_000).contains(&offset_micros);
        if !in_range || (!kind.is_grouped() && process_count > 0) {
            return Err(BlockError::Corrupt("its head has invalid values"));
        }
        let (columns, sections) = read_places(&mut reader, rows, limits.bytes)?;
        let mut block = Self {
            kind,
            rows,
            offset_micros,
            dates: Vec::new(),
            samples: Arc::default(),
            processes: Arc::default(),
            process_count,
            lags: Column::default(),
            columns,
            sections,
            whole: None,
            budget: limits.bytes,
        };
        block.read_structure(date_count)?;
        Ok(block)
    }

    fn read_structure(&mut self, date_count: usize) -> Result<(), BlockError> {
        let dates = self.integers(layout::DATES, date_count)?;
        self.dates = dates.into_iter().map(Date).collect();
        if !self.dates.iter().all(|date| date.is_valid()) {
            return Err(BlockError::Corrupt("a date is invalid"));
        }
        let sample = |sample: i64| {
            let index = u32::try_from(sample).ok()?;
            (usize::try_from(index).ok()? < date_count).then_some(index)
        };
        let samples = self.integers(layout::SAMPLES, self.rows)?;
        let samples: Option<Vec<u32>> = samples.into_iter().map(sample).collect();
        self.samples = samples.ok_or(BlockError::Corrupt("a row has no date"))?.into();
        if self.kind.is_grouped() {
            let mut processes = Vec::with_capacity(self.rows);
            for (process, length) in (0..).zip(self.integers(layout::PROCESSES, self.process_count)?) {
                let left = self.rows - processes.len();
                let length = usize::try_from(length).ok().filter(|length| *length <= left);
                let length = length.ok_or(BlockError::Corrupt("processes have more rows than the block"))?;
                processes.extend(std::iter::repeat_n(process, length));
            }
            if processes.len() < self.rows {
                return Err(BlockError::Corrupt("a row has no process"));
            }
            self.processes = processes.into();
        }
        self.lags = self.column(layout::LAG)?;
        Ok(())
    }

    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Number of rows.
    pub const fn len(&self) -> usize {
        self.rows
    }

    pub const fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// The names of all fields that a row has a value for, besides `_id`, `create_date` and `instance_id`.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        let names = self.columns.iter().map(|place| place.name);
        names.filter(|name| !layout::is_internal(name))
    }

    /// Decodes a field; all its values are `Missing` if no row has it.
    pub fn column(&mut self, name: &str) -> Result<Column, BlockError> {
        let Some(content) = self.content(name)? else {
            return Ok(Column::default());
        };
        let mut reader = Reader(&content);
        let (count, group) = match reader.byte()? {
            layout::BY_ROW => (self.rows, None),
            layout::BY_SAMPLE => (self.dates.len(), Some(Arc::clone(&self.samples))),
            layout::BY_PROCESS => (self.process_count, Some(Arc::clone(&self.processes))),
            _ => return Err(BlockError::Corrupt("a column has an unknown form")),
        };
        spend(&mut self.budget, count.saturating_mul(size_of::<Cell>()))?;
        let (cells, texts) = read_cells(&mut reader, count)?;
        reader.end()?;
        Ok(Column { cells, texts, group })
    }

    fn integers(&mut self, name: &str, count: usize) -> Result<Vec<i64>, BlockError> {
        let content = self
            .content(name)?
            .ok_or(BlockError::Corrupt("it lacks a column that each block has"))?;
        spend(&mut self.budget, count.saturating_mul(size_of::<i64>()))?;
        let mut reader = Reader(&content);
        let numbers = read_integers(&mut reader, count)?;
        reader.end()?;
        Ok(numbers)
    }

    /// The decompressed content of a column.
    fn content(&mut self, name: &str) -> Result<Option<Vec<u8>>, BlockError> {
        let Some(place) = self.columns.iter().find(|place| place.name == name) else {
            return Ok(None);
        };
        let short = BlockError::Corrupt("it ends too early");
        let section = *self.sections.get(place.section).ok_or(short)?;
        if self.rows >= ONE_SECTION_ROWS {
            return self.decompress(section).map(Some);
        }
        let range = place.range.clone();
        if self.whole.is_none() {
            self.whole = Some(self.decompress(section)?);
        }
        let whole = self.whole.as_deref().unwrap_or_default();
        whole
            .get(range)
            .map(|content| Some(content.to_vec()))
            .ok_or(short)
    }

    fn decompress(&mut self, Section { bytes, length }: Section<'_>) -> Result<Vec<u8>, BlockError> {
        spend(&mut self.budget, length)?;
        if bytes.len() == length {
            return Ok(bytes.to_vec());
        }
        let corrupt = BlockError::Corrupt("a section cannot be decompressed");
        let content = ZSTD.with_borrow_mut(|zstd| {
            let zstd = match zstd {
                Some(zstd) => zstd,
                None => zstd.insert(Decompressor::new()?),
            };
            zstd.decompress(bytes, length)
        });
        content
            .ok()
            .filter(|content| content.len() == length)
            .ok_or(corrupt)
    }

    pub(crate) fn date(&self, row: usize) -> Date {
        let sample = self.samples.get(row).map(|sample| *sample as usize);
        let date = sample.and_then(|sample| self.dates.get(sample));
        date.copied().unwrap_or(Date(0))
    }

    /// The number of bytes that may still be decoded.
    pub const fn bytes_left(&self) -> usize {
        self.budget
    }

    /// The rows with this `create_date`, in the order in which they are stored.
    pub fn rows_dated(&self, create_date: &str) -> Vec<usize> {
        let Ok(date) = Date::parse(create_date) else {
            return Vec::new();
        };
        if self.dates.binary_search(&date).is_err() {
            return Vec::new();
        }
        (0..self.rows).filter(|row| self.date(*row) == date).collect()
    }

    /// The `create_date` of a row, as it was given.
    pub fn create_date(&self, row: usize) -> String {
        self.date(row).text().unwrap_or_default()
    }

    /// The effective date of a row, in Unix microseconds.
    pub fn effective(&self, row: usize) -> i64 {
        let lag = self.lags.cell(row).bits.cast_signed();
        (self.date(row).local_micros() - self.offset_micros).saturating_sub(lag)
    }

    /// The rows with an effective date in this range, in the order in which they are stored.
    pub fn rows_within(&self, range: Range<i64>) -> Vec<usize> {
        let within = |row: &usize| range.contains(&self.effective(*row));
        (0..self.rows).filter(within).collect()
    }

    /// The rows with an effective date in this range, the oldest first: by effective date, `create_date` and `_id`.
    pub fn sorted(&self, ids: &super::Ids, range: Range<i64>) -> Vec<usize> {
        let mut rows = self.rows_within(range);
        rows.sort_by_cached_key(|row| (self.effective(*row), self.date(*row), ids.get(*row)));
        rows
    }
}

impl std::fmt::Debug for Block<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut block = f.debug_struct("Block");
        block.field("kind", &self.kind).field("rows", &self.rows);
        block.finish_non_exhaustive()
    }
}

/// Checks magic, checksum and version, and returns what follows them.
pub(crate) fn unseal(bytes: &[u8], magic: [u8; 3], version: u8) -> Result<&[u8], BlockError> {
    let mut reader = Reader(bytes);
    if reader.take(magic.len())? != magic {
        return Err(BlockError::Corrupt("it does not begin like a block"));
    }
    let found = reader.byte()?;
    if reader.take(CHECKSUM.len())? != layout::checksum(bytes) {
        return Err(BlockError::Corrupt("its checksum is wrong"));
    }
    match found {
        _ if found == version => Ok(reader.0),
        _ if found > version => Err(BlockError::NewerVersion(found)),
        _ => Err(BlockError::Corrupt("its version is unknown")),
    }
}

/// Reads where the columns are, and checks that their sizes are within the limit.
fn read_places<'a>(
    reader: &mut Reader<'a>,
    rows: usize,
    most: usize,
) -> Result<(Vec<Place<'a>>, Vec<Section<'a>>), BlockError> {
    // The columns of the block itself come on top of those of the rows.
    let count = reader.size(MAX_COLUMNS + 16)?;
    let one_section = rows < ONE_SECTION_ROWS;
    let mut columns = Vec::with_capacity(count);
    let mut lengths = Vec::with_capacity(count);
    let mut total = 0;
    for section in 0..count {
        let name = layout::read_name(reader)?;
        let length = reader.size(most - total)?;
        let start = if one_section { total } else { 0 };
        total += length;
        lengths.push(length);
        // Columns that this version does not know are skipped.
        if let Some(name) = name {
            columns.push(Place {
                name,
                section: if one_section { 0 } else { section },
                range: start..start + length,
            });
        }
    }
    if one_section {
        lengths = vec![total];
    }
    let mut sections = Vec::with_capacity(lengths.len());
    for length in lengths {
        let written = reader.size(length)?;
        let bytes = reader.take(written)?;
        sections.push(Section { bytes, length });
    }
    reader.end()?;
    Ok((columns, sections))
}

/// Takes bytes off the budget for decoding.
fn spend(budget: &mut usize, bytes: usize) -> Result<(), BlockError> {
    *budget = budget.checked_sub(bytes).ok_or(BlockError::TooLarge)?;
    Ok(())
}
