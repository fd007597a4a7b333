//! The ids that vmwatch computes: of rows, and of blocks of one sample.

use sha2::{Digest, Sha256};

use crate::{Kind, RowError, Value};

/// The `_id` of a row: the 12 bytes of an `ObjectId`.
pub type RowId = [u8; 12];

/// A pair of integers that is equal exactly for equal identities of one kind. It sorts rows by pid and start, and summed
/// rows last.
pub(crate) type Key = (u64, u64);

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
    /// A row that sums up processes with the same name and user.
    Sum {
        /// The hash of name and user that [`RowIdentity::sum`] computes.
        hash: u64,
    },
    /// A row with the values of one filesystem.
    Filesystem {
        /// The hash of the mount point that [`RowIdentity::filesystem`] computes.
        hash: u64,
    },
    /// A row with the values that the hypervisor measured of the VM.
    Hypervisor,
}

/// The part of the key that all summed rows share: greater than any pid.
const SUM_KEY: u64 = 1 << 32;

impl RowIdentity {
    /// The identity of a row that sums up processes with this name and user.
    pub fn sum(name: &str, user: Option<&str>) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"sum\0");
        hash.update(name.as_bytes());
        if let Some(user) = user {
            hash.update([0]);
            hash.update(user.as_bytes());
        }
        Self::Sum {
            hash: first_eight(hash),
        }
    }

    /// The identity of the row of the filesystem with this mount point.
    pub fn filesystem(mount_point: &str) -> Self {
        Self::Filesystem {
            hash: first_eight(Sha256::new_with_prefix(mount_point)),
        }
    }

    /// The identity of a row of this kind whose fields `field` returns.
    pub fn of<'a>(kind: Kind, field: impl Fn(&str) -> Value<'a>) -> Result<Self, RowError> {
        match kind {
            Kind::Vm => Ok(Self::Vm),
            Kind::Hypervisor => Ok(Self::Hypervisor),
            Kind::Process => Self::of_process(field),
            Kind::Filesystem => match field("mount_point") {
                Value::Text(mount_point) => Ok(Self::filesystem(mount_point)),
                _ => Err(RowError::MountPoint),
            },
        }
    }

    /// The identity of a process row. A row without a pid is a summed row if it has the field `processes`.
    fn of_process<'a>(field: impl Fn(&str) -> Value<'a>) -> Result<Self, RowError> {
        let pid = match field("pid") {
            Value::Missing => {
                return match (field("processes"), field("cmd"), field("user")) {
                    (Value::Missing, ..) => Err(RowError::Pid),
                    (_, Value::Text(name), Value::Text(user)) => Ok(Self::sum(name, Some(user))),
                    (_, Value::Text(name), _) => Ok(Self::sum(name, None)),
                    _ => Err(RowError::Pid),
                };
            }
            Value::Int32(pid) => u32::try_from(pid).ok(),
            Value::Int64(pid) => u32::try_from(pid).ok(),
            _ => None,
        };
        let started = match field("running_time") {
            Value::Double(started) => started,
            Value::Int32(started) => f64::from(started),
            _ => 0.0,
        };
        let pid = pid.ok_or(RowError::Pid)?;
        Ok(Self::Process { pid, started })
    }

    pub(crate) fn key(self) -> Key {
        match self {
            Self::Vm | Self::Hypervisor => (0, 0),
            Self::Process { pid, started } => (pid.into(), started.to_bits()),
            Self::Sum { hash } => (SUM_KEY, hash),
            Self::Filesystem { hash } => (0, hash),
        }
    }

    /// The identity of a row of this kind with this key.
    pub(crate) fn of_key(kind: Kind, (pid, rest): Key) -> Self {
        match (kind, u32::try_from(pid)) {
            (Kind::Vm, _) => Self::Vm,
            (Kind::Hypervisor, _) => Self::Hypervisor,
            (Kind::Process, Ok(pid)) => Self::Process {
                pid,
                started: f64::from_bits(rest),
            },
            (Kind::Process, Err(_)) => Self::Sum { hash: rest },
            (Kind::Filesystem, _) => Self::Filesystem { hash: rest },
        }
    }
}

/// The first eight bytes of a hash.
fn first_eight(hash: Sha256) -> u64 {
    let digest: [u8; 32] = hash.finalize().into();
    u64::from_be_bytes(digest.first_chunk().copied().unwrap_or_default())
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
    match identity {
        RowIdentity::Vm => {}
        RowIdentity::Process { pid, started } => {
            hash.update(pid.to_be_bytes());
            hash.update(started.to_bits().to_be_bytes());
        }
        RowIdentity::Sum { hash: of_name } => {
            hash.update(b"sum");
            hash.update(of_name.to_be_bytes());
        }
        RowIdentity::Filesystem { hash: of_mount_point } => {
            hash.update(b"filesystem");
            hash.update(of_mount_point.to_be_bytes());
        }
        RowIdentity::Hypervisor => hash.update(b"hypervisor"),
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
    fn row_of_the_hypervisor_has_another_id_than_the_row_of_the_agent() {
        let id = |kind| {
            let identity = RowIdentity::of(kind, |_| Value::Missing).unwrap();
            assert_eq!(RowIdentity::of_key(kind, identity.key()).key(), identity.key());
            row_id("vm-1", "2017-01-01T21:37:59.001065", 0x5869_0637, identity)
        };
        let hypervisor = id(Kind::Hypervisor);
        assert_ne!(hypervisor, id(Kind::Vm));
        // Otherwise rows that are redelivered after an upgrade would be stored twice.
        assert_eq!(
            hypervisor,
            [
                0x58, 0x69, 0x06, 0x37, 0xc3, 0x63, 0x7a, 0x04, 0xd1, 0xaf, 0x31, 0x4c
            ]
        );
    }

    #[test]
    fn identity_of_a_process_is_its_pid_and_start() {
        let key = |pid, start| {
            let identity = RowIdentity::of(Kind::Process, |name| match name {
                "pid" => pid,
                "running_time" => start,
                _ => Value::Missing,
            });
            identity.map(RowIdentity::key)
        };
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

    #[test]
    fn identity_of_a_summed_row_is_its_name_and_user() {
        let sum = |name, user| {
            let identity = RowIdentity::of(Kind::Process, |field| match field {
                "processes" => Value::Null,
                "cmd" => name,
                "user" => user,
                _ => Value::Missing,
            });
            identity.unwrap()
        };
        let one = sum(Value::Text("sh"), Value::Text("root"));
        assert_eq!(one.key(), RowIdentity::sum("sh", Some("root")).key());
        assert_eq!(RowIdentity::of_key(Kind::Process, one.key()).key(), one.key());
        let others = [
            sum(Value::Text("sh"), Value::Missing),
            sum(Value::Text("shr"), Value::Text("oot")),
            RowIdentity::Process { pid: 1, started: 0.0 },
        ];
        assert!(others.iter().all(|other| other.key() != one.key()));
        let id = row_id("vm-1", "2017-01-01T21:37:59.001065", 0x5869_0637, one);
        assert!(
            others
                .iter()
                .all(|other| { row_id("vm-1", "2017-01-01T21:37:59.001065", 0x5869_0637, *other) != id })
        );
    }

    #[test]
    fn identity_of_a_filesystem_is_its_mount_point() {
        let of = |mount_point| {
            RowIdentity::of(Kind::Filesystem, |field| match field {
                "mount_point" => mount_point,
                _ => Value::Missing,
            })
        };
        let root = of(Value::Text("/")).unwrap();
        assert_eq!(
            RowIdentity::of_key(Kind::Filesystem, root.key()).key(),
            root.key()
        );
        assert_ne!(of(Value::Text("/var")).unwrap().key(), root.key());
        for missing in [Value::Missing, Value::Null, Value::Int64(1)] {
            assert!(matches!(of(missing), Err(RowError::MountPoint)));
        }
        let id = |identity| row_id("vm-1", "2017-01-01T21:37:59.001065", 0x5869_0637, identity);
        // Otherwise rows that are redelivered after an upgrade would be stored twice.
        assert_eq!(
            id(root),
            [
                0x58, 0x69, 0x06, 0x37, 0xa6, 0x1c, 0xf0, 0xde, 0x2e, 0xba, 0xba, 0x2d
            ]
        );
        assert_ne!(id(root), id(RowIdentity::Vm));
        assert_ne!(id(root), id(RowIdentity::filesystem("/var")));
    }
}
