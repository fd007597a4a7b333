//! Joins what metrics-svc and lifecycle-svc know about VMs. If one of the two services is unreachable, the answer
//! contains the data of the other and states what is missing.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;
use vmwatch_api::{
    InstanceId,
    history::{VmList, VmSummary},
    lifecycle::{List, ListedMachine, Machine, Page},
    metrics::Limit,
    wire::Fault,
};

use super::caller::Caller;
use crate::Gateway;

/// Maximum number of VMs in the list. One page of a service holds a thousand.
const MOST: usize = 10_000;
const PAGE: u64 = 1000;

/// A source of data that is unavailable, so that its data is missing from the answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Degraded {
    /// The unavailable source: `metrics` (samples and times of reports) or `lifecycle` (states, names and hypervisors).
    pub(super) part: Part,
    /// Description for users of why the data is unavailable.
    pub(super) detail: String,
}

/// A source of data about VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Part {
    /// Samples of VMs and times of their reports, from metrics-svc.
    Metrics,
    /// States, names and hypervisors of VMs, from lifecycle-svc.
    Lifecycle,
}

/// Data about a VM from metrics-svc and lifecycle-svc.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) summary: Option<VmSummary>,
    pub(super) machine: Option<Machine>,
}

/// All VMs that the caller may see, joined from metrics-svc and lifecycle-svc.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    pub(super) vms: BTreeMap<InstanceId, Known>,
    pub(super) degraded: Vec<Degraded>,
}

impl Degraded {
    pub(super) fn new(part: Part, detail: impl Into<String>) -> Self {
        Self {
            part,
            detail: detail.into(),
        }
    }
}

impl Fleet {
    pub(super) fn lacks(&self, part: Part) -> bool {
        self.degraded.iter().any(|missing| missing.part == part)
    }
}

/// Reads the VMs from metrics-svc and lifecycle-svc concurrently; fails only if both services are unreachable.
pub(super) async fn all(gateway: &Gateway, caller: &Caller) -> Result<Fleet, Fault> {
    let (summaries, machines) = tokio::join!(summaries(gateway, caller), machines(gateway, caller));
    let mut fleet = Fleet::default();
    let too_many = || format!("there are more than {MOST} VMs; the list is incomplete");
    match (&summaries, &machines) {
        (Err(fault), Err(_)) => return Err(fault.clone()),
        (Err(fault), _) => fleet.degraded.push(Degraded::new(Part::Metrics, &fault.message)),
        (_, Err(fault)) => fleet
            .degraded
            .push(Degraded::new(Part::Lifecycle, &fault.message)),
        _ => {}
    }
    if let Ok((summaries, more)) = summaries {
        for summary in summaries {
            let id = summary.instance_id.clone();
            fleet.vms.entry(id).or_default().summary = Some(summary);
        }
        if more {
            fleet.degraded.push(Degraded::new(Part::Metrics, too_many()));
        }
    }
    if let Ok((machines, silent, more)) = machines {
        for machine in machines {
            let id = machine.instance_id.clone();
            let machine = Machine {
                instance_id: machine.instance_id,
                state: machine.state,
                name: Some(machine.name),
                hypervisor: Some(machine.hypervisor),
            };
            fleet.vms.entry(id).or_default().machine = Some(machine);
        }
        for hypervisor in silent {
            let detail = format!("the hypervisor {hypervisor} is unreachable");
            fleet.degraded.push(Degraded::new(Part::Lifecycle, detail));
        }
        if more {
            fleet.degraded.push(Degraded::new(Part::Lifecycle, too_many()));
        }
    }
    Ok(fleet)
}

fn page_behind(last: Option<&InstanceId>) -> Page {
    Page {
        after: last.cloned(),
        limit: Limit::new(PAGE).unwrap_or_default(),
    }
}

/// Reads the newest rows of all VMs; also returns whether there are more VMs.
async fn summaries(gateway: &Gateway, caller: &Caller) -> Result<(Vec<VmSummary>, bool), Fault> {
    let mut all: Vec<VmSummary> = Vec::new();
    loop {
        let page = page_behind(all.last().map(|vm| &vm.instance_id));
        let reply = caller.ask::<VmList>(gateway, &page).await?;
        let at_end = !reply.more || reply.vms.is_empty();
        all.extend(reply.vms);
        if at_end || all.len() >= MOST {
            return Ok((all, !at_end));
        }
    }
}

/// Reads the state of all VMs, names of hypervisors that did not answer, and whether there are more VMs.
async fn machines(
    gateway: &Gateway,
    caller: &Caller,
) -> Result<(Vec<ListedMachine>, Vec<String>, bool), Fault> {
    let mut all: Vec<ListedMachine> = Vec::new();
    loop {
        let page = page_behind(all.last().map(|machine| &machine.instance_id));
        let reply = caller.ask::<List>(gateway, &page).await?;
        let at_end = !reply.more || reply.machines.is_empty();
        all.extend(reply.machines);
        if at_end || all.len() >= MOST {
            return Ok((all, reply.silent, !at_end));
        }
    }
}
