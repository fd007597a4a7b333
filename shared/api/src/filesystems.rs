//! The method of metrics-svc that reads the filesystems of a VM.

use serde::{Deserialize, Serialize};

use super::{InstanceId, Method, MethodInfo, history::query, metrics::FilesystemSample};
use crate::{Class, wire::Fault};

/// Selects the filesystems of a VM at a given time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesystemsAtQuery {
    pub instance_id: InstanceId,
    /// Time at which to read the filesystems; the current time if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_ms: Option<u64>,
}

/// The filesystems of a VM at a given time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystems {
    /// Time of the sample: the requested time or the latest sample with filesystems before it; null if there is no such
    /// sample.
    pub at_ms: Option<u64>,
    /// The filesystems, sorted by mount point.
    pub filesystems: Vec<FilesystemSample>,
}

/// Reads the filesystems from the newest sample at or before the given time that has any, up to seven days earlier.
#[derive(Debug)]
pub struct FilesystemsAt;

impl Method for FilesystemsAt {
    type Params = FilesystemsAtQuery;
    type Reply = Filesystems;
    const INFO: MethodInfo = MethodInfo {
        class: Class::CheapRead,
        ..query("metrics.filesystem.at")
    };

    fn instance(params: &FilesystemsAtQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<Filesystems, Fault> {
        Ok(Filesystems::default())
    }
}
