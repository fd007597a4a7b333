//! REST routes for the labels of VMs.

use std::{collections::BTreeMap, sync::Arc};

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmwatch_api::{
    InstanceId, Method,
    labels::{HYPERVISOR_LABEL, Labels, LabelsChange, LabelsGet, LabelsReply, LabelsSet},
    lifecycle::Target,
    vms,
};
use vmwatch_bus::serve::check_role;

use super::{
    caller::Caller,
    extract::{Json, NoParameters, Number, Path, Query},
    problem::Problem,
};
use crate::Gateway;

/// Every integer within these bounds is exact as a number of JavaScript.
type Revision = Number<0, 9_007_199_254_740_991>;

/// Labels of a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmLabels {
    /// Labels that operators set.
    labels: Labels,
    /// Labels that the hypervisor has for the VM, which are read-only. Their keys begin with `hv/`.
    #[schema(example = json!({ "hv/title": "Ledger" }))]
    hypervisor_labels: BTreeMap<String, String>,
    /// Number of the last change of `labels`; 0 if there was none.
    revision: u64,
}

/// The labels that a VM has after the change.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewLabels {
    /// All labels that operators set. Labels that are missing are removed.
    #[schema(value_type = Labels)]
    labels: BTreeMap<String, String>,
    /// The `revision` on which the change is based.
    #[schema(value_type = u64, maximum = 9_007_199_254_740_991_i64)]
    revision: Revision,
}

impl From<LabelsReply> for VmLabels {
    fn from(reply: LabelsReply) -> Self {
        let shown = |(key, value)| (format!("{HYPERVISOR_LABEL}{key}"), value);
        Self {
            labels: reply.labels,
            hypervisor_labels: reply.hypervisor.into_iter().map(shown).collect(),
            revision: reply.revision,
        }
    }
}

/// Read the labels of a VM
///
/// Labels help users to find and group VMs. They never grant access to a VM.
#[utoipa::path(
    get, path = "/vms/{instance_id}/labels", tag = "vms", operation_id = "get_labels",
    params(("instance_id" = InstanceId, Path, description = "VM id")),
    responses((status = OK, body = VmLabels, description = "the labels")),
)]
pub(super) async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<VmLabels>, Problem> {
    let reply = read(&gateway, &caller, &Target { instance_id }).await?;
    Ok(axum::Json(reply.into()))
}

/// Set the labels of a VM
///
/// Replaces all labels that operators have set, for operators and administrators. If the labels have changed since
/// `revision`, the answer is 409 and nothing is changed; read the labels again and repeat the change.
#[utoipa::path(
    put, path = "/vms/{instance_id}/labels", tag = "vms", operation_id = "set_labels", request_body = NewLabels,
    params(("instance_id" = InstanceId, Path, description = "VM id")),
    responses(
        (status = OK, body = VmLabels, description = "the changed labels"),
        (status = CONFLICT, response = super::openapi::Conflict),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Unprocessable),
    ),
)]
pub(super) async fn set(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(NoParameters {}): Query<NoParameters>,
    Json(NewLabels { labels, revision }): Json<NewLabels>,
) -> Result<axum::Json<VmLabels>, Problem> {
    let labels = Labels::try_from(labels).map_err(Problem::labels)?;
    let target = Target { instance_id };
    // Only operators need this check: lifecycle-svc refuses all other users, and records the refusals in the audit.
    if check_role(LabelsSet::INFO.access, Some(caller.principal())).is_ok() {
        read(&gateway, &caller, &target).await?;
    }
    let change = LabelsChange {
        instance_id: target.instance_id,
        labels,
        revision: revision.get(),
    };
    let reply = caller.ask::<LabelsSet>(&gateway, &change).await?;
    Ok(axum::Json(reply.into()))
}

/// Reads the labels of a VM that a hypervisor has, that has labels or that has reported; of other VMs it is answered
/// that they do not exist.
async fn read(gateway: &Gateway, caller: &Caller, target: &Target) -> Result<LabelsReply, Problem> {
    let reply = caller.ask::<LabelsGet>(gateway, target).await?;
    if !reply.listed && reply.labels.is_empty() {
        caller.ask::<vms::Get>(gateway, target).await?;
    }
    Ok(reply)
}
