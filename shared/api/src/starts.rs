//! Method of metrics-svc that lists when a VM and its agent were started.

use serde::{Deserialize, Serialize};

use super::{
    Class, InstanceId, Method, MethodInfo,
    history::{TimeRange, query},
};
use crate::wire::Fault;

/// Maximum length of the time range: 400 days.
pub const MAX_STARTS_MS: u64 = 400 * 86_400_000;

/// Selects the starts of a VM and of its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawQuery")]
pub struct StartsQuery {
    pub instance_id: InstanceId,
    range: TimeRange,
}

#[derive(Deserialize)]
struct RawQuery {
    instance_id: InstanceId,
    range: TimeRange,
}

impl TryFrom<RawQuery> for StartsQuery {
    type Error = &'static str;

    fn try_from(RawQuery { instance_id, range }: RawQuery) -> Result<Self, Self::Error> {
        Self::new(instance_id, range)
    }
}

impl StartsQuery {
    /// The rule for time ranges, as quoted in error messages to callers.
    pub const RANGE_RULE: &str = "the time range must be at most 400 days long";

    /// Fails with the rule that the time range breaks.
    pub fn new(instance_id: InstanceId, range: TimeRange) -> Result<Self, &'static str> {
        let is_allowed = range.length_ms() <= MAX_STARTS_MS;
        is_allowed
            .then_some(Self { instance_id, range })
            .ok_or(Self::RANGE_RULE)
    }

    pub const fn range(&self) -> TimeRange {
        self.range
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_range_of_starts_is_limited() {
        let query = |to_ms: u64| {
            let json =
                serde_json::json!({ "instance_id": "vm-1", "range": { "from_ms": 1000, "to_ms": to_ms } });
            serde_json::from_value::<StartsQuery>(json)
        };
        assert_eq!(
            query(1000 + MAX_STARTS_MS).unwrap().range().length_ms(),
            MAX_STARTS_MS
        );
        let refused = query(1001 + MAX_STARTS_MS).unwrap_err().to_string();
        assert!(refused.contains("at most 400 days"), "{refused}");
    }
}
