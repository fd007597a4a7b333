//! Decodes stored process rows.

use bson::{RawBsonRef, RawDocument, oid::ObjectId};
use vmwatch_api::{metrics::RowId, processes::ProcessRow};

use crate::{MetricsError, history::sums::number};

/// A process row, with its `_id` if that is an `ObjectId`.
pub(super) struct StoredProcess {
    pub(super) id: Option<ObjectId>,
    pub(super) row: ProcessRow,
}

impl StoredProcess {
    /// Id of the row, as used in cursors on the bus.
    pub(super) fn row_id(&self) -> Option<RowId> {
        RowId::new(&self.id?.to_hex())
    }
}

/// The fields that [`read`] needs.
pub(super) const COLUMNS: [&str; 8] = [
    "cmd",
    "pid",
    "cpu_util",
    "mem",
    "disk_read",
    "disk_write",
    "running_time",
    "shutdown_time",
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

/// Decodes a stored process row. A missing field becomes 0 or empty; rows written by agents have all fields.
pub(super) fn read(row: &RawDocument) -> Result<StoredProcess, MetricsError> {
    let mut id = None;
    let mut read = ProcessRow {
        name: String::new(),
        pid: 0,
        cpu_util: 0.0,
        mem: 0.0,
        disk_read: 0.0,
        disk_write: 0.0,
        started_ms: 0,
        ended_ms: None,
    };
    for element in row {
        let (key, value) = element?;
        match (key.as_str(), value) {
            ("_id", RawBsonRef::ObjectId(given)) => id = Some(given),
            ("cmd", RawBsonRef::String(text)) => text.clone_into(&mut read.name),
            ("pid", RawBsonRef::Int32(pid)) => read.pid = u32::try_from(pid).unwrap_or(0),
            ("pid", RawBsonRef::Int64(pid)) => read.pid = u32::try_from(pid).unwrap_or(0),
            ("cpu_util", value) => read.cpu_util = number(value).unwrap_or(0.0),
            ("mem", value) => read.mem = number(value).unwrap_or(0.0),
            ("disk_read", value) => read.disk_read = number(value).unwrap_or(0.0),
            ("disk_write", value) => read.disk_write = number(value).unwrap_or(0.0),
            ("running_time", value) => read.started_ms = millis(value).unwrap_or(0),
            ("shutdown_time", value) => read.ended_ms = millis(value),
            _ => {}
        }
    }
    Ok(StoredProcess { id, row: read })
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
        let StoredProcess { id, row } = read(&row).unwrap();
        assert_eq!(id, None);
        assert_eq!(
            (row.name.as_str(), row.pid, row.cpu_util, row.disk_read),
            ("lvmetad", 479, 1.0, 0.0)
        );
        assert_eq!((row.started_ms, row.ended_ms), (1_482_236_515_630, None));
    }
}
