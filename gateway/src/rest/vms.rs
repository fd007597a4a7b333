//! REST routes for VMs: their state on the hypervisor and the latest sample of their agent.

use std::{collections::BTreeMap, sync::Arc};

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId, Method,
    agents::{AgentFault, AgentText},
    lifecycle::{MachineState, Target},
    measures::VmValues,
    metrics::Restriction,
    processes::Order,
    vms::{
        self, Agent, AgentFilter, GetWithoutMeasures, LabelFilter, ListWithoutMeasures, ListedVm,
        NewestSample, Stale, VmCursor, VmFilter, VmQuery, VmSort,
    },
    wire::{Fault, FaultKind},
};

use super::{
    caller::Caller,
    extract::{NoParameters, PageLimit, Path, Query, Text, known, page_limit},
    measures::values_schema,
    operations::{Action, RefusedAction},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// The latest sample that the agent of a VM has sent, or that its hypervisor has measured.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Sample {
    /// Time of the sample, by the clock of the VM or, for a sample of its hypervisor, of the server.
    at: Timestamp,
    #[serde(flatten)]
    #[schema(schema_with = values_schema)]
    values: VmValues,
    /// Why the agent cannot see all processes of the VM, so that some are missing and `proc` is null; null if it can.
    #[schema(required)]
    restricted: Option<Restriction>,
}

/// A VM on one of several hypervisors that have it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmCopy {
    /// Name of the hypervisor.
    hypervisor: String,
    /// State of the VM on this hypervisor.
    state: MachineState,
    /// Actions that are allowed if the request names this hypervisor.
    allowed_actions: Vec<Action>,
    /// The other actions, and why they are not allowed.
    refused_actions: Vec<RefusedAction>,
}

/// A VM: its state on the hypervisor and the latest sample of its agent.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Vm {
    /// Id of the VM.
    instance_id: InstanceId,
    /// Name of the VM on its hypervisor; null if no hypervisor is known to have the VM.
    #[schema(required)]
    name: Option<String>,
    /// Name of the hypervisor that has the VM; null if no hypervisor is known to have it.
    #[schema(required)]
    hypervisor: Option<String>,
    /// Names of other hypervisors that have a VM with this id. While there are any, an action must name its hypervisor.
    also_on: Vec<String>,
    /// The VM on each hypervisor that has it, if several have it; usually empty.
    copies: Vec<VmCopy>,
    /// State of the VM that its hypervisor last reported; null if no state is known.
    #[schema(required)]
    state: Option<MachineState>,
    /// Actions that the state of the VM allows.
    allowed_actions: Vec<Action>,
    /// The other actions, and why they are not allowed. By the last list of the hypervisor: the service checks the state
    /// again before it carries out an action.
    refused_actions: Vec<RefusedAction>,
    /// Labels of the VM: those of its hypervisor, whose keys begin with `hv/`, and those that operators have set.
    labels: BTreeMap<String, String>,
    /// Whether the VM's agent reports samples; null if unknown.
    #[schema(required)]
    agent: Option<Agent>,
    /// Time of the agent's last report, by the clock of the server.
    #[schema(required)]
    last_report_at: Option<Timestamp>,
    /// Latest sample of the VM's agent; null if there is none.
    #[schema(required)]
    sample: Option<Sample>,
    /// Latest sample that the hypervisor measured of the VM, with the measures that it knows; null if it measured none for
    /// longer than `VMWATCH_SILENT_AFTER`, such as of a VM that is off.
    #[schema(required)]
    hypervisor_sample: Option<Sample>,
    /// Why the samples may be wrong or misleading, or are stored late or not at all: the clock of the VM, the UTC offset of
    /// the agent, a second agent with the same id, times that are older than the retention or too far ahead, or a limit of
    /// one VM that the VM is above. Empty if no fault is known. More kinds may be added.
    agent_faults: Vec<AgentFault>,
    /// Version of the VM's agent, as it last reported it; null if unknown.
    #[schema(required)]
    agent_version: Option<String>,
    /// Whether the agent is older than the service that answers.
    agent_outdated: bool,
    /// Peak CPU usage of the VM in each 3-minute slot of the last hour, oldest first; null where there was no sample. As its
    /// hypervisor measured it, if its agent sent no sample in this hour.
    cpu_sparkline: Vec<Option<f64>>,
}

/// How current the states of a hypervisor's VMs are.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Hypervisor {
    /// Name of the hypervisor.
    name: String,
    /// Whether the last attempt to list its VMs succeeded. If not, its VMs are shown with their last known state.
    reachable: bool,
    /// Whether the hypervisor is reachable but a new list of its VMs is overdue.
    late: bool,
    /// Time at which its VMs were last listed completely, accurate to about a minute; null if never.
    #[schema(required)]
    listed_at: Option<Timestamp>,
}

/// A source of data that is unavailable, so that its data is missing from the answer or out of date.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct Degraded {
    /// The unavailable source.
    part: Part,
    /// Description for users of what is missing.
    detail: String,
}

/// A source of data about VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Part {
    /// Samples of VMs and times of their reports.
    Metrics,
    /// States, names and hypervisors of VMs.
    Lifecycle,
    /// Labels that operators have set.
    Labels,
}

/// A page of VMs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmList {
    /// VMs, sorted as requested.
    vms: Vec<Vm>,
    /// Total number of VMs that match the filters, on all pages.
    total: u64,
    /// Value of `cursor` for the next page; null on the last page.
    #[schema(required)]
    next: Option<VmCursor>,
    /// The hypervisors, at most 500, those that are unreachable or late first. A user with a limited scope sees only those
    /// that have VMs in the scope.
    hypervisors: Vec<Hypervisor>,
    /// Sources of data that are unavailable, and what is missing; usually empty.
    degraded: Vec<Degraded>,
}

/// A VM, and the sources of its data that are unavailable.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmDetail {
    #[serde(flatten)]
    vm: Vm,
    /// Release of the VM's kernel, as its agent last reported it; null if unknown.
    #[schema(required)]
    kernel: Option<String>,
    /// Distribution of the VM, as its agent last reported it; null if unknown.
    #[schema(required)]
    distribution: Option<String>,
    /// The hypervisors that have the VM.
    hypervisors: Vec<Hypervisor>,
    /// Sources of data that are unavailable, and what is missing; usually empty.
    degraded: Vec<Degraded>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct VmsQuery {
    /// Return only VMs whose id, name, hypervisor or label (`key=value`) contains this text; case-insensitive.
    #[param(inline)]
    q: Option<Text<128>>,
    /// Return only VMs in this state.
    #[serde(default, deserialize_with = "known")]
    state: Option<MachineState>,
    /// Return only VMs whose agent has this status; `faulty` returns VMs whose `agent_faults` is not empty.
    agent: Option<AgentFilter>,
    /// Return only VMs of the hypervisor with this name.
    #[param(inline)]
    hypervisor: Option<Text<128>>,
    /// Return only VMs that have this label: `key` with any value, or `key=value`.
    #[param(value_type = Option<String>, min_length = 1, max_length = 322, pattern = "^[^=]")]
    label: Option<LabelFilter>,
    /// Value by which to sort the VMs. Default: id. VMs without this value come last. A measure is that of the agent if it
    /// reports, or else that of the hypervisor, because the last sample of a silent agent is stale.
    #[serde(default)]
    #[param(value_type = Option<VmSort>)]
    sort: VmSort,
    /// Sort order. Default: ascending for id, name, hypervisor and state, descending otherwise.
    order: Option<Order>,
    /// Maximum number of VMs in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// The `next` value of the previous page; requires the same filters, `sort` and `order`.
    cursor: Option<VmCursor>,
}

/// List VMs
///
/// Lists the VMs of all hypervisors and all VMs that ever reported. If a source of data is unavailable, its fields are
/// null or have their last known values, and `degraded` states what is missing. A VM whose sort value changes between
/// pages may appear twice or not at all, unless the list is sorted by id or name.
#[utoipa::path(
    get, path = "/vms", tag = "vms", operation_id = "list_vms", params(VmsQuery),
    responses(
        (status = OK, body = VmList, description = "a page of VMs"),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(query): Query<VmsQuery>,
) -> Result<axum::Json<VmList>, Problem> {
    let query = VmQuery {
        filter: VmFilter {
            search: query.q.map(Text::into_inner),
            state: query.state,
            agent: query.agent,
            hypervisor: query.hypervisor.map(Text::into_inner),
            label: query.label,
        },
        sort: query.sort,
        order: query.order,
        cursor: query.cursor,
        limit: page_limit(query.limit),
    };
    if !query.has_own_cursor() {
        return Err(Problem::contradictory(
            "query: cursor belongs to a list with other filters, sort or order; request the first page without a cursor",
        ));
    }
    let (page, missing) = ask::<vms::List, ListWithoutMeasures>(&gateway, &caller, &query).await?;
    Ok(axum::Json(VmList {
        vms: page.vms.into_iter().map(Vm::from).collect(),
        total: page.total,
        next: page.next,
        hypervisors: page.hypervisors.into_iter().map(Hypervisor::from).collect(),
        degraded: degraded(missing, &page.stale),
    }))
}

/// Read a VM
///
/// Returns the same data about the VM as the list of VMs. If a source of data is unavailable, its fields are null or
/// have their last known values, and `degraded` states what is missing.
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
    let (detail, missing) = ask::<vms::Get, GetWithoutMeasures>(&gateway, &caller, &target).await?;
    let status = detail.agent_status;
    let (kernel, distribution) = status.map_or((None, None), |status| (status.kernel, status.distribution));
    let text = |text: AgentText| text.as_str().to_owned();
    Ok(axum::Json(VmDetail {
        vm: detail.vm.into(),
        kernel: kernel.map(text),
        distribution: distribution.map(text),
        hypervisors: detail.hypervisors.into_iter().map(Hypervisor::from).collect(),
        degraded: degraded(missing, &detail.stale),
    }))
}

/// Calls metrics-svc. If it does not answer within half of the time until the deadline, calls lifecycle-svc instead and
/// also returns the fault of metrics-svc.
pub(super) async fn ask<M, Fallback>(
    gateway: &Gateway,
    caller: &Caller,
    params: &M::Params,
) -> Result<(M::Reply, Option<Fault>), Fault>
where
    M: Method,
    Fallback: Method<Params = M::Params, Reply = M::Reply>,
{
    let whole = caller.context(gateway, M::INFO.kind);
    let mut half = whole.clone();
    let left = u64::try_from(whole.remaining().as_millis()).unwrap_or(u64::MAX);
    half.deadline_ms = whole.deadline_ms.saturating_sub(left / 2);
    let fault = match gateway.call::<M>(&half, params).await {
        Ok(reply) => return Ok((reply, None)),
        Err(fault) => fault,
    };
    if !is_unanswered(fault.kind) {
        return Err(fault);
    }
    match gateway.call::<Fallback>(&whole, params).await {
        Ok(reply) => Ok((reply, Some(fault))),
        // The VM may be one that no hypervisor has, which only metrics-svc would know; so return the fault of
        // metrics-svc instead of "not found".
        Err(other) if other.kind == FaultKind::NotFound => Err(fault),
        Err(other) => Err(other),
    }
}

const fn is_unanswered(kind: FaultKind) -> bool {
    matches!(
        kind,
        FaultKind::Unavailable | FaultKind::Timeout | FaultKind::Backend | FaultKind::Internal
    )
}

/// What is missing from an answer: the fault if metrics-svc did not answer, and the data that may be out of date.
pub(super) fn degraded(missing: Option<Fault>, stale: &[Stale]) -> Vec<Degraded> {
    let missing = missing.map(|fault| Degraded {
        part: Part::Metrics,
        detail: fault.message,
    });
    let stale = stale.iter().filter_map(|stale| {
        let (part, detail) = match stale {
            Stale::Inventory => (
                Part::Lifecycle,
                "VMs and states of hypervisors cannot be followed at the moment; the last known ones are shown",
            ),
            Stale::Labels => (
                Part::Labels,
                "labels cannot be followed at the moment; the last known ones are shown",
            ),
            Stale::Samples => (
                Part::Metrics,
                "samples cannot be read at the moment; the last known ones are shown",
            ),
            // A newer service names a source that this gateway does not know.
            Stale::Unknown => return None,
        };
        Some(Degraded {
            part,
            detail: detail.to_owned(),
        })
    });
    missing.into_iter().chain(stale).collect()
}

/// Leaves out faults that only a newer service knows.
fn known_faults(mut faults: Vec<AgentFault>) -> Vec<AgentFault> {
    faults.retain(|fault| *fault != AgentFault::Unknown);
    faults
}

impl From<vms::CopyOnHypervisor> for VmCopy {
    fn from(copy: vms::CopyOnHypervisor) -> Self {
        Self {
            hypervisor: copy.hypervisor,
            state: copy.state,
            allowed_actions: Action::allowed(&copy.refused),
            refused_actions: RefusedAction::list(&copy.refused),
        }
    }
}

impl From<ListedVm> for Vm {
    fn from(vm: ListedVm) -> Self {
        Self {
            instance_id: vm.instance_id,
            name: vm.name,
            hypervisor: vm.hypervisor,
            also_on: vm.also_on,
            copies: vm.copies.into_iter().map(VmCopy::from).collect(),
            state: vm.state,
            allowed_actions: Action::allowed(&vm.refused),
            refused_actions: RefusedAction::list(&vm.refused),
            labels: vm.labels,
            agent: vm.agent,
            last_report_at: vm.last_report_ms.map(Timestamp::of_ms),
            sample: vm.sample.map(Sample::from),
            hypervisor_sample: vm.hypervisor_sample.map(Sample::from),
            agent_faults: known_faults(vm.agent_faults),
            agent_version: vm.agent_version.map(|version| version.as_str().to_owned()),
            agent_outdated: vm.agent_outdated,
            cpu_sparkline: vm.cpu_sparkline,
        }
    }
}

impl From<NewestSample> for Sample {
    fn from(sample: NewestSample) -> Self {
        Self {
            at: Timestamp::of_ms(sample.at_ms),
            values: sample.values,
            restricted: sample.restricted,
        }
    }
}

impl From<vms::HypervisorPart> for Hypervisor {
    fn from(part: vms::HypervisorPart) -> Self {
        Self {
            name: part.name,
            reachable: part.reachable,
            late: part.late,
            listed_at: part.listed_at_ms.map(Timestamp::of_ms),
        }
    }
}
