//! The history of a VM, aggregated into time buckets for a chart.
//!
//! All times are in Unix milliseconds.

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use super::{Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service, measures::VmMeasures};
use crate::wire::Fault;

/// Number of points in the sparkline of a VM.
pub const SPARKLINE_POINTS: usize = 20;
/// Length of time covered by each sparkline point; together the 20 points cover an hour.
pub const SPARKLINE_STEP_MS: u64 = 180_000;
/// The end of the year 9999, the last year that a `create_date` can represent.
const LAST_MS: u64 = 253_402_300_799_999;

/// A non-empty time range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawRange")]
pub struct TimeRange {
    from_ms: u64,
    to_ms: u64,
}

#[derive(Deserialize)]
struct RawRange {
    from_ms: u64,
    to_ms: u64,
}

impl TryFrom<RawRange> for TimeRange {
    type Error = &'static str;

    fn try_from(RawRange { from_ms, to_ms }: RawRange) -> Result<Self, Self::Error> {
        Self::new(from_ms, to_ms).ok_or(Self::RULE)
    }
}

impl TimeRange {
    /// The validation rule for a time range, as quoted in error messages to callers.
    pub const RULE: &str = "must begin before it ends, and end before the year 10000";

    /// Creates the time range from `from_ms` (inclusive) to `to_ms` (exclusive); `None` if the range is empty or ends
    /// after the year 9999.
    pub fn new(from_ms: u64, to_ms: u64) -> Option<Self> {
        (from_ms < to_ms && to_ms <= LAST_MS).then_some(Self { from_ms, to_ms })
    }

    /// Start of the time range, inclusive.
    pub const fn from_ms(self) -> u64 {
        self.from_ms
    }

    /// End of the time range, exclusive.
    pub const fn to_ms(self) -> u64 {
        self.to_ms
    }

    /// Length of the time range in milliseconds, at least 1.
    pub const fn length_ms(self) -> u64 {
        self.to_ms - self.from_ms
    }
}

/// Maximum number of points in a chart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Points(u16);

impl Points {
    /// The validation rule for the number of chart points, as quoted in error messages to callers.
    pub const RULE: &str = "must be an integer from 1 to 2000";

    /// Returns `None` unless `points` is from 1 to 2000.
    pub fn new(points: u64) -> Option<Self> {
        u16::try_from(points)
            .ok()
            .filter(|points| (1..=2000).contains(points))
            .map(Self)
    }

    pub const fn get(self) -> u16 {
        self.0
    }
}

/// The default is about as many points as a chart on a screen can show.
impl Default for Points {
    fn default() -> Self {
        Self(300)
    }
}

impl<'de> Deserialize<'de> for Points {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        serde_json::Value::deserialize(deserializer)?
            .as_u64()
            .and_then(Self::new)
            .ok_or_else(|| D::Error::custom(Self::RULE))
    }
}

/// The method table entry of a query for the REST API. Its class is `CheapRead` unless the caller overrides it.
pub(super) const fn query(subject: &'static str) -> MethodInfo {
    MethodInfo {
        service: Service::Metrics,
        subject,
        access: Access::Role(Role::Viewer),
        kind: Kind::Query,
        class: Class::CheapRead,
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmHistoryQuery {
    pub instance_id: InstanceId,
    pub range: TimeRange,
    /// Maximum number of time buckets to return.
    #[serde(default)]
    pub points: Points,
    /// Returns only time buckets that start after this time. The next page starts after the last bucket of the previous
    /// page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
}

/// Minimum, mean and maximum of a measure in a time bucket, encoded as a JSON array of three numbers. Means are rounded
/// to three decimals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "[f64; 3]", into = "[f64; 3]")]
pub struct Stat {
    pub min: f64,
    /// The mean of all samples in the time bucket.
    pub avg: f64,
    pub max: f64,
}

impl From<[f64; 3]> for Stat {
    fn from([min, avg, max]: [f64; 3]) -> Self {
        Self { min, avg, max }
    }
}

impl From<Stat> for [f64; 3] {
    fn from(stat: Stat) -> Self {
        [stat.min, stat.avg, stat.max]
    }
}

/// The source of a history: stored rows or rollups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Resolution {
    /// The history was computed from the stored rows.
    #[serde(rename = "raw")]
    Raw,
    /// The history was computed from five-minute rollups.
    #[serde(rename = "5m")]
    FiveMinutes,
    /// The history was computed from hourly rollups.
    #[serde(rename = "1h")]
    Hour,
    /// The history was computed from daily rollups.
    #[serde(rename = "1d")]
    Day,
}

/// A time bucket of a VM's history. A measure is null if no sample in the bucket has a value for it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VmBucket {
    /// Start of the time bucket; the bucket ends [`VmSeries::step_ms`] later.
    pub at_ms: u64,
    /// Number of samples in the time bucket.
    pub count: u64,
    #[serde(flatten)]
    pub stats: VmMeasures<Option<Stat>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmSeries {
    /// Length of each time bucket in milliseconds: a multiple of the resolution. Requests with the same range and
    /// number of points get the same length.
    pub step_ms: u64,
    /// The source that the history was computed from. Rollups can be a few seconds old (`VMWATCH_ROLLUP_INTERVAL`).
    pub resolution: Resolution,
    /// The time buckets, oldest first; each is computed from all its samples. Buckets without samples are omitted.
    /// Because buckets are aligned to multiples of their length (in local time), the first can start before the
    /// requested range and the last can end after it.
    pub buckets: Vec<VmBucket>,
    /// The value of `after_ms` for the next page; absent on the last page. A page that is not the last one may have no
    /// buckets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// The default is an empty history: the reply if the VM does not exist, has no rows in the range, or is hidden from the
/// principal.
impl Default for VmSeries {
    fn default() -> Self {
        Self {
            step_ms: 0,
            resolution: Resolution::Raw,
            buckets: Vec::new(),
            next: None,
        }
    }
}

/// Reads a VM's history, aggregated into at most the given number of time buckets. The buckets are computed from rows
/// or from the coarsest rollup with sufficient resolution, so a query over a year costs as much as one over a day.
#[derive(Debug)]
pub struct VmHistory;

impl Method for VmHistory {
    type Params = VmHistoryQuery;
    type Reply = VmSeries;
    const INFO: MethodInfo = MethodInfo {
        class: Class::HeavyRead,
        ..query("metrics.vm.history")
    };

    fn instance(params: &VmHistoryQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<VmSeries, Fault> {
        Ok(VmSeries::default())
    }
}

/// Reads the history of what the hypervisor measured of a VM, like [`VmHistory`]. It is a method of its own, because an
/// older service would ignore a parameter and answer the history of the agent.
#[derive(Debug)]
pub struct VmHypervisorHistory;

impl Method for VmHypervisorHistory {
    type Params = VmHistoryQuery;
    type Reply = VmSeries;
    const INFO: MethodInfo = MethodInfo {
        class: Class::HeavyRead,
        ..query("metrics.vm.hypervisor_history")
    };

    fn instance(params: &VmHistoryQuery) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<VmSeries, Fault> {
        Ok(VmSeries::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_range_that_does_not_start_before_its_end_is_rejected() {
        let good = r#"{"instance_id":"vm-1","range":{"from_ms":1,"to_ms":2}}"#;
        let query: VmHistoryQuery = serde_json::from_str(good).unwrap();
        assert_eq!((query.range.length_ms(), query.points.get()), (1, 300));
        for bad in [
            r#"{"from_ms":2,"to_ms":2}"#,
            r#"{"from_ms":3,"to_ms":2}"#,
            r#"{"from_ms":3,"to_ms":253402300800000}"#,
        ] {
            let error = serde_json::from_str::<TimeRange>(bad).unwrap_err().to_string();
            assert!(error.contains(TimeRange::RULE), "{bad}: {error}");
        }
    }

    #[test]
    fn number_of_chart_points_must_be_from_1_to_2000() {
        for (text, points) in [("1", 1), ("2000", 2000)] {
            assert_eq!(serde_json::from_str::<Points>(text).unwrap().get(), points);
        }
        for bad in ["0", "2001", "-1", "1.5", "\"5\"", "null"] {
            let error = serde_json::from_str::<Points>(bad).unwrap_err().to_string();
            assert!(error.contains(Points::RULE), "{bad}: {error}");
        }
    }

    #[test]
    fn history_bucket_matches_golden_json() {
        let golden = r#"{"at_ms":1483277880000,"count":2,"cpu_util":[0.0,1.5,3.0],"mem":null,"disk_read":null,"disk_write":null,"net_incoming":null,"net_outgoing":null,"proc":[95.0,95.5,96.0],"cores":[4.0,4.0,4.0],"steal":null,"load":null,"swap":null,"pressure_cpu":null,"pressure_mem":null,"pressure_io":null}"#;
        let bucket: VmBucket = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&bucket).unwrap(), golden);
    }
}
