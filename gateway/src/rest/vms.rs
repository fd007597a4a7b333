//! VMs: what runs where, and what it reported last.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use shared::{
    api::{
        InstanceId,
        history::{VmGet, VmSummary},
        lifecycle::{self, MachineState, Target},
        no_such_vm,
        processes::Order,
    },
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use utoipa::{IntoParams, ToSchema};

use super::{
    caller::Caller,
    extract::{NoParameters, PageLimit, Path, Query, Text, known, page_limit},
    fleet::{self, Degraded, Known, Part},
    problem::Problem,
    sort::{Cursor, Key, VmSort},
    time::Timestamp,
};
use crate::Gateway;

/// What a VM's agent reported last, in percent and KiB/s.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Sample {
    /// When it was taken, by the VM's own clock.
    pub(super) at: Timestamp,
    /// Busy share of all cores, 0 to 100.
    pub(super) cpu_util: f64,
    /// Share of memory in use, percent.
    pub(super) mem: f64,
    /// Read rate of all whole disks, KiB/s.
    pub(super) disk_read: f64,
    /// Write rate of all whole disks, KiB/s.
    pub(super) disk_write: f64,
    /// Receive rate, KiB/s.
    pub(super) net_incoming: f64,
    /// Transmit rate, KiB/s.
    pub(super) net_outgoing: f64,
    /// Number of processes.
    pub(super) proc: u32,
}

/// Whether a VM's agent is heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Agent {
    /// It reported of late.
    Reporting,
    /// It did not, for longer than `VMWATCH_SILENT_AFTER`.
    Silent,
    /// It never did.
    Never,
}

/// A VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Vm {
    /// Its id.
    pub(super) instance_id: InstanceId,
    /// What the hypervisor calls it; null where no hypervisor knows it, or none was asked.
    #[schema(required)]
    pub(super) name: Option<String>,
    /// Where it is.
    #[schema(required)]
    hypervisor: Option<String>,
    /// What the hypervisor says of it; null where none knows it, or none answers.
    #[schema(required)]
    pub(super) state: Option<MachineState>,
    /// Whether its agent is heard; null where that is not known.
    #[schema(required)]
    pub(super) agent: Option<Agent>,
    /// When its agent reported last, by our own clock.
    #[schema(required)]
    pub(super) last_report_at: Option<Timestamp>,
    /// The newest sample.
    #[schema(required)]
    pub(super) sample: Option<Sample>,
    /// The highest CPU share in each three minutes of the last hour, the oldest first; null where there was no sample.
    cpu_sparkline: Vec<Option<f64>>,
}

/// A page of VMs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmList {
    /// As they were asked to be sorted.
    vms: Vec<Vm>,
    /// How many pass the filters, on all pages.
    total: usize,
    /// What `cursor` is for the next page; null on the last.
    #[schema(required)]
    next: Option<Cursor>,
    /// What is missing, and why; empty where nothing is.
    degraded: Vec<Degraded>,
}

/// A VM, with what is missing.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmDetail {
    #[serde(flatten)]
    vm: Vm,
    /// What is missing, and why; empty where nothing is.
    degraded: Vec<Degraded>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct VmsQuery {
    /// Only VMs with this text in id, name or hypervisor, in whatever case.
    #[param(inline)]
    q: Option<Text<128>>,
    /// Only VMs in this state.
    #[serde(default, deserialize_with = "known")]
    state: Option<MachineState>,
    /// Only VMs whose agent is heard so.
    agent: Option<Agent>,
    /// Sorted by what; by id unless given. What has no value comes last.
    #[serde(default)]
    #[param(value_type = Option<VmSort>)]
    sort: VmSort,
    /// Which way; names and ids from their beginning and all else from the greatest unless given.
    order: Option<Order>,
    /// At most how many; 100 unless given.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// `next` of the page before, with the same sort and order.
    cursor: Option<Cursor>,
}

/// List VMs
///
/// All that the hypervisors know and all that ever reported, joined. Where one of the two halves is away, its fields are
/// null and `degraded` says why. A VM whose value changes while one turns pages may be met twice or missed, unless
/// they are sorted by id or name.
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
/// What its hypervisor and its agent say of it. Where one of the two halves is away, its fields are null and `degraded`
/// says why.
#[utoipa::path(
    get, path = "/vms/{instance_id}", tag = "vms", operation_id = "get_vm",
    params(("instance_id" = InstanceId, Path, description = "the VM's id")),
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
    let mut away = Vec::new();
    let summary = half(Part::Metrics, summary, &mut away);
    let machine = half(Part::Lifecycle, machine, &mut away);
    if summary.is_none() && machine.is_none() {
        // Nobody knows it, unless it is somebody who cannot be asked.
        let fault = away
            .into_iter()
            .next()
            .map_or_else(no_such_vm, |(_, fault)| fault);
        return Err(fault.into());
    }
    let degraded = away
        .iter()
        .map(|(part, fault)| Degraded::new(*part, &fault.message))
        .collect::<Vec<_>>();
    let lacks_metrics = degraded.iter().any(|missing| missing.part == Part::Metrics);
    let known = Known { summary, machine };
    let vm = gateway.vm(target.instance_id, known, lacks_metrics);
    Ok(axum::Json(VmDetail { vm, degraded }))
}

/// What one half says. What it does not find is no failure of it: the other may know the VM.
fn half<T>(part: Part, answer: Result<T, Fault>, away: &mut Vec<(Part, Fault)>) -> Option<T> {
    match answer {
        Ok(found) => Some(found),
        Err(fault) if fault.kind == FaultKind::NotFound => None,
        Err(fault) => {
            away.push((part, fault));
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
    /// Whether the text, in lower case, is part of what the VM is called.
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
            cpu_util: summary.cpu_util,
            mem: summary.mem,
            disk_read: summary.disk_read,
            disk_write: summary.disk_write,
            net_incoming: summary.net_incoming,
            net_outgoing: summary.net_outgoing,
            proc: summary.proc,
        }
    }
}
