//! What explains an alert: processes, or the last thing that happened to the VM; and the method of metrics-svc that finds the
//! processes.

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use super::EndedBy;
use crate::{
    Class, InstanceId, Method, MethodInfo,
    history::{TimeRange, query},
    metrics::ProcessOwner,
    processes::ProcessRowKind,
};

/// Number of processes that are kept with an alert.
pub const CULPRITS: usize = 5;
/// Maximum number of processes in an answer of [`ProcessTop`].
pub const MAX_TOP: u16 = 100;
/// Maximum length of the time range of [`ProcessTop`]: one day.
pub const MAX_TOP_MS: u64 = 86_400_000;

/// The measure by which processes are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum TopMeasure {
    /// CPU time.
    #[default]
    Cpu,
    /// Memory.
    Mem,
    /// Bytes read and written.
    Disk,
}

/// A process, or several that are summed in one row, over a time range.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopProcess {
    #[serde(default)]
    pub kind: ProcessRowKind,
    pub name: String,
    /// 0 for a summed row, as is the start.
    pub pid: u32,
    pub started_ms: u64,
    /// Greatest number of processes of a summed row in one sample; `None` for a single process or if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    #[serde(default, skip_serializing_if = "ProcessOwner::is_unknown")]
    pub owner: ProcessOwner,
    /// CPU seconds in the time range, or the mean memory in percent of the VM's memory, or KiB read and written.
    pub amount: f64,
    /// The part of the VM's amount that is this process's, 0 to 1; of memory, the mean share of the VM's memory. `None` if
    /// the VM's amount is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// Exit status, if the process ended in the time range and the status is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u32>,
    /// When the process ended, if it did in the time range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<u64>,
}

/// What explains an alert.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Culprits {
    /// The time range that was looked at.
    pub from_ms: u64,
    pub to_ms: u64,
    #[serde(default)]
    pub measure: TopMeasure,
    /// Whether these are the processes of the last known table, because the VM has sent nothing since.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub last_known: bool,
    /// At most [`CULPRITS`] processes, those with the greatest amount first.
    #[serde(default)]
    pub processes: Vec<TopProcess>,
    /// The last operation on the VM, for alerts about silence and states.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<EndedBy>,
    /// Why processes could not be found; a text for users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Selects the greatest processes of a VM over a time range of at most a day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawQuery")]
pub struct TopQuery {
    pub instance_id: InstanceId,
    range: TimeRange,
    pub measure: TopMeasure,
    /// Number of processes, 1 to [`MAX_TOP`].
    limit: u16,
    /// Only processes with exactly this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<crate::processes::ProcessName>,
}

#[derive(Deserialize)]
struct RawQuery {
    instance_id: InstanceId,
    range: TimeRange,
    #[serde(default)]
    measure: TopMeasure,
    #[serde(deserialize_with = "limit")]
    limit: u16,
    name: Option<crate::processes::ProcessName>,
}

fn limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    match u16::deserialize(deserializer)? {
        limit @ 1..=MAX_TOP => Ok(limit),
        _ => Err(D::Error::custom("must be an integer from 1 to 100")),
    }
}

impl TryFrom<RawQuery> for TopQuery {
    type Error = &'static str;

    fn try_from(raw: RawQuery) -> Result<Self, Self::Error> {
        let mut query = Self::new(raw.instance_id, raw.range, raw.measure, raw.limit)?;
        query.name = raw.name;
        Ok(query)
    }
}

impl TopQuery {
    /// The rule for time ranges, as quoted in error messages to callers.
    pub const RANGE_RULE: &str = "the time range must be at most one day long";

    /// Fails with the rule that the time range breaks. The limit is set to the nearest one allowed.
    pub fn new(
        instance_id: InstanceId,
        range: TimeRange,
        measure: TopMeasure,
        limit: u16,
    ) -> Result<Self, &'static str> {
        if range.length_ms() > MAX_TOP_MS {
            return Err(Self::RANGE_RULE);
        }
        Ok(Self {
            instance_id,
            range,
            measure,
            limit: limit.clamp(1, MAX_TOP),
            name: None,
        })
    }

    pub const fn range(&self) -> TimeRange {
        self.range
    }

    pub const fn limit(&self) -> u16 {
        self.limit
    }
}

/// The greatest processes of a VM over a time range.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TopReply {
    /// Number of samples in the time range.
    pub samples: u64,
    /// The VM's amount, as for a process; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<f64>,
    /// Sorted by amount, greatest first.
    pub processes: Vec<TopProcess>,
    /// Whether the time range had more rows than a request may decode, so that only its end is included.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
}

/// Adds what each process used in a time range.
#[derive(Debug)]
pub struct ProcessTop;

impl Method for ProcessTop {
    type Params = TopQuery;
    type Reply = TopReply;
    const INFO: MethodInfo = MethodInfo {
        class: Class::HeavyRead,
        ..query("metrics.process.top")
    };

    fn instance(params: &TopQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<TopReply, crate::wire::Fault> {
        Ok(TopReply::default())
    }
}
