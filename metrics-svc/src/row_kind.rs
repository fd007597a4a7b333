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
    /// Rows with the values that hypervisors measured of VMs. They are only in blocks.
    Hypervisor,
}

impl RowKind {
    /// All kinds.
    pub(crate) const ALL: [Self; 4] = [Self::Vm, Self::Process, Self::Filesystem, Self::Hypervisor];
    /// The kinds that have a flat collection.
    pub(crate) const FLAT: [Self; 2] = [Self::Vm, Self::Process];

    /// The kind in blocks.
    pub(crate) const fn in_blocks(self) -> Kind {
        match self {
            Self::Vm => Kind::Vm,
            Self::Process => Kind::Process,
            Self::Filesystem => Kind::Filesystem,
            Self::Hypervisor => Kind::Hypervisor,
        }
    }

    /// The value of the field `kind` of a block's document.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Process => "process",
            Self::Filesystem => "filesystem",
            Self::Hypervisor => "hypervisor",
        }
    }

    /// The suffix of a collection that is derived from rows of this kind. What is derived from rows of hypervisors is in
    /// collections of its own, which older versions do not touch.
    pub(crate) fn derived(self, suffix: &str) -> String {
        match self {
            Self::Hypervisor => format!("hypervisor_{suffix}"),
            Self::Vm | Self::Process | Self::Filesystem => suffix.to_owned(),
        }
    }

    /// The kind whose retention applies: the rows of filesystems and of hypervisors are kept as long as those of their VM.
    pub(crate) const fn retained_as(self) -> Self {
        match self {
            Self::Vm | Self::Filesystem | Self::Hypervisor => Self::Vm,
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
            rows::RowKind::Hypervisor => Self::Hypervisor,
        }
    }
}
