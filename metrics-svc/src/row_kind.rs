//! The kinds of rows.

use vmwatch_api::rows;
use vmwatch_blocks::Kind;

/// The kinds of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RowKind {
    /// Rows with the values of VMs.
    Vm,
    /// Rows with the values of processes.
    Process,
    /// Rows with the values of filesystems. They are only in blocks.
    Filesystem,
}

impl RowKind {
    /// All kinds.
    pub(crate) const ALL: [Self; 3] = [Self::Vm, Self::Process, Self::Filesystem];
    /// The kinds that have a flat collection, and from which rollups and names are computed.
    pub(crate) const FLAT: [Self; 2] = [Self::Vm, Self::Process];

    /// The kind in blocks.
    pub(crate) const fn in_blocks(self) -> Kind {
        match self {
            Self::Vm => Kind::Vm,
            Self::Process => Kind::Process,
            Self::Filesystem => Kind::Filesystem,
        }
    }

    /// The value of the field `kind` of a block's document.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Process => "process",
            Self::Filesystem => "filesystem",
        }
    }

    /// The kind whose retention applies: the rows of filesystems are kept as long as those of their VM.
    pub(crate) const fn retained_as(self) -> Self {
        match self {
            Self::Vm | Self::Filesystem => Self::Vm,
            Self::Process => Self::Process,
        }
    }
}

impl From<rows::RowKind> for RowKind {
    fn from(kind: rows::RowKind) -> Self {
        match kind {
            rows::RowKind::Vm => Self::Vm,
            rows::RowKind::Process => Self::Process,
            rows::RowKind::Filesystem => Self::Filesystem,
        }
    }
}
