//! Parts of the format that the encoder and the decoder share: names of columns, and the checksum.

use crate::{
    BlockError, CHECKSUM, MAX_NAME,
    bytes::{Reader, push_varint},
};

/// A block with fewer rows than this is compressed as a whole, and one with more rows column by column.
pub(crate) const ONE_SECTION_ROWS: usize = 1024;

/// One value for each row.
pub(crate) const BY_ROW: u8 = 0;
/// One value for each different date.
pub(crate) const BY_SAMPLE: u8 = 1;
/// One value for each process.
pub(crate) const BY_PROCESS: u8 = 2;

// Columns of the block itself. Their names cannot be those of fields, which don't contain line breaks.
/// The different dates of the rows.
pub(crate) const DATES: &str = "\ndates";
/// The index of each row's date.
pub(crate) const SAMPLES: &str = "\nsamples";
/// The number of rows of each process.
pub(crate) const PROCESSES: &str = "\nprocesses";
/// By how many microseconds the effective date is earlier than `create_date`.
pub(crate) const LAG: &str = "\nlag";
/// The first four bytes of ids that are not computed.
pub(crate) const ID_TIME: &str = "\nid time";
/// The last eight bytes of ids that are not computed.
pub(crate) const ID_REST: &str = "\nid rest";

/// Columns whose name is written as one byte: the position in this list, plus 1. New names may only be appended.
const KNOWN: [&str; 45] = [
    DATES,
    SAMPLES,
    PROCESSES,
    LAG,
    ID_TIME,
    ID_REST,
    "net_incoming",
    "net_outgoing",
    "cpu_util",
    "mem",
    "disk_read",
    "disk_write",
    "proc",
    "cmd",
    "pid",
    "running_time",
    "shutdown_time",
    "dropped_parts",
    "restricted",
    "cpu_seconds",
    "vm_user_seconds",
    "vm_nice_seconds",
    "vm_system_seconds",
    "user",
    "parent_pid",
    "unit",
    "container",
    "command_line",
    "cores",
    "steal",
    "load",
    "swap",
    "pressure_cpu",
    "pressure_mem",
    "pressure_io",
    "mount_point",
    "filesystem",
    "used_bytes",
    "total_bytes",
    "processes",
    "exit_code",
    "owner_inherited",
    "short_lived",
    "lost_exit_records",
    "hypervisor",
];

/// Appends the name of a column.
pub(crate) fn push_name(out: &mut Vec<u8>, name: &str) {
    let known = (1_u8..).zip(KNOWN).find(|(_, known)| *known == name);
    if let Some((code, _)) = known {
        out.push(code);
    } else {
        out.push(0);
        push_varint(out, name.len() as u64);
        out.extend_from_slice(name.as_bytes());
    }
}

/// Reads the name of a column; `None` if it has a code that this version does not know.
pub(crate) fn read_name<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a str>, BlockError> {
    match reader.byte()?.checked_sub(1) {
        None => reader.text(MAX_NAME).map(Some),
        Some(code) => Ok(KNOWN.get(usize::from(code)).copied()),
    }
}

/// Returns whether the column belongs to the block itself and is not a field of rows.
pub(crate) fn is_internal(name: &str) -> bool {
    name.starts_with('\n')
}

/// Writes the checksum of a finished message into its place.
pub(crate) fn seal(bytes: &mut [u8]) {
    let checksum = checksum(bytes);
    if let Some(place) = bytes.get_mut(CHECKSUM) {
        place.copy_from_slice(&checksum);
    }
}

/// CRC-32 of everything but the checksum itself.
pub(crate) fn checksum(bytes: &[u8]) -> [u8; 4] {
    let mut crc = crc32fast::Hasher::new();
    crc.update(bytes.get(..CHECKSUM.start).unwrap_or_default());
    crc.update(bytes.get(CHECKSUM.end..).unwrap_or_default());
    crc.finalize().to_le_bytes()
}
