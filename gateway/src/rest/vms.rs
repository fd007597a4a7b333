//! REST routes for VMs: their state on the hypervisor and the latest sample of their agent.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId,
    history::{VmGet, VmSummary},
    lifecycle::{self, MachineState, Target},
    measures::VmValues,
    no_such_vm,
    processes::Order,
    time::unix_millis,
    wire::{Fault, FaultKind},
};

use super::{
    caller::Caller,
    extract::{NoParameters, PageLimit, Path, Query, Text, known, page_limit},
    fleet::{self, Degraded, Known, Part},
    measures::values_schema,
    problem::Problem,
    sort::{Cursor, Key, VmSort},
    time::Timestamp,
};
use crate::Gateway;

/// The latest sample that the agent of a VM has sent.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Sample {
    /// Time of the sample, by the clock of the VM.
    pub(super) at: Timestamp,
    #[serde(flatten)]
    #[schema(schema_with = values_schema)]
    pub(super) values: VmValues,
}

/// Whether the agent in a VM reports samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Agent {
    /// The agent reported recently.
    Reporting,
    /// The agent has not reported for longer than `VMWATCH_SILENT_AFTER`.
    Silent,
    /// The agent has never reported.
    Never,
}

/// A VM: its state on the hypervisor and the latest sample of its agent.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Vm {
    /// Id of the VM.
    pub(super) instance_id: InstanceId,
    /// Name of the VM on its hypervisor; null if no hypervisor is known to have the VM.
    #[schema(required)]
    pub(super) name: Option<String>,
    /// Name of the hypervisor that has the VM; null if no hypervisor is known to have it.
    #[schema(required)]
    hypervisor: Option<String>,
    /// State of the VM that its hypervisor last reported; null if no state is known.
    #[schema(required)]
    pub(super) state: Option<MachineState>,
    /// Whether the VM's agent reports samples; null if unknown.
    #[schema(required)]
    pub(super) agent: Option<Agent>,
    /// Time of the agent's last report, by the clock of the server.
    #[schema(required)]
    pub(super) last_report_at: Option<Timestamp>,
    /// Latest sample of the VM; null if there is none.
    #[schema(required)]
    pub(super) sample: Option<Sample>,
    /// Peak CPU usage of the VM in each three minutes of the last hour, oldest first; null where there was no sample.
    cpu_sparkline: Vec<Option<f64>>,
}

/// A page of VMs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmList {
    /// VMs, sorted as requested.
    vms: Vec<Vm>,
    /// Total number of VMs that match the filters, on all pages.
    total: usize,
    /// Value of `cursor` for the next page; null on the last page.
    #[schema(required)]
    next: Option<Cursor>,
    /// Sources of data that are unavailable (hypervisor data or samples), and why; usually empty.
    degraded: Vec<Degraded>,
}

/// A VM, and the sources of its data that are unavailable.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmDetail {
    #[serde(flatten)]
    vm: Vm,
    /// Sources of data that are unavailable (hypervisor data or samples), and why; usually empty.
    degraded: Vec<Degraded>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct VmsQuery {
    /// Return only VMs whose id, name or hypervisor contains this text; case-insensitive.
    #[param(inline)]
    q: Option<Text<128>>,
    /// Return only VMs in this state.
    #[serde(default, deserialize_with = "known")]
    state: Option<MachineState>,
    /// Return only VMs whose agent has this status.
    agent: Option<Agent>,
    /// Value by which to sort the VMs. Default: id. VMs without this value come last, and so do silent VMs if the value
    /// is a measure, because their last sample is stale.
    #[serde(default)]
    #[param(value_type = Option<VmSort>)]
    sort: VmSort,
    /// Sort order. Default: ascending for id, name and state, descending otherwise.
    order: Option<Order>,
    /// Maximum number of VMs in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// The `next` value of the previous page; requires the same `sort` and `order`.
    cursor: Option<Cursor>,
}

/// List VMs
///
/// Joins the VMs of all hypervisors with all VMs that ever reported. If one of the two sources is unreachable, its
/// fields are null and `degraded` states why. A VM whose sort value changes between pages may appear twice or not at
/// all, unless the list is sorted by id or name.
#[utoipa::path(
    get, path = "/vms", tag = "vms", operation_id = "list_vms", params(VmsQuery),
    responses((status = OK, body = VmList, description = "a page of VMs")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(query): Query<VmsQuery>,
) -> Result<axum::Json<VmList>, Problem> {
    let fleet = fleet::all(&gateway, &caller).await?;
    let lacks_metrics = fleet.lacks(Part::Metrics);
    let text = query.q.map(|text| text.into_inner().to_lowercase());
    let mut vms: Vec<(Key, Vm)> = fleet
        .vms
        .into_iter()
        .map(|(id, known)| gateway.vm(id, known, lacks_metrics))
        .filter(|vm| text.as_ref().is_none_or(|text| vm.contains(text)))
        .filter(|vm| query.state.is_none_or(|state| vm.state == Some(state)))
        .filter(|vm| query.agent.is_none_or(|agent| vm.agent == Some(agent)))
        .map(|vm| (query.sort.key(&vm), vm))
        .collect();
    let total = vms.len();
    let order = query.order.unwrap_or(query.sort.usual_order());
    if let Some(cursor) = query.cursor {
        let cursor = cursor.into_key();
        vms.retain(|(key, _)| key.compare(&cursor, order).is_gt());
    }
    vms.sort_by(|(one, _), (other, _)| one.compare(other, order));
    let limit = usize::from(page_limit(query.limit).get());
    let more = vms.len() > limit;
    vms.truncate(limit);
    let next = vms.last().filter(|_| more).map(|(key, _)| Cursor::of(key));
    Ok(axum::Json(VmList {
        vms: vms.into_iter().map(|(_, vm)| vm).collect(),
        total,
        next,
        degraded: fleet.degraded,
    }))
}

/// Read a VM
///
/// Joins the data of hypervisor and agent. If one of the two sources is unreachable, its fields are null and `degraded`
/// states why.
#[utoipa::path(
    get, path = "/vms/{instance_id}", tag = "vms", operation_id = "get_vm",
    params(("instance_id" = InstanceId, Path, description = "VM id")),
    responses((status = OK, body = VmDetail, description = "the VM")),
)]
pub(super) async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<VmDetail>, Problem> {
    let target = Target { instance_id };
    let (summary, machine) = tokio::join!(
        caller.ask::<VmGet>(&gateway, &target),
        caller.ask::<lifecycle::State>(&gateway, &target),
    );
    let mut failures = Vec::new();
    let summary = found(Part::Metrics, summary, &mut failures);
    let machine = found(Part::Lifecycle, machine, &mut failures);
    if summary.is_none() && machine.is_none() {
        // Neither service knows this VM; if one was unreachable, return its error instead of 404.
        let fault = failures
            .into_iter()
            .next()
            .map_or_else(no_such_vm, |(_, fault)| fault);
        return Err(fault.into());
    }
    let degraded = failures
        .iter()
        .map(|(part, fault)| Degraded::new(*part, &fault.message))
        .collect::<Vec<_>>();
    let lacks_metrics = degraded.iter().any(|missing| missing.part == Part::Metrics);
    let known = Known { summary, machine };
    let vm = gateway.vm(target.instance_id, known, lacks_metrics);
    Ok(axum::Json(VmDetail { vm, degraded }))
}

/// Returns the answer of one service; `None` if the service does not know the VM or failed. A failure is added to
/// `failures`.
fn found<T>(part: Part, answer: Result<T, Fault>, failures: &mut Vec<(Part, Fault)>) -> Option<T> {
    match answer {
        Ok(data) => Some(data),
        Err(fault) if fault.kind == FaultKind::NotFound => None,
        Err(fault) => {
            failures.push((part, fault));
            None
        }
    }
}

impl Gateway {
    fn vm(&self, instance_id: InstanceId, known: Known, lacks_metrics: bool) -> Vm {
        let Known { summary, machine } = known;
        let agent = match &summary {
            Some(summary) if self.is_silent(summary) => Some(Agent::Silent),
            Some(_) => Some(Agent::Reporting),
            None if lacks_metrics => None,
            None => Some(Agent::Never),
        };
        Vm {
            instance_id,
            name: machine.as_ref().and_then(|machine| machine.name.clone()),
            hypervisor: machine.as_ref().and_then(|machine| machine.hypervisor.clone()),
            state: machine.map(|machine| machine.state),
            agent,
            last_report_at: summary.as_ref().map(|vm| Timestamp::of_ms(vm.last_report_ms)),
            sample: summary.as_ref().map(Sample::from),
            cpu_sparkline: summary.map(|summary| summary.cpu_sparkline).unwrap_or_default(),
        }
    }

    fn is_silent(&self, summary: &VmSummary) -> bool {
        let since = unix_millis().saturating_sub(summary.last_report_ms);
        u128::from(since) > self.rest.silent_after.as_millis()
    }
}

impl Vm {
    /// Whether the VM's id, name or hypervisor contains this lower-case text.
    fn contains(&self, text: &str) -> bool {
        let names = [
            Some(self.instance_id.as_str()),
            self.name.as_deref(),
            self.hypervisor.as_deref(),
        ];
        names
            .into_iter()
            .flatten()
            .any(|name| name.to_lowercase().contains(text))
    }
}

impl From<&VmSummary> for Sample {
    fn from(summary: &VmSummary) -> Self {
        Self {
            at: Timestamp::of_ms(summary.at_ms),
            values: summary.values,
        }
    }
}
