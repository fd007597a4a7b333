//! Methods of metrics-svc for the REST API: the processes of a VM at a time and over time.
//!
//! All times are Unix milliseconds. A process is identified by its pid and start time, because pids are reused.

use serde::{Deserialize, Deserializer, Serialize};

use super::{
    Class, InstanceId, Method, MethodInfo, bounded_text,
    history::{Points, Stat, TimeRange, query},
    metrics::{Limit, RowId},
};
use crate::wire::Fault;

/// The name of a process: 1 to 256 bytes (the kernel limits names to 15; other programs can store longer ones).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(min_length = 1))]
pub struct ProcessName(String);

impl ProcessName {
    /// The rule to report to a caller.
    pub const RULE: &str = "must be a text of 1 to 256 bytes";

    /// `None` if the text is not a process name.
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
    /// CPU usage.
    #[default]
    Cpu,
    /// Memory usage.
    Mem,
    /// Disk rate, reads and writes together.
    Disk,
    /// Process id.
    Pid,
    /// Name, compared by bytes.
    Name,
}

/// The sort direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Order {
    /// Ascending.
    Asc,
    /// Descending.
    Desc,
}

impl ProcessSort {
    /// The default direction: descending for usage, ascending for names and pids.
    pub const fn usual_order(self) -> Order {
        match self {
            Self::Cpu | Self::Mem | Self::Disk => Order::Desc,
            Self::Pid | Self::Name => Order::Asc,
        }
    }
}

/// Selects the process table at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessesAtQuery {
    pub instance_id: InstanceId,
    /// The time; the present if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_ms: Option<u64>,
    #[serde(default)]
    pub sort: ProcessSort,
    /// [`ProcessSort::usual_order`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// Only processes with exactly this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<ProcessName>,
    /// Maximum number of processes.
    #[serde(default)]
    pub limit: Limit,
    /// Only processes after this position, where the previous page ended. Its time takes precedence over `at_ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<TablePlace>,
}

/// The position of a row in the process table at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablePlace {
    /// Time of the table.
    pub at_ms: u64,
    pub id: RowId,
}

/// A process in one sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessRow {
    pub name: String,
    pub pid: u32,
    /// CPU usage, percent of one core; can exceed 100.
    pub cpu_util: f64,
    /// Memory usage, percent of the VM's memory.
    pub mem: f64,
    /// Read rate, KiB/s.
    pub disk_read: f64,
    /// Write rate, KiB/s.
    pub disk_write: f64,
    pub started_ms: u64,
    /// When the process was found to have ended; null while it runs. An ended process appears in one table, the first
    /// after its end.
    pub ended_ms: Option<u64>,
}

/// The process table at a time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessTable {
    /// Time of the sample: the requested time or the latest before it; null if there is no table.
    pub at_ms: Option<u64>,
    /// Number of processes in the table, before the limit.
    pub total: u64,
    /// The processes, sorted; ties are ordered by pid.
    pub processes: Vec<ProcessRow>,
    /// Where this page ended; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<TablePlace>,
}

/// Reads the process table of the newest sample at or before a time, at most seven days before. The cost is that of
/// one sample, independent of the length of the history.
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
    /// The rule to report to a caller.
    pub const RULE: &str = "must have a name or a pid";

    /// `None` if neither name nor pid is given.
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

/// Selects the history of some processes of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessHistoryQuery {
    pub instance_id: InstanceId,
    pub process: ProcessSelector,
    pub range: TimeRange,
    /// Maximum number of buckets.
    #[serde(default)]
    pub points: Points,
    /// Only buckets that start after this time: the start of the last bucket of the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
}

/// A bucket of the history of the selected processes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessBucket {
    /// Start of the bucket; it ends [`ProcessSeries::step_ms`] later.
    pub at_ms: u64,
    /// Number of samples in the bucket; a sample with several rows counts once.
    pub count: u64,
    /// Number of selected processes that ran.
    pub processes: Stat,
    /// Their total CPU usage, percent of one core.
    pub cpu_util: Stat,
    /// Their total memory usage, percent of the VM's memory; shared memory counts for each process.
    pub mem: Stat,
    /// Their total read rate, KiB/s.
    pub disk_read: Stat,
    /// Their total write rate, KiB/s.
    pub disk_write: Stat,
}

/// The history of the selected processes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessSeries {
    /// Length of each bucket; 0 if there are none.
    pub step_ms: u64,
    /// Ordered and aligned as in [`super::history::VmSeries`]. Buckets without any of the processes are omitted.
    pub buckets: Vec<ProcessBucket>,
    /// Whether more buckets follow.
    #[serde(default)]
    pub more: bool,
}

/// Reads the history of the processes with a name or pid as one series: their total usage at each sample, with
/// minimum, mean and maximum per bucket. Eight workers of a web server are one line on the chart; a pid selects a
/// single process. The series is read from the rows, so that a longer range costs more.
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

/// Selects starts and ends of a VM's processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEventsQuery {
    pub instance_id: InstanceId,
    pub range: TimeRange,
    /// Maximum number of events; the newest are returned.
    #[serde(default)]
    pub limit: Limit,
    /// Only events after this position, where the previous page ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<EventPlace>,
}

/// The position of an event in the order newest first. The fields are compared in the order of their declaration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EventPlace {
    /// Time of the event.
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
    /// The process was found to have ended.
    Ended,
}

/// A start or an end of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEvent {
    /// Time of the event.
    pub at_ms: u64,
    pub kind: ProcessEventKind,
    /// Name of the process.
    pub name: String,
    pub pid: u32,
    pub started_ms: u64,
}

impl ProcessEvent {
    /// The position in the order newest first. It is unique within a VM.
    pub const fn place(&self) -> EventPlace {
        EventPlace {
            at_ms: self.at_ms,
            kind: self.kind,
            pid: self.pid,
            started_ms: self.started_ms,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEventList {
    /// The newest first.
    pub events: Vec<ProcessEvent>,
    /// Whether the range holds older events.
    pub more: bool,
}

/// Reads starts and ends of a VM's processes as seen in its samples. A process that lived between two samples is
/// missing, and one whose end was not observed (its VM was switched off, its agent stopped) has no end event.
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
    fn sorts_table_by_highest_usage_by_default() {
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
    fn rejects_selector_without_name_and_pid() {
        let selector: ProcessSelector = serde_json::from_str(r#"{"name":"nginx"}"#).unwrap();
        assert_eq!(serde_json::to_string(&selector).unwrap(), r#"{"name":"nginx"}"#);
        let error = serde_json::from_str::<ProcessSelector>("{}")
            .unwrap_err()
            .to_string();
        assert!(error.contains(ProcessSelector::RULE), "{error}");
    }
}
