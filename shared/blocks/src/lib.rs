//! Blocks: rows of one VM and one kind as compressed columns. This crate knows no database and no network; metrics-svc
//! stores blocks, and agents send samples in the same encoding. docs/block-format.md describes the bytes.
//!
//! ```text
//! Rows::push, Rows::push_block ─> Encoder::encode ─> bytes ─> Block::open ─> Block::column, Block::ids, Block::sorted
//! ```
//!
//! A decoded row has exactly the values that were given, with their types. The same rows make the same bytes, whatever
//! their order. Decoding hostile bytes returns rows or an error, in memory that the caller limits.

#![expect(
    missing_docs,
    reason = "the names of most types and fields are sufficient documentation"
)]

mod block;
mod bytes;
mod column;
mod date;
mod encode;
mod id;
mod ids;
mod layout;
mod numbers;
mod rows;
mod sample;
mod sort;
mod value;

use std::ops::Range;

pub use self::{
    block::{Block, Column},
    encode::{Encoded, Encoder},
    id::{RowId, RowIdentity, row_id},
    ids::Ids,
    rows::Rows,
    sample::{SAMPLE_CONTENT_TYPE, SAMPLE_LIMITS, SampleHead, decode_sample, encode_sample, sample_head},
    sort::Place,
    value::Value,
};

/// Maximum number of rows of a block.
pub const MAX_ROWS: usize = 65_536;
/// Maximum number of different fields of the rows of a block.
pub const MAX_COLUMNS: usize = 64;
/// Maximum length of a field's name, in bytes.
pub const MAX_NAME: usize = 256;
/// Maximum length of a text, in bytes.
pub const MAX_TEXT: usize = 4096;

/// The first bytes of a block.
const MAGIC: [u8; 3] = *b"VMB";
/// The version of the format, which follows the magic.
const VERSION: u8 = 1;
/// The place of the checksum, the same in all versions.
const CHECKSUM: Range<usize> = 4..8;

/// The kind of a block's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Rows of the VM itself.
    Vm,
    /// Rows of its processes.
    Process,
    /// Rows of its filesystems.
    Filesystem,
    /// Rows that its hypervisor measured.
    Hypervisor,
}

impl Kind {
    /// The number that stands for the kind in blocks.
    pub const fn code(self) -> u8 {
        match self {
            Self::Vm => 1,
            Self::Process => 2,
            Self::Filesystem => 3,
            Self::Hypervisor => 4,
        }
    }

    /// The kind with this number.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Vm),
            2 => Some(Self::Process),
            3 => Some(Self::Filesystem),
            4 => Some(Self::Hypervisor),
            _ => None,
        }
    }

    /// Whether a sample has several rows of this kind, which blocks group by what they describe. In the names of this
    /// crate, a mount point is also a process.
    pub(crate) const fn is_grouped(self) -> bool {
        matches!(self, Self::Process | Self::Filesystem)
    }
}

/// How much of a block may be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of rows; never more than [`MAX_ROWS`].
    pub rows: usize,
    /// Maximum number of bytes that decompressed sections and decoded values may take together.
    pub bytes: usize,
}

/// Why bytes cannot be decoded as a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The block was damaged, or the bytes never were a block.
    #[error("the block is corrupt: {0}")]
    Corrupt(&'static str),
    /// A newer version of vmwatch wrote the block.
    #[error("the block has format version {0}, which is newer than this program")]
    NewerVersion(u8),
    /// A declared size exceeds a limit.
    #[error("the block is larger than allowed")]
    TooLarge,
}

/// Why no block can hold a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// The date of the row is not one.
    #[error("create_date must be a date such as 2017-01-01T21:37:59.001065")]
    Date,
    /// The row has no pid, or an invalid one.
    #[error("pid must be an integer from 0 to 4294967295")]
    Pid,
    /// The row of a filesystem has no mount point.
    #[error("mount_point must be a text")]
    MountPoint,
    /// A field appears twice, has a name that is not allowed, or is one more than a block can hold.
    #[error("a block cannot hold a field of the row, because of its name or because there are too many")]
    Field,
    /// A text of the row is too long.
    #[error("a text of the row is longer than {MAX_TEXT} bytes")]
    Text,
}
