//! The kinds of rows.

use vmwatch_api::rows;
use vmwatch_blocks::Kind;

/// The two kinds of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RowKind {
    /// Rows with the values of VMs.
    Vm,
    /// Rows with the values of processes.
    Process,
}

impl RowKind {
    /// The kind in blocks.
    pub(crate) const fn in_blocks(self) -> Kind {
        match self {
            Self::Vm => Kind::Vm,
            Self::Process => Kind::Process,
        }
    }

    /// The value of the field `kind` of a block's document.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Process => "process",
        }
    }
}

impl From<rows::RowKind> for RowKind {
    fn from(kind: rows::RowKind) -> Self {
        match kind {
            rows::RowKind::Vm => Self::Vm,
            rows::RowKind::Process => Self::Process,
        }
    }
}
