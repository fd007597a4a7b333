//! Method of metrics-svc that finds the VMs in which a process ran.

use serde::{Deserialize, Serialize};

use super::{
    Class, InstanceId, Method, MethodInfo,
    history::{TimeRange, query},
    metrics::Limit,
    processes::ProcessName,
    vms::Stale,
};

/// Maximum length of the time range of a search: 400 days.
pub const MAX_SEARCH_MS: u64 = 400 * 86_400_000;
/// Minimum length of a prefix in characters. Shorter ones would select nearly everything.
pub const MIN_PREFIX: usize = 3;
/// Maximum number of names that are listed for a VM.
pub const MAX_NAMES_LISTED: usize = 10;

/// How process names are compared with the name in a search.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ProcessMatch {
    /// The names are equal.
    #[default]
    Exact,
    /// The name of the process begins with the name in the search, which must have at least three characters.
    Prefix,
}

/// Selects the VMs in which processes with a name ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawQuery")]
pub struct ProcessSearchQuery {
    name: ProcessName,
    matching: ProcessMatch,
    range: TimeRange,
    /// Maximum number of VMs to return.
    pub limit: Limit,
    /// The `next` value of the previous page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<InstanceId>,
}

#[derive(Deserialize)]
struct RawQuery {
    name: ProcessName,
    #[serde(default)]
    matching: ProcessMatch,
    range: TimeRange,
    #[serde(default)]
    limit: Limit,
    after: Option<InstanceId>,
}

impl TryFrom<RawQuery> for ProcessSearchQuery {
    type Error = &'static str;

    fn try_from(raw: RawQuery) -> Result<Self, Self::Error> {
        let mut query = Self::new(raw.name, raw.matching, raw.range)?;
        (query.limit, query.after) = (raw.limit, raw.after);
        Ok(query)
    }
}

impl ProcessSearchQuery {
    /// The rule for prefixes, as quoted in error messages to callers.
    pub const PREFIX_RULE: &str = "name must have at least 3 characters to be a prefix";
    /// The rule for time ranges, as quoted in error messages to callers.
    pub const RANGE_RULE: &str = "the time range must be at most 400 days long";

    /// Creates a query for the first page; fails with a rule that it breaks.
    pub fn new(name: ProcessName, matching: ProcessMatch, range: TimeRange) -> Result<Self, &'static str> {
        if matching == ProcessMatch::Prefix && name.as_str().chars().count() < MIN_PREFIX {
            return Err(Self::PREFIX_RULE);
        }
        if range.length_ms() > MAX_SEARCH_MS {
            return Err(Self::RANGE_RULE);
        }
        Ok(Self {
            name,
            matching,
            range,
            limit: Limit::default(),
            after: None,
        })
    }

    pub const fn name(&self) -> &ProcessName {
        &self.name
    }

    pub const fn matching(&self) -> ProcessMatch {
        self.matching
    }

    pub const fn range(&self) -> TimeRange {
        self.range
    }
}

/// A VM in which selected processes ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmThatRan {
    pub instance_id: InstanceId,
    /// The hypervisor's name for the VM; `None` if no hypervisor has it.
    pub vm_name: Option<String>,
    /// Names of the processes, sorted; at most [`MAX_NAMES_LISTED`].
    pub names: Vec<String>,
    /// When a process was first and last seen. If one was also seen earlier or later on the same day, outside the time
    /// range, these are the start of the first hour and the end of the last hour in which one was seen.
    pub first_ms: u64,
    pub last_ms: u64,
    /// Number of hours (UTC) in which a process was seen.
    pub hours: u32,
    /// Greatest number of processes with one of the names in one sample of the days (UTC) that the range touches.
    pub processes: u32,
    /// Greatest CPU usage of one of the processes on these days, percent of one core.
    pub cpu_util: f64,
    /// Greatest memory usage of one of the processes on these days, percent of the VM's memory.
    pub mem: f64,
}

/// A page of the VMs in which selected processes ran.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessSearchPage {
    /// The time range, extended to whole hours (UTC).
    pub from_ms: u64,
    pub to_ms: u64,
    /// The VMs, in a fixed order of their ids.
    pub vms: Vec<VmThatRan>,
    /// The value of `after` for the next page; `None` on the last page. A page may have fewer VMs than requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<InstanceId>,
    /// All samples that were stored before this time are included; `None` while the names of older samples are still
    /// being collected.
    pub complete_to_ms: Option<u64>,
    /// VMs of this page whose processes had too many different names to search all of them.
    #[serde(default)]
    pub unsearched: Vec<InstanceId>,
    #[serde(default)]
    pub stale: Vec<Stale>,
}

/// Finds the VMs in which processes with a name ran. The answer does not depend on the number of rows: the names of each
/// VM and day are kept with the hours in which they were seen.
#[derive(Debug)]
pub struct ProcessSearch;

impl Method for ProcessSearch {
    type Params = ProcessSearchQuery;
    type Reply = ProcessSearchPage;
    const INFO: MethodInfo = MethodInfo {
        class: Class::HeavyRead,
        ..query("metrics.process.search")
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_prefix_and_long_time_range_are_rejected() {
        let read = |name: &str, matching: &str, to_ms: u64| {
            let range = format!(r#"{{"from_ms":1,"to_ms":{to_ms}}}"#);
            let query = format!(r#"{{"name":"{name}","matching":"{matching}","range":{range}}}"#);
            serde_json::from_str::<ProcessSearchQuery>(&query).map_err(|error| error.to_string())
        };
        assert!(read("ab", "exact", 2).is_ok());
        assert!(read("数据库", "prefix", 2).is_ok());
        assert!(read("abc", "prefix", MAX_SEARCH_MS + 1).is_ok());
        let error = read("ab", "prefix", 2).unwrap_err();
        assert!(error.contains(ProcessSearchQuery::PREFIX_RULE), "{error}");
        let error = read("abc", "exact", MAX_SEARCH_MS + 2).unwrap_err();
        assert!(error.contains(ProcessSearchQuery::RANGE_RULE), "{error}");
        let error = read("", "exact", 2).unwrap_err();
        assert!(error.contains(ProcessName::RULE), "{error}");
    }
}
