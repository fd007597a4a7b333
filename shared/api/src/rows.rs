//! The method of metrics-svc that exports stored rows, page by page.

use serde::{Deserialize, Deserializer, Serialize};

use super::{
    Class, InstanceId, Method, MethodInfo, bounded_text,
    history::{TimeRange, query},
    hypervisor_samples::HYPERVISOR_ROW_KEYS,
    metrics::{FILESYSTEM_ROW_KEYS, PROCESS_ROW_KEYS, RowId, Rows, VM_EXPORT_KEYS},
    processes::ProcessName,
};
use crate::wire::Fault;

/// What stored rows describe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum RowKind {
    /// The VM itself.
    #[default]
    Vm,
    /// Its processes.
    Process,
    /// Its filesystems.
    Filesystem,
    /// The VM itself, as its hypervisor measured it.
    Hypervisor,
}

impl RowKind {
    /// The keys of these rows in exports.
    pub const fn export_keys(self) -> &'static [&'static str] {
        match self {
            Self::Vm => &VM_EXPORT_KEYS,
            Self::Process => &PROCESS_ROW_KEYS,
            Self::Filesystem => &FILESYSTEM_ROW_KEYS,
            Self::Hypervisor => &HYPERVISOR_ROW_KEYS,
        }
    }
}

/// Selects the rows of some processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowFilter {
    /// The processes with exactly this name.
    Name(ProcessName),
    /// The processes with this pid.
    Pid(u32),
}

/// Selects the rows of a VM in a time range.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowExportQuery {
    pub instance_id: InstanceId,
    pub kind: RowKind,
    /// Only rows of these processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<RowFilter>,
    pub range: TimeRange,
    /// Only rows after this position, which is where the previous page ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<ExportPosition>,
}

/// The position of a row in an export, which is sorted by effective date, then by `create_date` and id. The effective date
/// is the earlier of `create_date` and the arrival of the row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportPosition {
    /// Effective date of the row, Unix microseconds.
    pub effective_us: i64,
    /// The row's `create_date`. It is only compared with others, so it need not be a real date.
    #[serde(deserialize_with = "date_text")]
    pub create_date: String,
    pub id: RowId,
}

fn date_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    bounded_text(deserializer, "must be a text of at most 26 bytes", |text| {
        text.len() <= 26
    })
}

/// A page of stored rows, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RowExportPage {
    /// The rows with the keys of the documented API. A page that is not the last one may have no rows.
    pub rows: Rows,
    /// Position where this page ended; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<ExportPosition>,
}

/// Reads the stored rows of a VM in a time range, page by page.
#[derive(Debug)]
pub struct RowExport;

impl Method for RowExport {
    type Params = RowExportQuery;
    type Reply = RowExportPage;
    const INFO: MethodInfo = MethodInfo {
        class: Class::HeavyRead,
        ..query("metrics.rows.export")
    };

    fn instance(params: &RowExportQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<RowExportPage, Fault> {
        Ok(RowExportPage {
            rows: Rows::none()?,
            next: None,
        })
    }
}
