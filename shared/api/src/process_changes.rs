//! Method of metrics-svc that compares the processes of a VM at two moments.
//!
//! Processes are compared in groups of the same name, user, unit and container. After a reboot every process has
//! another pid and start, so only groups can be compared with those before it.

use serde::{Deserialize, Serialize};

use super::{
    InstanceId, Method, MethodInfo,
    alerts::culprits::TopMeasure,
    history::{TimeRange, query},
    metrics::Limit,
};
use crate::wire::Fault;

/// Selects two moments of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangesQuery {
    pub instance_id: InstanceId,
    /// The two moments: the start and the end of this range.
    pub moments: TimeRange,
    /// The measure by which the groups of each list are sorted.
    #[serde(default)]
    pub by: TopMeasure,
    /// Maximum number of groups in each list.
    #[serde(default)]
    pub limit: Limit,
}

/// What a group of processes uses in one sample.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct GroupUsage {
    /// Number of processes.
    pub processes: u32,
    /// CPU usage, percent of one core.
    pub cpu_util: f64,
    /// Memory usage, percent of the VM's memory.
    pub mem: f64,
    /// Read rate, KiB/s.
    pub disk_read: f64,
    /// Write rate, KiB/s.
    pub disk_write: f64,
    /// Start of the process that has run longest; `None` for a summed row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_ms: Option<u64>,
}

/// A group of processes that changed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ChangedGroup {
    /// Name of the processes.
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The systemd unit; `None` also for a scope, because the name of a scope differs in each session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Usage at the first moment; `None` if no process of the group ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<GroupUsage>,
    /// Usage at the second moment; `None` if no process of the group ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<GroupUsage>,
    /// Number of processes that ran at both moments.
    pub kept: u32,
}

/// Groups with the same kind of change.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ChangedGroups {
    /// Number of groups, including those that are not listed because of the limit.
    pub total: u64,
    /// The groups with the greatest changes first.
    pub groups: Vec<ChangedGroup>,
}

/// A process table that was compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComparedTable {
    /// Time of the sample, which is the newest at or before the moment.
    pub at_ms: u64,
    /// Number of running processes.
    pub processes: u64,
    /// When the VM was started; `None` if the table lacks its first process (pid 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub booted_ms: Option<u64>,
}

/// How the processes of a VM changed between two moments.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessChanges {
    /// The table of the first moment; `None` if there is no sample in the seven days before it. Then nothing is
    /// compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<ComparedTable>,
    /// The table of the second moment, like `before`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<ComparedTable>,
    /// Whether the VM was started between the two samples; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebooted: Option<bool>,
    /// Whether a table has processes without rows of their own, because the agent does not report all of them.
    #[serde(default)]
    pub incomplete: bool,
    /// Groups that ran only at the second moment.
    pub came: ChangedGroups,
    /// Groups that ran only at the first moment.
    pub went: ChangedGroups,
    /// Groups that ran at both moments and used more at the second one.
    pub grew: ChangedGroups,
    /// Groups that did not grow and in which no process ran at both moments, although the VM was not rebooted.
    pub restarted: ChangedGroups,
}

/// Compares the processes of a VM at two moments. It reads only two samples, so its cost does not depend on the time
/// between the moments.
#[derive(Debug)]
pub struct ProcessChangesBetween;

impl Method for ProcessChangesBetween {
    type Params = ChangesQuery;
    type Reply = ProcessChanges;
    const INFO: MethodInfo = query("metrics.process.changes");

    fn instance(params: &ChangesQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<ProcessChanges, Fault> {
        Ok(ProcessChanges::default())
    }
}
