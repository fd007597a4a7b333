//! Method of metrics-svc that lists when a VM and its agent were started.

use serde::{Deserialize, Serialize};

use super::{
    Class, InstanceId, Method, MethodInfo,
    history::{TimeRange, query},
};
use crate::wire::Fault;

/// Selects the starts of a VM and of its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartsQuery {
    pub instance_id: InstanceId,
    pub range: TimeRange,
}

/// What was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Started {
    /// The VM.
    Vm,
    /// The agent in the VM.
    Agent,
    /// Something that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

/// The start of a VM or of its agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Start {
    /// Unix milliseconds, by the clock of the VM.
    pub at_ms: u64,
    pub what: Started,
}

/// The starts of a VM and of its agent in a time range.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartList {
    /// The newest first.
    pub starts: Vec<Start>,
    /// Whether there may be earlier starts in the time range, because they are too many for one request, or because a
    /// process table has neither the first process of the VM nor the agent.
    #[serde(default)]
    pub cut: bool,
}

/// Lists the starts of a VM and of its agent, as its process tables show them: the start of the process with pid 1,
/// and that of `vmwatch-agent`. It reads one sample per start, so its cost does not depend on the length of the time
/// range.
#[derive(Debug)]
pub struct VmStarts;

impl Method for VmStarts {
    type Params = StartsQuery;
    type Reply = StartList;
    const INFO: MethodInfo = MethodInfo {
        class: Class::HeavyRead,
        ..query("metrics.vm.starts")
    };

    fn instance(params: &StartsQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<StartList, Fault> {
        Ok(StartList::default())
    }
}
