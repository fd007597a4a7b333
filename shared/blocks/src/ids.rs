//! The `_id`s of a block's rows.

use crate::{
    Block, BlockError, Column, Kind, Place, RowId, RowIdentity,
    date::Date,
    id::{Key, row_id},
    layout,
    value::{Type, Value},
};

/// Returns the `_id` of each row of a block. Most are computed when they are asked for.
#[derive(Debug)]
pub struct Ids {
    instance: String,
    kind: Kind,
    offset_micros: i64,
    dates: Vec<Date>,
    pids: Column,
    starts: Column,
    /// Numbers of processes, names and users, which only summed rows need.
    sums: [Column; 3],
    stored: (Column, Column),
}

impl Block<'_> {
    /// Decodes what the `_id`s depend on. `instance` is the VM of the block.
    pub fn ids(&mut self, instance: &str) -> Result<Ids, BlockError> {
        let (pids, starts) = match self.kind() {
            Kind::Vm => (Column::default(), Column::default()),
            Kind::Process => (self.column("pid")?, self.column("running_time")?),
        };
        let has_sums = self.kind() == Kind::Process
            && (0..self.len()).any(|row| matches!(pids.get(row), Value::Missing));
        let sums = if has_sums {
            [
                self.column("processes")?,
                self.column("cmd")?,
                self.column("user")?,
            ]
        } else {
            Default::default()
        };
        let ids = Ids {
            instance: instance.to_owned(),
            kind: self.kind(),
            offset_micros: self.offset_micros,
            dates: (0..self.len()).map(|row| self.date(row)).collect(),
            pids,
            starts,
            sums,
            stored: (self.column(layout::ID_TIME)?, self.column(layout::ID_REST)?),
        };
        if (0..self.len()).all(|row| ids.identity(row).is_some()) {
            Ok(ids)
        } else {
            Err(BlockError::Corrupt("a row has no valid pid"))
        }
    }
}

impl Ids {
    /// The `_id` of a row.
    pub fn get(&self, row: usize) -> RowId {
        if let Some(stored) = self.stored(row) {
            return stored;
        }
        let date = self.dates.get(row).copied().unwrap_or(Date(0));
        let second = (date.local_micros() - self.offset_micros).div_euclid(1_000_000);
        let identity = self.identity(row).unwrap_or(RowIdentity::Vm);
        row_id(&self.instance, &date.text().unwrap_or_default(), second, identity)
    }

    /// The place of a row in the order in which blocks store rows.
    pub fn place(&self, row: usize) -> Place {
        Place {
            process: self.key(row),
            date: self.dates.get(row).copied().unwrap_or(Date(0)),
        }
    }

    /// The `_id` of a row if it is not the computed one.
    pub(crate) fn stored(&self, row: usize) -> Option<RowId> {
        let (Value::Int64(time), Value::Int64(rest)) = (self.stored.0.get(row), self.stored.1.get(row))
        else {
            return None;
        };
        let [_, _, _, _, a, b, c, d] = time.to_be_bytes();
        let mut id = [0; 12];
        let (head, tail) = id.split_at_mut(4);
        head.copy_from_slice(&[a, b, c, d]);
        tail.copy_from_slice(&rest.to_be_bytes());
        Some(id)
    }

    /// What distinguishes a row from others of its sample.
    pub(crate) fn key(&self, row: usize) -> Key {
        self.identity(row).map(RowIdentity::key).unwrap_or_default()
    }

    fn identity(&self, row: usize) -> Option<RowIdentity> {
        let start = self.starts.cell(row);
        let start = if start.kind == Type::Text {
            Value::Null
        } else {
            start.value(|_| "")
        };
        let sum = || self.sums.each_ref().map(|column| column.get(row));
        RowIdentity::of(self.kind, self.pids.get(row), start, sum).ok()
    }
}
