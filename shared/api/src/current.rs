//! The current measures of all VMs, which the gateway serves as metrics to Prometheus.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    InstanceId, Method, MethodInfo,
    agents::AgentText,
    history::query,
    lifecycle::MachineState,
    processes::ProcessName,
    vms::{Agent, NewestSample, Stale},
};

/// Maximum number of VMs on a page; the size of a page limits it to fewer.
pub const MAX_CURRENT_VMS: usize = 5000;
/// Maximum number of series of processes in the answers to one request for metrics.
pub const MAX_PROCESS_SERIES: usize = 20_000;

/// What the processes of one name use in a VM. Of a measure that is `None`, the value is not among the greatest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessUse {
    pub name: ProcessName,
    /// CPU usage, percent of one core; can exceed 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_util: Option<f64>,
    /// Memory usage, percent of the VM's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem: Option<f64>,
}

/// The smallest value that is listed. Of equal values, that with the smaller id and then name ranks higher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Smallest {
    pub value: f64,
    pub instance_id: InstanceId,
    pub name: ProcessName,
}

/// The smallest values of processes that are listed; `None` if all are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessRanks {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_util: Option<Smallest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem: Option<Smallest>,
}

/// Selects a page of the VMs that the principal may see.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CurrentQuery {
    /// Only VMs after this one: the `next` value of the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<InstanceId>,
    /// The `ranks` of the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<ProcessRanks>,
}

/// A VM with its current measures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CurrentVm {
    pub instance_id: InstanceId,
    /// The hypervisor's name for the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<MachineState>,
    /// Labels of the hypervisor, whose keys begin with `hv/`, and labels that operators have set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Agent>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<AgentText>,
    /// Whether the agent has faults, such as a wrong clock.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub agent_faulty: bool,
    /// When metrics-svc last stored a row of the agent, Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_report_ms: Option<u64>,
    /// The newest sample of the agent if it reports, or else of the hypervisor if it is recent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<NewestSample>,
    /// The greatest of the VM's processes, if metrics-svc is configured to list them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<ProcessUse>,
}

/// VMs with their current measures, sorted by id.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CurrentPage {
    pub vms: Vec<CurrentVm>,
    /// Absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<InstanceId>,
    /// Which values of processes are listed on all pages; `None` if metrics-svc does not list processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<ProcessRanks>,
    /// Number of values of processes of the page's VMs that are not listed.
    #[serde(default)]
    pub processes_left_out: u64,
    #[serde(default)]
    pub stale: Vec<Stale>,
}

/// Lists the current measures of all VMs that the principal may see.
#[derive(Debug)]
pub struct VmsCurrent;

impl Method for VmsCurrent {
    type Params = CurrentQuery;
    type Reply = CurrentPage;
    const INFO: MethodInfo = query("metrics.vm.current");
}
