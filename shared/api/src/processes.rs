//! Methods of metrics-svc for the REST API: the processes of a VM at one time, and their usage over time.
//!
//! All times are in Unix milliseconds. A process is identified by its pid and its start time, because operating systems
//! reuse pids.

use serde::{Deserialize, Deserializer, Serialize};

use super::{
    Class, InstanceId, Method, MethodInfo, bounded_text,
    history::{Points, Stat, TimeRange, query},
    metrics::{CpuSeconds, Limit, ProcessOwner, RowId, ShortLived},
};
use crate::wire::Fault;

/// The name of a process: 1 to 256 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(min_length = 1))]
pub struct ProcessName(String);

impl ProcessName {
    /// The validation rule for a process name, as quoted in error messages to callers.
    pub const RULE: &str = "must be a text of 1 to 256 bytes";

    /// Returns `None` if the text is not a valid process name.
    pub fn new(name: &str) -> Option<Self> {
        Self::allows(name).then(|| Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(name: &str) -> bool {
        (1..=256).contains(&name.len())
    }
}

impl<'de> Deserialize<'de> for ProcessName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

/// The sort key of a process table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ProcessSort {
    /// Sorts by CPU usage.
    #[default]
    Cpu,
    /// Sorts by memory usage.
    Mem,
    /// Sorts by the sum of disk read rate and disk write rate.
    Disk,
    /// Sorts by process id.
    Pid,
    /// Sorts by process name, compared byte by byte.
    Name,
}

/// The sort direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Order {
    /// Ascending order.
    Asc,
    /// Descending order.
    Desc,
}

impl ProcessSort {
    /// The default sort direction: descending for usage, ascending for names and pids.
    pub const fn usual_order(self) -> Order {
        match self {
            Self::Cpu | Self::Mem | Self::Disk => Order::Desc,
            Self::Pid | Self::Name => Order::Asc,
        }
    }
}

/// Selects the process table of a VM at a given time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessesAtQuery {
    pub instance_id: InstanceId,
    /// Time of the process table; the current time if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_ms: Option<u64>,
    #[serde(default)]
    pub sort: ProcessSort,
    /// Sort direction; [`ProcessSort::usual_order`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// Returns only processes with exactly this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<ProcessName>,
    /// Maximum number of processes to return.
    #[serde(default)]
    pub limit: Limit,
    /// Returns only processes after this position, which is where the previous page ended. The time in this position
    /// overrides `at_ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<TablePosition>,
}

/// The position of a process in the sorted process table of a given time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablePosition {
    /// Time of the process table.
    pub at_ms: u64,
    pub id: RowId,
}

/// What a row of a process table describes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ProcessRowKind {
    /// One process.
    #[default]
    Process,
    /// Several processes of the same name and user, or all that the agent does not select for reporting.
    Sum,
}

/// The values of a process in one sample, or of several processes together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessRow {
    #[serde(default)]
    pub kind: ProcessRowKind,
    /// Number of processes of a summed row; `None` if unknown and for a single process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    pub name: String,
    /// 0 for a summed row, as is the start.
    pub pid: u32,
    /// CPU usage of the process, percent of one core; can exceed 100.
    pub cpu_util: f64,
    /// Memory usage of the process, percent of the VM's memory.
    pub mem: f64,
    /// Read rate of the process, KiB/s.
    pub disk_read: f64,
    /// Write rate of the process, KiB/s.
    pub disk_write: f64,
    pub started_ms: u64,
    /// Time at which the agent noticed that the process had ended; null while the process runs. An ended process
    /// appears in only one table: that of the first sample after its end.
    pub ended_ms: Option<u64>,
    /// CPU time of the process since the previous sample, seconds; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_seconds: Option<f64>,
    /// Exit status of an ended process, 128 plus the number of the signal if a signal ended it; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u32>,
    #[serde(default, skip_serializing_if = "ProcessOwner::is_unknown")]
    pub owner: ProcessOwner,
}

impl ProcessRow {
    /// Whether the row describes the process with this pid.
    pub fn has_pid(&self, pid: u32) -> bool {
        self.kind == ProcessRowKind::Process && self.pid == pid
    }
}

/// The process table of a VM at a given time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessTable {
    /// Time of the sample: the requested time or the latest sample before it; null if there is no such sample.
    pub at_ms: Option<u64>,
    /// Number of processes in the whole table, regardless of the page limit.
    pub total: u64,
    /// CPU time of the VM since the previous sample; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_cpu: Option<CpuSeconds>,
    /// CPU time of all processes in the table since the previous sample, seconds.
    #[serde(default)]
    pub cpu_seconds: f64,
    /// How the agent measured processes that ended between two samples; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_lived: Option<ShortLived>,
    /// The sorted processes; processes with equal sort keys are sorted by pid.
    pub processes: Vec<ProcessRow>,
    /// Position where this page ended; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<TablePosition>,
}

/// Reads the process table from the newest sample at or before the given time, up to seven days earlier. The query
/// reads only one sample, so its cost does not depend on the length of the history.
#[derive(Debug)]
pub struct ProcessesAt;

impl Method for ProcessesAt {
    type Params = ProcessesAtQuery;
    type Reply = ProcessTable;
    const INFO: MethodInfo = query("metrics.process.at");

    fn instance(params: &ProcessesAtQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<ProcessTable, Fault> {
        Ok(ProcessTable::default())
    }
}

/// Selects processes by name, by pid, or by both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawSelector")]
pub struct ProcessSelector {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<ProcessName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
}

#[derive(Deserialize)]
struct RawSelector {
    name: Option<ProcessName>,
    pid: Option<u32>,
}

impl TryFrom<RawSelector> for ProcessSelector {
    type Error = &'static str;

    fn try_from(RawSelector { name, pid }: RawSelector) -> Result<Self, Self::Error> {
        Self::new(name, pid).ok_or(Self::RULE)
    }
}

impl ProcessSelector {
    /// The validation rule for a process selector, as quoted in error messages to callers.
    pub const RULE: &str = "must have a name or a pid";

    /// Returns `None` if neither a name nor a pid is given.
    pub fn new(name: Option<ProcessName>, pid: Option<u32>) -> Option<Self> {
        (name.is_some() || pid.is_some()).then_some(Self { name, pid })
    }

    pub const fn name(&self) -> Option<&ProcessName> {
        self.name.as_ref()
    }

    pub const fn pid(&self) -> Option<u32> {
        self.pid
    }
}

/// Selects the history of some of a VM's processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessHistoryQuery {
    pub instance_id: InstanceId,
    pub process: ProcessSelector,
    pub range: TimeRange,
    /// Maximum number of time buckets to return.
    #[serde(default)]
    pub points: Points,
    /// Returns only time buckets that start after this time. The next page starts after the last bucket of the previous
    /// page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
}

/// A time bucket in the history of the selected processes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessBucket {
    /// Start of the time bucket; the bucket ends [`ProcessSeries::step_ms`] later.
    pub at_ms: u64,
    /// Number of samples in the time bucket; a sample with several of the selected processes counts once.
    pub count: u64,
    /// Number of selected processes that were running.
    pub processes: Stat,
    /// Total CPU usage of the selected processes, percent of one core.
    pub cpu_util: Stat,
    /// Total memory usage of the selected processes, percent of the VM's memory; shared memory is counted once for each
    /// process.
    pub mem: Stat,
    /// Total read rate of the selected processes, KiB/s.
    pub disk_read: Stat,
    /// Total write rate of the selected processes, KiB/s.
    pub disk_write: Stat,
}

/// The history of the selected processes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessSeries {
    /// Length of each time bucket in milliseconds; 0 if there are no buckets.
    pub step_ms: u64,
    /// The time buckets, sorted and aligned as in [`super::history::VmSeries`]. Buckets in which none of the processes
    /// ran are omitted.
    pub buckets: Vec<ProcessBucket>,
    /// The value of `after_ms` for the next page; absent on the last page. A page that is not the last one may have no
    /// buckets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// Reads the combined history of all processes with the given name or pid: their total usage in each sample, with
/// minimum, mean and maximum for each time bucket. For example, eight workers of a web server appear as one line in the
/// chart; a pid selects a single process. The history is computed from rows, not from rollups, so a longer range
/// costs more.
#[derive(Debug)]
pub struct ProcessHistory;

impl Method for ProcessHistory {
    type Params = ProcessHistoryQuery;
    type Reply = ProcessSeries;
    const INFO: MethodInfo = MethodInfo {
        class: Class::HeavyRead,
        ..query("metrics.process.history")
    };

    fn instance(params: &ProcessHistoryQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<ProcessSeries, Fault> {
        Ok(ProcessSeries::default())
    }
}

/// Selects the start and end events of a VM's processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEventsQuery {
    pub instance_id: InstanceId,
    pub range: TimeRange,
    /// Maximum number of events to return; the newest are returned.
    #[serde(default)]
    pub limit: Limit,
    /// Returns only events after this position, which is where the previous page ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<EventPosition>,
}

/// The position of an event in a list sorted newest first. The derived comparison uses the fields in the order of their
/// declaration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EventPosition {
    /// Time at which the process started or ended.
    pub at_ms: u64,
    pub kind: ProcessEventKind,
    pub pid: u32,
    pub started_ms: u64,
}

/// The kind of a process event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ProcessEventKind {
    /// The process started.
    Started,
    /// The agent noticed that the process had ended.
    Ended,
}

/// The start or the end of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEvent {
    /// Time at which the process started or ended.
    pub at_ms: u64,
    pub kind: ProcessEventKind,
    /// Name of the process.
    pub name: String,
    pub pid: u32,
    pub started_ms: u64,
}

impl ProcessEvent {
    /// The position of the event in a list sorted newest first. It is unique within a VM.
    pub const fn position(&self) -> EventPosition {
        EventPosition {
            at_ms: self.at_ms,
            kind: self.kind,
            pid: self.pid,
            started_ms: self.started_ms,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEventList {
    /// The process events, newest first.
    pub events: Vec<ProcessEvent>,
    /// Position where this page ended; absent on the last page. A page that is not the last one may have no events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<EventPosition>,
}

/// Reads the starts and ends of a VM's processes, as observed in its samples. A process that started and ended between
/// two samples is missing. A process has no end event if no agent observed the end, because the VM was switched off or
/// the agent was stopped.
#[derive(Debug)]
pub struct ProcessEvents;

impl Method for ProcessEvents {
    type Params = ProcessEventsQuery;
    type Reply = ProcessEventList;
    const INFO: MethodInfo = MethodInfo {
        class: Class::HeavyRead,
        ..query("metrics.process.events")
    };

    fn instance(params: &ProcessEventsQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<ProcessEventList, Fault> {
        Ok(ProcessEventList::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_table_is_sorted_by_highest_usage_by_default() {
        let query: ProcessesAtQuery = serde_json::from_str(r#"{"instance_id":"vm-1"}"#).unwrap();
        assert_eq!(
            (query.sort, query.at_ms, query.limit.get()),
            (ProcessSort::Cpu, None, 10)
        );
        assert_eq!(query.sort.usual_order(), Order::Desc);
        assert_eq!(ProcessSort::Name.usual_order(), Order::Asc);
        let query = r#"{"instance_id":"vm-1","sort":"disk","order":"asc","name":""}"#;
        let error = serde_json::from_str::<ProcessesAtQuery>(query)
            .unwrap_err()
            .to_string();
        assert!(error.contains(ProcessName::RULE), "{error}");
    }

    #[test]
    fn process_selector_without_name_or_pid_is_rejected() {
        let selector: ProcessSelector = serde_json::from_str(r#"{"name":"nginx"}"#).unwrap();
        assert_eq!(serde_json::to_string(&selector).unwrap(), r#"{"name":"nginx"}"#);
        let error = serde_json::from_str::<ProcessSelector>("{}")
            .unwrap_err()
            .to_string();
        assert!(error.contains(ProcessSelector::RULE), "{error}");
    }
}
