//! REST route for the filesystems of a VM at a moment.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId,
    filesystems::{FilesystemsAt, FilesystemsAtQuery},
    metrics::FilesystemSample,
};

use super::{
    caller::Caller,
    extract::{Path, Query},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// A mounted filesystem, as recorded in one sample.
#[derive(Debug, Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "rows have this field")]
pub(super) struct Filesystem {
    /// Path at which the filesystem is mounted.
    mount_point: String,
    /// Type of the filesystem, such as `ext4` or `nfs4`.
    filesystem: String,
    /// Space in use in bytes.
    used_bytes: u64,
    /// Size of the filesystem in bytes.
    total_bytes: u64,
}

/// The filesystems of a VM at one moment.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Filesystems {
    /// Time of the sample: at or before the requested moment. Null if no filesystems are stored.
    #[schema(required)]
    at: Option<Timestamp>,
    /// Filesystems, sorted by mount point; at most 64. A filesystem that did not answer in time is missing.
    filesystems: Vec<Filesystem>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct FilesystemsQuery {
    /// Moment for which to return the filesystems. Default: now.
    at: Option<Timestamp>,
}

/// Read the filesystems of a VM at a moment
///
/// Returns the filesystems of the newest sample of the seven days up to the moment that has any. Agents sample filesystems
/// together with processes. `kind=filesystem` exports their history.
#[utoipa::path(
    get, path = "/vms/{instance_id}/filesystems", tag = "vms", operation_id = "filesystems_at",
    params(("instance_id" = InstanceId, Path, description = "VM id"), FilesystemsQuery),
    responses((status = OK, body = Filesystems, description = "the filesystems")),
)]
pub(super) async fn filesystems(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<FilesystemsQuery>,
) -> Result<axum::Json<Filesystems>, Problem> {
    let request = FilesystemsAtQuery {
        instance_id,
        at_ms: query.at.map(Timestamp::as_ms),
    };
    let found = caller.ask::<FilesystemsAt>(&gateway, &request).await?;
    Ok(axum::Json(Filesystems {
        at: found.at_ms.map(Timestamp::of_ms),
        filesystems: found.filesystems.into_iter().map(Filesystem::from).collect(),
    }))
}

impl From<FilesystemSample> for Filesystem {
    fn from(row: FilesystemSample) -> Self {
        Self {
            mount_point: row.mount_point,
            filesystem: row.filesystem,
            used_bytes: row.used_bytes,
            total_bytes: row.total_bytes,
        }
    }
}
