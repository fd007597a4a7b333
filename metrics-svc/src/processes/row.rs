//! Decodes stored process rows.

use bson::{RawBsonRef, RawDocument, oid::ObjectId};
use vmwatch_api::{
    metrics::{CpuSeconds, RowId, ShortLived},
    processes::{ProcessRow, ProcessRowKind},
};

use crate::{MetricsError, vm_row::number};

/// A process row, with its `_id` if that is an `ObjectId`.
pub(crate) struct StoredProcess {
    pub(super) id: Option<ObjectId>,
    pub(crate) row: ProcessRow,
    /// CPU time of the VM in the same interval.
    pub(crate) vm_cpu: Option<CpuSeconds>,
    /// How the agent measured processes that ended between two samples.
    pub(crate) short_lived: Option<ShortLived>,
}

impl StoredProcess {
    /// Id of the row, as used in cursors on the bus.
    pub(super) fn row_id(&self) -> Option<RowId> {
        RowId::new(&self.id?.to_hex())
    }
}

/// The fields with the usage of a process, without its name.
pub(super) const USAGE: [&str; 7] = [
    "pid",
    "cpu_util",
    "mem",
    "disk_read",
    "disk_write",
    "shutdown_time",
    "processes",
];

/// All fields that [`StoredProcess::read`] knows.
pub(super) const ALL: [&str; 21] = [
    "cmd",
    "pid",
    "cpu_util",
    "mem",
    "disk_read",
    "disk_write",
    "running_time",
    "shutdown_time",
    "cpu_seconds",
    "vm_user_seconds",
    "vm_nice_seconds",
    "vm_system_seconds",
    "user",
    "parent_pid",
    "unit",
    "container",
    "command_line",
    "owner_inherited",
    "exit_code",
    "processes",
    "short_lived",
];

/// Converts stored Unix seconds to Unix milliseconds.
pub(super) fn millis(seconds: RawBsonRef<'_>) -> Option<u64> {
    let seconds = number(seconds)?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the number is checked not to be negative, and `as` saturates"
    )]
    (seconds >= 0.0).then(|| (seconds * 1000.0).round() as u64)
}

impl StoredProcess {
    /// Decodes a stored process row. A missing measure becomes 0, and a missing name empty; rows written by agents have
    /// all of them.
    pub(crate) fn read(stored: &RawDocument) -> Result<Self, MetricsError> {
        let mut id = None;
        let mut row = ProcessRow::default();
        let (mut user, mut nice, mut system) = (None, None, None);
        let mut short_lived = None;
        for element in stored {
            let (key, value) = element?;
            match (key.as_str(), value) {
                ("_id", RawBsonRef::ObjectId(given)) => id = Some(given),
                ("cmd", RawBsonRef::String(text)) => text.clone_into(&mut row.name),
                ("pid", value) => row.pid = integer(value).unwrap_or(0),
                ("cpu_util", value) => row.cpu_util = number(value).unwrap_or(0.0),
                ("mem", value) => row.mem = number(value).unwrap_or(0.0),
                ("disk_read", value) => row.disk_read = number(value).unwrap_or(0.0),
                ("disk_write", value) => row.disk_write = number(value).unwrap_or(0.0),
                ("running_time", value) => row.started_ms = millis(value).unwrap_or(0),
                ("shutdown_time", value) => row.ended_ms = millis(value),
                ("cpu_seconds", value) => row.cpu_seconds = number(value),
                ("vm_user_seconds", value) => user = number(value),
                ("vm_nice_seconds", value) => nice = number(value),
                ("vm_system_seconds", value) => system = number(value),
                ("user", RawBsonRef::String(text)) => row.owner.user = Some(text.to_owned()),
                ("parent_pid", value) => row.owner.parent_pid = integer(value),
                ("unit", RawBsonRef::String(text)) => row.owner.unit = Some(text.to_owned()),
                ("container", RawBsonRef::String(text)) => row.owner.container = Some(text.to_owned()),
                ("command_line", RawBsonRef::String(text)) => row.owner.command_line = Some(text.to_owned()),
                ("owner_inherited", RawBsonRef::Boolean(truth)) => row.owner.inherited = truth,
                ("exit_code", value) => row.exit_code = integer(value),
                ("processes", value) => {
                    row.kind = ProcessRowKind::Sum;
                    row.processes = integer(value);
                }
                ("short_lived", RawBsonRef::String(name)) => short_lived = ShortLived::from_name(name),
                _ => {}
            }
        }
        let vm_cpu = user.zip(nice).zip(system);
        let vm_cpu = vm_cpu.map(|((user, nice), system)| CpuSeconds { user, nice, system });
        Ok(Self {
            id,
            row,
            vm_cpu,
            short_lived,
        })
    }
}

fn integer(value: RawBsonRef<'_>) -> Option<u32> {
    match value {
        RawBsonRef::Int32(number) => u32::try_from(number).ok(),
        RawBsonRef::Int64(number) => u32::try_from(number).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use bson::rawdoc;

    use super::*;

    #[test]
    fn process_row_is_decoded_whatever_number_types_it_uses() {
        let row = rawdoc! {
            "create_date": "2017-01-01T21:37:59.001065", "cmd": "lvmetad", "pid": 479_i64, "cpu_util": 1, "mem": 0.2,
            "running_time": 1_482_236_515.63, "shutdown_time": null, "disk_read": f64::NAN,
        };
        let StoredProcess { id, row, vm_cpu, .. } = StoredProcess::read(&row).unwrap();
        assert_eq!((id, vm_cpu, row.cpu_seconds), (None, None, None));
        assert_eq!(
            (row.name.as_str(), row.pid, row.cpu_util, row.disk_read),
            ("lvmetad", 479, 1.0, 0.0)
        );
        assert_eq!((row.started_ms, row.ended_ms), (1_482_236_515_630, None));
    }
}
