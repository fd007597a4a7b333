//! The ids that vmwatch computes: of rows, and of blocks of one sample.

use sha2::{Digest, Sha256};

use crate::{Kind, RowError, Value};

/// The `_id` of a row: the 12 bytes of an `ObjectId`.
pub type RowId = [u8; 12];

/// What distinguishes the rows of one sample. A pid alone is not enough, because pids are reused even within a sample:
/// a process may end, and another may start with the same pid.
#[derive(Debug, Clone, Copy)]
pub enum RowIdentity {
    /// A row with the values of the VM itself.
    Vm,
    /// A row with the values of one process.
    Process {
        /// The process id (pid).
        pid: u32,
        /// Start time of the process, in Unix seconds.
        started: f64,
    },
}

impl RowIdentity {
    /// The identity of a row of this kind with these fields.
    pub fn of(kind: Kind, pid: Value<'_>, running_time: Value<'_>) -> Result<Self, RowError> {
        let pid = match (kind, pid) {
            (Kind::Vm, _) => return Ok(Self::Vm),
            (Kind::Process, Value::Int32(pid)) => u32::try_from(pid).ok(),
            (Kind::Process, Value::Int64(pid)) => u32::try_from(pid).ok(),
            _ => None,
        };
        let started = match running_time {
            Value::Double(started) => started,
            Value::Int32(started) => f64::from(started),
            _ => 0.0,
        };
        let pid = pid.ok_or(RowError::Pid)?;
        Ok(Self::Process { pid, started })
    }

    /// A pair of integers that is equal exactly for equal identities. It sorts rows by pid and start.
    pub(crate) fn key(self) -> (u32, u64) {
        match self {
            Self::Vm => (0, 0),
            Self::Process { pid, started } => (pid, started.to_bits()),
        }
    }
}

/// Computes the `_id` of a row: the Unix second of the sample, as in any `ObjectId`, followed by 8 bytes of a SHA-256
/// hash of the row's identity. The same row always gets the same id, so that a sample that is delivered twice is stored
/// once.
pub fn row_id(instance: &str, create_date: &str, unix_second: i64, identity: RowIdentity) -> RowId {
    let mut hash = Sha256::new();
    // The separator between the hashed values cannot occur in an instance id or a date.
    hash.update(instance.as_bytes());
    hash.update([0]);
    hash.update(create_date.as_bytes());
    hash.update([0]);
    if let RowIdentity::Process { pid, started } = identity {
        hash.update(pid.to_be_bytes());
        hash.update(started.to_bits().to_be_bytes());
    }
    let digest: [u8; 32] = hash.finalize().into();
    // 32 bits for the second suffice until 2106, as in any `ObjectId`.
    let second = u32::try_from(unix_second).unwrap_or(0);
    let mut bytes = [0; 12];
    let (head, tail) = bytes.split_at_mut(4);
    head.copy_from_slice(&second.to_be_bytes());
    tail.copy_from_slice(digest.first_chunk::<8>().unwrap_or(&[0; 8]));
    bytes
}

/// Computes the id of a block from the sorted ids of its rows: 16 bytes of a SHA-256 hash.
pub(crate) fn block_id(kind: Kind, instance: &str, rows: &[RowId]) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update([kind.code()]);
    hash.update(instance.as_bytes());
    hash.update([0]);
    for id in rows {
        hash.update(id);
    }
    let digest: [u8; 32] = hash.finalize().into();
    *digest.first_chunk().unwrap_or(&[0; 16])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_id_never_changes() {
        // Otherwise rows that are redelivered after an upgrade would be stored twice.
        let vm = row_id("vm-1", "2017-01-01T21:37:59.001065", 0x5869_0637, RowIdentity::Vm);
        assert_eq!(
            vm,
            [
                0x58, 0x69, 0x06, 0x37, 0x8b, 0x3c, 0xb1, 0x34, 0xee, 0x7c, 0x33, 0x36
            ]
        );
    }

    #[test]
    fn identity_of_a_process_is_its_pid_and_start() {
        let key = |pid, start| RowIdentity::of(Kind::Process, pid, start).map(RowIdentity::key);
        let double = key(Value::Int32(7), Value::Double(5.0));
        assert_eq!(double, key(Value::Int64(7), Value::Int32(5)));
        assert_ne!(double, key(Value::Int32(7), Value::Null));
        for pid in [
            Value::Int32(-1),
            Value::Int64(1 << 32),
            Value::Text("7"),
            Value::Missing,
        ] {
            assert_eq!(key(pid, Value::Null), Err(RowError::Pid));
        }
    }
}
