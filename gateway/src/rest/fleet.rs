//! The VMs as metrics-svc and lifecycle-svc know them, joined. Where one of the two is away the other half is there all
//! the same, and the answer says what is missing.

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

/// The most VMs that are joined; one page of a service holds a thousand.
const MOST: usize = 10_000;
const PAGE: u64 = 1000;

/// What is missing in an answer, and why.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Degraded {
    /// Which half: `metrics` (samples and when they came) or `lifecycle` (states, names and hypervisors).
    pub(super) part: Part,
    /// Why.
    pub(super) detail: String,
}

/// A half of what is known of VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Part {
    /// Samples, and when they came.
    Metrics,
    /// States, names and hypervisors.
    Lifecycle,
}

/// What is known of a VM.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) summary: Option<VmSummary>,
    pub(super) machine: Option<Machine>,
}

/// All VMs that the caller may see.
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

/// Reads both halves at once; fails only where both are away.
pub(super) async fn all(gateway: &Gateway, caller: &Caller) -> Result<Fleet, Fault> {
    let (summaries, machines) = tokio::join!(summaries(gateway, caller), machines(gateway, caller));
    let mut fleet = Fleet::default();
    let too_many = || format!("there are more VMs than the {MOST} that are joined; the others are missing");
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
            let detail = format!("the hypervisor {hypervisor} does not answer");
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

/// The newest rows of all VMs, and whether there are more.
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

/// What the hypervisors say of all VMs, which of them are silent, and whether there are more VMs.
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
