//! Collects rows that are to be encoded.

use std::{collections::HashMap, ops::RangeBounds, sync::Arc};

use crate::{
    Block, BlockError, Kind, MAX_COLUMNS, MAX_NAME, MAX_TEXT, Place, RowError, RowId, RowIdentity,
    date::Date,
    id::{Key, block_id, row_id},
    layout,
    value::{Cell, Type, Value},
};

/// Rows of one VM and one kind, in memory. A row takes some 16 bytes per field, and a text is kept once.
#[derive(Debug)]
pub struct Rows {
    pub(crate) kind: Kind,
    instance: String,
    /// By how many microseconds local time, in which `create_date`s are, is ahead of UTC.
    pub(crate) offset_micros: i64,
    dates: Vec<Date>,
    /// By how many microseconds the effective date of each row is earlier than its `create_date`.
    lags: Vec<i64>,
    /// Row ids that the block must store; `None` where the id can be computed from the row.
    ids: Vec<Option<RowId>>,
    keys: Vec<Key>,
    columns: Vec<Named>,
    pub(crate) texts: Vec<Arc<str>>,
    text_places: HashMap<Arc<str>, u32>,
    last_date: (String, Date),
}

/// The values of a field; rows beyond its end don't have the field.
#[derive(Debug)]
struct Named {
    name: Box<str>,
    cells: Vec<Cell>,
}

impl Rows {
    /// Creates an empty list. `offset_millis` is the UTC offset of `create_date`s.
    pub fn new(kind: Kind, instance: &str, offset_millis: i64) -> Self {
        Self {
            kind,
            instance: instance.to_owned(),
            offset_micros: offset_millis.saturating_mul(1000),
            dates: Vec::new(),
            lags: Vec::new(),
            ids: Vec::new(),
            keys: Vec::new(),
            columns: Vec::new(),
            texts: Vec::new(),
            text_places: HashMap::new(),
            last_date: (String::new(), Date(0)),
        }
    }

    pub fn len(&self) -> usize {
        self.dates.len()
    }

    pub fn is_empty(&self) -> bool {
        self.dates.is_empty()
    }

    /// Adds a row. `id` is its `_id`, or `None` if that is the one that [`row_id`] computes. `arrival` is when it
    /// arrived, in Unix microseconds, or `None` if its effective date is its `create_date`. The fields are all others
    /// but `instance_id`. After an error the list is as before.
    pub fn push<'a>(
        &mut self,
        create_date: &str,
        arrival: Option<i64>,
        id: Option<RowId>,
        fields: impl IntoIterator<Item = (&'a str, Value<'a>)>,
    ) -> Result<(), RowError> {
        if self.last_date.0 != create_date {
            self.last_date = (create_date.to_owned(), Date::parse(create_date)?);
        }
        let date = self.last_date.1;
        let row = self.len();
        let identity = match self.push_fields(row, fields) {
            Ok(identity) => identity,
            Err(error) => {
                for column in &mut self.columns {
                    column.cells.truncate(row);
                }
                return Err(error);
            }
        };
        let unix = date.local_micros() - self.offset_micros;
        self.dates.push(date);
        self.lags
            .push(arrival.map_or(0, |arrival| unix.saturating_sub(arrival).max(0)));
        self.keys.push(identity.key());
        self.ids.push(None);
        if let Some(id) = id
            && self.computed_id(row, create_date) != id
            && let Some(place) = self.ids.last_mut()
        {
            *place = Some(id);
        }
        Ok(())
    }

    fn push_fields<'a>(
        &mut self,
        row: usize,
        fields: impl IntoIterator<Item = (&'a str, Value<'a>)>,
    ) -> Result<RowIdentity, RowError> {
        let (mut pid, mut running_time) = (Value::Missing, Value::Missing);
        let (mut name, mut user, mut processes) = (Value::Missing, Value::Missing, Value::Missing);
        let mut mount_point = Value::Missing;
        for (place, (field, value)) in fields.into_iter().enumerate() {
            match field {
                "cmd" => name = value,
                "user" => user = value,
                "processes" => processes = value,
                "pid" => pid = value,
                "running_time" => running_time = value,
                "mount_point" => mount_point = value,
                _ => {}
            }
            if matches!(value, Value::Text(text) if text.len() > MAX_TEXT) {
                return Err(RowError::Text);
            }
            // Rows mostly have the same fields in the same order.
            let at = match self.columns.get(place) {
                Some(column) if *column.name == *field => place,
                _ => self.column(field)?,
            };
            let (texts, places) = (&mut self.texts, &mut self.text_places);
            let cell = Cell::new(&value, |text| intern(texts, places, text));
            if let Some(column) = self.columns.get_mut(at) {
                if column.cells.len() > row {
                    return Err(RowError::Field);
                }
                column.cells.resize(row, Cell::MISSING);
                column.cells.push(cell);
            }
        }
        RowIdentity::of(self.kind, |field| match field {
            "pid" => pid,
            "running_time" => running_time,
            "processes" => processes,
            "cmd" => name,
            "user" => user,
            "mount_point" => mount_point,
            _ => Value::Missing,
        })
    }

    /// The place of a column, which is added if there is none.
    fn column(&mut self, name: &str) -> Result<usize, RowError> {
        if let Some(at) = self.columns.iter().position(|column| *column.name == *name) {
            return Ok(at);
        }
        let allowed = !name.is_empty() && name.len() <= MAX_NAME && !layout::is_internal(name);
        if !allowed || self.columns.len() == MAX_COLUMNS {
            return Err(RowError::Field);
        }
        self.columns.push(Named {
            name: name.into(),
            cells: Vec::new(),
        });
        Ok(self.columns.len() - 1)
    }

    /// Adds all rows of a block, which must be one of the same VM.
    pub fn push_block(&mut self, block: &mut Block<'_>) -> Result<(), BlockError> {
        self.push_block_within(block, ..)
    }

    /// Adds the rows of a block that are in a range of places. The block must be one of the same VM. After an error the
    /// list is as before.
    pub fn push_block_within(
        &mut self,
        block: &mut Block<'_>,
        places: impl RangeBounds<Place>,
    ) -> Result<(), BlockError> {
        if block.kind() != self.kind {
            return Err(BlockError::Corrupt("it is a block of another kind"));
        }
        let ids = block.ids(&self.instance)?;
        let rows: Vec<usize> = (0..block.len())
            .filter(|row| places.contains(&ids.place(*row)))
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        let start = self.len();
        let names: Vec<String> = block.names().map(str::to_owned).collect();
        for name in &names {
            if let Err(error) = self.push_column(name, block, &rows) {
                for column in &mut self.columns {
                    column.cells.truncate(start);
                }
                return Err(error);
            }
        }
        for row in rows {
            let date = block.date(row);
            let unix = date.local_micros() - self.offset_micros;
            self.dates.push(date);
            self.lags.push(unix - block.effective(row));
            self.keys.push(ids.key(row));
            let stored = if block.offset_micros == self.offset_micros {
                ids.stored(row)
            } else {
                Some(ids.get(row))
            };
            self.ids.push(stored);
        }
        Ok(())
    }

    /// Adds the values of a field in the rows of a block.
    fn push_column(&mut self, name: &str, block: &mut Block<'_>, rows: &[usize]) -> Result<(), BlockError> {
        let start = self.len();
        let column = block.column(name)?;
        let at = self.column(name).map_err(|_| BlockError::TooLarge)?;
        let Some(Named { cells, .. }) = self.columns.get_mut(at) else {
            return Ok(());
        };
        cells.resize(start, Cell::MISSING);
        let (all, places) = (&mut self.texts, &mut self.text_places);
        // Only the texts of these rows are kept.
        let mut texts: Vec<Option<u32>> = vec![None; column.texts.len()];
        cells.extend(rows.iter().map(|row| {
            let cell = column.cell(*row);
            if cell.kind != Type::Text {
                return cell;
            }
            let index = usize::try_from(cell.bits).unwrap_or(usize::MAX);
            let Some(known) = texts.get_mut(index) else {
                return Cell::MISSING;
            };
            let text = *known.get_or_insert_with(|| intern(all, places, column.texts.get(index)));
            Cell {
                kind: Type::Text,
                bits: u64::from(text),
            }
        }));
        Ok(())
    }

    /// The `_id` of a row.
    pub fn id(&self, row: usize) -> RowId {
        self.stored_id(row)
            .unwrap_or_else(|| self.computed_id(row, &self.date(row).text().unwrap_or_default()))
    }

    /// The `_id`s of all rows.
    pub fn ids(&self) -> Vec<RowId> {
        let mut last = (Date(i64::MIN), String::new());
        let ids = (0..self.len()).map(|row| {
            let date = self.date(row);
            if last.0 != date {
                last = (date, date.text().unwrap_or_default());
            }
            self.stored_id(row)
                .unwrap_or_else(|| self.computed_id(row, &last.1))
        });
        ids.collect()
    }

    /// The id of a block of these rows, which depends on nothing but the VM, the kind and the `_id`s of the rows.
    pub fn block_id(&self) -> [u8; 16] {
        let mut ids = self.ids();
        ids.sort_unstable();
        ids.dedup();
        block_id(self.kind, &self.instance, &ids)
    }

    fn computed_id(&self, row: usize, create_date: &str) -> RowId {
        let second = (self.date(row).local_micros() - self.offset_micros).div_euclid(1_000_000);
        let identity = RowIdentity::of_key(self.kind, self.key(row));
        row_id(&self.instance, create_date, second, identity)
    }

    pub(crate) fn stored_id(&self, row: usize) -> Option<RowId> {
        self.ids.get(row).copied().flatten()
    }

    pub(crate) fn date(&self, row: usize) -> Date {
        self.dates.get(row).copied().unwrap_or(Date(0))
    }

    pub(crate) fn lag(&self, row: usize) -> i64 {
        self.lags.get(row).copied().unwrap_or(0)
    }

    pub(crate) fn key(&self, row: usize) -> Key {
        self.keys.get(row).copied().unwrap_or_default()
    }

    /// The effective date of a row, in Unix microseconds.
    pub(crate) fn effective(&self, row: usize) -> i64 {
        self.date(row).local_micros() - self.offset_micros - self.lag(row)
    }

    /// The columns, sorted by name.
    pub(crate) fn columns_by_name(&self) -> Vec<(&str, &[Cell])> {
        let columns = self.columns.iter();
        let mut columns: Vec<_> = columns.map(|column| (&*column.name, &*column.cells)).collect();
        columns.sort_unstable_by_key(|(name, _)| *name);
        columns
    }

    pub(crate) fn text(&self, index: u64) -> &str {
        let text = usize::try_from(index)
            .ok()
            .and_then(|index| self.texts.get(index));
        text.map_or("", |text| text)
    }
}

fn intern(texts: &mut Vec<Arc<str>>, places: &mut HashMap<Arc<str>, u32>, text: &str) -> u32 {
    if let Some(place) = places.get(text) {
        return *place;
    }
    let text: Arc<str> = text.into();
    let place = u32::try_from(texts.len()).unwrap_or(u32::MAX);
    texts.push(Arc::clone(&text));
    places.insert(text, place);
    place
}
