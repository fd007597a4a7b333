//! REST route that removes a decommissioned VM.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode};
use serde::Deserialize;
use utoipa::IntoParams;
use vmwatch_api::{
    InstanceId, Kind,
    lifecycle::Target,
    no_such_vm,
    removal::{HistoryRemove, Removal, RemovalCheck, RemovalFinish},
};

use super::{
    caller::Caller,
    extract::{Path, Query},
    problem::Problem,
};
use crate::Gateway;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Confirmation {
    /// Name of the VM, or its id if it has no name, to confirm the removal.
    #[param(max_length = 1024)]
    name: String,
}

/// Remove a VM
///
/// Deletes the history and the labels of a decommissioned VM, for administrators. A VM that a hypervisor still has is
/// not removed (409), because it would be listed again at once; delete it on the hypervisor first. If the agent of the
/// VM reports again, or an unreachable hypervisor that has the VM answers again, the VM is listed again without its
/// former history. A long history may not be deleted within the time limit; after 504, repeat the request to continue.
#[utoipa::path(
    delete, path = "/vms/{instance_id}", tag = "vms", operation_id = "remove_vm",
    params(("instance_id" = InstanceId, Path, description = "VM id"), Confirmation),
    responses(
        (status = NO_CONTENT, description = "the VM is removed"),
        (status = CONFLICT, response = super::openapi::Conflict),
    ),
)]
pub(super) async fn remove(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(Confirmation { name }): Query<Confirmation>,
) -> Result<StatusCode, Problem> {
    let target = Target { instance_id };
    let removal = Removal {
        instance_id: target.instance_id.clone(),
        name,
    };
    // All steps have one deadline.
    let context = caller.context(&gateway, Kind::Command);
    gateway.call::<RemovalCheck>(&context, &removal).await?;
    let history = gateway.call::<HistoryRemove>(&context, &target).await?;
    let rest = gateway.call::<RemovalFinish>(&context, &removal).await?;
    if history.records + rest.records == 0 {
        return Err(no_such_vm().into());
    }
    Ok(StatusCode::NO_CONTENT)
}
