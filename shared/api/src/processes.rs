//! Methods of metrics-svc for the REST API: the processes of a VM, at any moment and over time.
//!
//! All times are Unix milliseconds. A process is one pid from its start to its end: pids are reused.

use serde::{Deserialize, Deserializer, Serialize};

use super::{
    Class, InstanceId, Method, MethodInfo, bounded_text,
    history::{Points, Stat, TimeRange, query},
    metrics::{Limit, RowId},
};
use crate::wire::Fault;

/// The name of a process: 1 to 256 bytes. The kernel's own bound is 15; other reporters may store longer ones.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(min_length = 1))]
pub struct ProcessName(String);

impl ProcessName {
    /// The rule, for a caller who broke it.
    pub const RULE: &str = "must be a text of 1 to 256 bytes";

    /// The name, if it is one.
    pub fn new(name: &str) -> Option<Self> {
        Self::allows(name).then(|| Self(name.to_owned()))
    }

    /// The text.
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

/// What a process table is sorted by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ProcessSort {
    /// CPU share.
    #[default]
    Cpu,
    /// Memory share.
    Mem,
    /// Disk rate, reads and writes together.
    Disk,
    /// Process id.
    Pid,
    /// Name, by its bytes.
    Name,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Order {
    /// The least first.
    Asc,
    /// The greatest first.
    Desc,
}

impl ProcessSort {
    /// The way that is meant where none is given: the greatest consumers first, names and pids from their beginning.
    pub const fn usual_order(self) -> Order {
        match self {
            Self::Cpu | Self::Mem | Self::Disk => Order::Desc,
            Self::Pid | Self::Name => Order::Asc,
        }
    }
}

/// Asks for the process table of a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessesAtQuery {
    /// Which VM.
    pub instance_id: InstanceId,
    /// The moment; now where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_ms: Option<u64>,
    /// Sorted by what.
    #[serde(default)]
    pub sort: ProcessSort,
    /// Which way; [`ProcessSort::usual_order`] where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// Only processes of exactly this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<ProcessName>,
    /// At most how many.
    #[serde(default)]
    pub limit: Limit,
    /// Only processes behind this place, where the page before ended. It names the moment, whatever `at_ms` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<TablePlace>,
}

/// A row's place in the process table of a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablePlace {
    /// The moment of the table.
    pub at_ms: u64,
    /// The row.
    pub id: RowId,
}

/// A process as one sample saw it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessRow {
    /// Its name.
    pub name: String,
    /// Its id.
    pub pid: u32,
    /// Share of one core, percent; may pass 100.
    pub cpu_util: f64,
    /// Share of the VM's memory, percent.
    pub mem: f64,
    /// Read rate, KiB/s.
    pub disk_read: f64,
    /// Write rate, KiB/s.
    pub disk_write: f64,
    /// When it started.
    pub started_ms: u64,
    /// When it was seen to have ended; null while it runs. An ended process is in one table, the first after its end.
    pub ended_ms: Option<u64>,
}

/// The process table of a moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessTable {
    /// When it was sampled: at the moment asked for, or the last time before; null where there is no table.
    pub at_ms: Option<u64>,
    /// How many processes it has, before the limit.
    pub total: u64,
    /// The processes, sorted; ties by pid.
    pub processes: Vec<ProcessRow>,
    /// Where the page ended; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<TablePlace>,
}

/// Reads the process table of the newest sample at or before a moment, at most seven days before. The cost is that of
/// one sample, however long the history and however far back the moment.
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

/// Which processes: those of a name, those that had a pid, or those of the name that had the pid.
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
    /// The rule, for a caller who broke it.
    pub const RULE: &str = "must have a name or a pid";

    /// The selector, if it selects anything.
    pub fn new(name: Option<ProcessName>, pid: Option<u32>) -> Option<Self> {
        (name.is_some() || pid.is_some()).then_some(Self { name, pid })
    }

    /// The name.
    pub const fn name(&self) -> Option<&ProcessName> {
        self.name.as_ref()
    }

    /// The pid.
    pub const fn pid(&self) -> Option<u32> {
        self.pid
    }
}

/// Asks for the past of some processes of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessHistoryQuery {
    /// Which VM.
    pub instance_id: InstanceId,
    /// Which processes.
    pub process: ProcessSelector,
    /// Which time.
    pub range: TimeRange,
    /// At most how many buckets.
    #[serde(default)]
    pub points: Points,
    /// Only buckets that begin after this moment, at which the last bucket of the page before begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
}

/// A bucket of the history of processes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessBucket {
    /// Its first millisecond; it ends [`ProcessSeries::step_ms`] later.
    pub at_ms: u64,
    /// How many samples it is made of: moments, not rows.
    pub count: u64,
    /// How many of the processes ran.
    pub processes: Stat,
    /// Their CPU together, percent of one core.
    pub cpu_util: Stat,
    /// Their memory together, percent of the VM's; memory that they share counts for each.
    pub mem: Stat,
    /// Their read rate together, KiB/s.
    pub disk_read: Stat,
    /// Their write rate together, KiB/s.
    pub disk_write: Stat,
}

/// The history of some processes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessSeries {
    /// How long each bucket is; 0 where there are none.
    pub step_ms: u64,
    /// As in [`super::history::VmSeries`]. Buckets in which none of the processes was seen are left out.
    pub buckets: Vec<ProcessBucket>,
    /// Whether there are more behind the last.
    #[serde(default)]
    pub more: bool,
}

/// Reads the history of the processes of a name or a pid, as one series: what they used together at each sample, and
/// of these sums the least, the mean and the greatest in each bucket. Eight workers of a web server are one line on
/// the chart; a single process is selected by its pid. It is read from the rows, so that a longer range costs more.
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

/// Asks for starts and ends of a VM's processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEventsQuery {
    /// Which VM.
    pub instance_id: InstanceId,
    /// Which time.
    pub range: TimeRange,
    /// At most how many, the newest.
    #[serde(default)]
    pub limit: Limit,
    /// Only events behind this place, where the page before ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<EventPlace>,
}

/// An event's place in the order of the newest: the fields sort from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EventPlace {
    /// When it happened.
    pub at_ms: u64,
    /// What happened.
    pub kind: ProcessEventKind,
    /// The id of the process.
    pub pid: u32,
    /// When the process started.
    pub started_ms: u64,
}

/// What happened to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ProcessEventKind {
    /// It started.
    Started,
    /// It was seen to have ended.
    Ended,
}

/// A start or an end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEvent {
    /// When.
    pub at_ms: u64,
    /// What.
    pub kind: ProcessEventKind,
    /// The name of the process.
    pub name: String,
    /// Its id.
    pub pid: u32,
    /// When it started.
    pub started_ms: u64,
}

impl ProcessEvent {
    /// Its place in the order of the newest. No two events of a VM share one.
    pub const fn place(&self) -> EventPlace {
        EventPlace {
            at_ms: self.at_ms,
            kind: self.kind,
            pid: self.pid,
            started_ms: self.started_ms,
        }
    }
}

/// Starts and ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEventList {
    /// The newest first.
    pub events: Vec<ProcessEvent>,
    /// Whether the range holds older ones behind the last.
    pub more: bool,
}

/// Reads starts and ends of a VM's processes, as its samples show them: a process that lived between two samples was
/// never seen, and one that ended unseen (its VM was switched off, its agent stopped) has no end.
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
    fn a_table_is_asked_for_with_the_greatest_consumers_first() {
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
    fn a_selector_selects_something() {
        let selector: ProcessSelector = serde_json::from_str(r#"{"name":"nginx"}"#).unwrap();
        assert_eq!(serde_json::to_string(&selector).unwrap(), r#"{"name":"nginx"}"#);
        let error = serde_json::from_str::<ProcessSelector>("{}")
            .unwrap_err()
            .to_string();
        assert!(error.contains(ProcessSelector::RULE), "{error}");
    }
}
