//! The `_id`s of a block's rows.

use crate::{
    Block, BlockError, Column, Kind, Place, RowId, RowIdentity,
    date::Date,
    id::{Key, row_id},
    layout,
    value::Value,
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
    mount_points: Column,
    stored: (Column, Column),
}

impl Block<'_> {
    /// Decodes what the `_id`s depend on. `instance` is the VM of the block.
    pub fn ids(&mut self, instance: &str) -> Result<Ids, BlockError> {
        let (mut pids, mut starts, mut mount_points) = Default::default();
        match self.kind() {
            Kind::Vm | Kind::Hypervisor => {}
            Kind::Process => (pids, starts) = (self.column("pid")?, self.column("running_time")?),
            Kind::Filesystem => mount_points = self.column("mount_point")?,
        }
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
            mount_points,
            stored: (self.column(layout::ID_TIME)?, self.column(layout::ID_REST)?),
        };
        if (0..self.len()).all(|row| ids.identity(row).is_some()) {
            Ok(ids)
        } else {
            Err(BlockError::Corrupt("a row has no valid pid or mount point"))
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
        let [processes, names, users] = &self.sums;
        let identity = RowIdentity::of(self.kind, |field| match field {
            "pid" => self.pids.get(row),
            "running_time" => self.starts.get(row),
            "processes" => processes.get(row),
            "cmd" => names.get(row),
            "user" => users.get(row),
            "mount_point" => self.mount_points.get(row),
            _ => Value::Missing,
        });
        identity.ok()
    }
}
