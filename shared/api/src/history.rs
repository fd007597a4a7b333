//! Methods of metrics-svc for the REST API: VMs with their newest values, and a VM's past reduced to a chart.
//!
//! All times are Unix milliseconds.

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use super::{
    Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service,
    lifecycle::{Page, Target},
    measures::{VmMeasures, VmValues},
};
use crate::wire::Fault;

/// How many points the sparkline of a [`VmSummary`] has.
pub const SPARKLINE_POINTS: usize = 20;
/// The time that one of them stands for: twenty are an hour.
pub const SPARKLINE_STEP_MS: u64 = 180_000;
/// The year 9999: the last that a `create_date` can name.
const LAST_MS: u64 = 253_402_300_799_999;

/// A range of time that is not empty.
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
    /// The rule, for a caller who broke it.
    pub const RULE: &str = "must begin before it ends, and end before the year 10000";

    /// The range from the one moment up to, and without, the other.
    pub fn new(from_ms: u64, to_ms: u64) -> Option<Self> {
        (from_ms < to_ms && to_ms <= LAST_MS).then_some(Self { from_ms, to_ms })
    }

    /// The first millisecond.
    pub const fn from_ms(self) -> u64 {
        self.from_ms
    }

    /// The millisecond behind the last.
    pub const fn to_ms(self) -> u64 {
        self.to_ms
    }

    /// How long it is, in milliseconds; at least 1.
    pub const fn length_ms(self) -> u64 {
        self.to_ms - self.from_ms
    }
}

/// How many points a chart may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Points(u16);

impl Points {
    /// The rule, for a caller who broke it.
    pub const RULE: &str = "must be an integer from 1 to 2000";

    /// The number of points, if it is within 1 to 2000.
    pub fn new(points: u64) -> Option<Self> {
        u16::try_from(points)
            .ok()
            .filter(|points| (1..=2000).contains(points))
            .map(Self)
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// About what a chart on a screen can show.
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

/// A row of the table for a query that the document does not know, of small cost unless it says otherwise.
pub(super) const fn query(subject: &'static str) -> MethodInfo {
    MethodInfo {
        service: Service::Metrics,
        subject,
        access: Access::Role(Role::Viewer),
        kind: Kind::Query,
        class: Class::CheapRead,
    }
}

/// A VM's newest row, with its recent past in short.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmSummary {
    /// Which VM.
    pub instance_id: InstanceId,
    /// When the newest row was sampled, by the VM's own clock.
    pub at_ms: u64,
    /// When a row of it was last stored, by the clock of metrics-svc; of rows that were never reported but loaded,
    /// the newest one's own moment. Whether a VM is silent goes by this: it is right whatever the VM's clock says.
    pub last_report_ms: u64,
    /// The values of the newest row.
    #[serde(flatten)]
    pub values: VmValues,
    /// The highest CPU share in each three minutes of the last hour, the oldest first, [`SPARKLINE_POINTS`] of them;
    /// null where there was no row.
    pub cpu_sparkline: Vec<Option<f64>>,
}

/// A page of VMs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VmPage {
    /// In the order of their ids.
    pub vms: Vec<VmSummary>,
    /// Whether there are more behind the last.
    pub more: bool,
}

/// Lists every VM that has rows and that the principal may see, with the newest; it follows the rows within seconds
/// (`VMWATCH_ROLLUP_INTERVAL`). One query of the database a page, whatever the page's size.
#[derive(Debug)]
pub struct VmList;

impl Method for VmList {
    type Params = Page;
    type Reply = VmPage;
    const INFO: MethodInfo = query("metrics.vm.list");
}

/// Reads the newest row of one VM; a VM that never reported is not found.
#[derive(Debug)]
pub struct VmGet;

impl Method for VmGet {
    type Params = Target;
    type Reply = VmSummary;
    const INFO: MethodInfo = query("metrics.vm.get");

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Asks for a VM's past.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmHistoryQuery {
    /// Which VM.
    pub instance_id: InstanceId,
    /// Which time.
    pub range: TimeRange,
    /// At most how many buckets.
    #[serde(default)]
    pub points: Points,
    /// Only buckets that begin after this moment, at which the last bucket of the page before begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
}

/// The least, the mean and the greatest value of a bucket; on the wire an array of the three. Means are rounded to
/// three decimals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "[f64; 3]", into = "[f64; 3]")]
pub struct Stat {
    /// The least.
    pub min: f64,
    /// The mean of all samples.
    pub avg: f64,
    /// The greatest.
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

/// What a history was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Resolution {
    /// The rows themselves.
    #[serde(rename = "raw")]
    Raw,
    /// Rollups of five minutes.
    #[serde(rename = "5m")]
    FiveMinutes,
    /// Rollups of an hour.
    #[serde(rename = "1h")]
    Hour,
    /// Rollups of a day.
    #[serde(rename = "1d")]
    Day,
}

/// A bucket of a VM's history. A measure is null where no sample of the bucket has it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VmBucket {
    /// Its first millisecond; it ends [`VmSeries::step_ms`] later.
    pub at_ms: u64,
    /// How many samples it is made of.
    pub count: u64,
    /// The statistics of each measure.
    #[serde(flatten)]
    pub stats: VmMeasures<Option<Stat>>,
}

/// A VM's history.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmSeries {
    /// How long each bucket is: a whole multiple of the resolution, the same for the same range and points.
    pub step_ms: u64,
    /// What it was read from. Rollups follow the rows within seconds (`VMWATCH_ROLLUP_INTERVAL`).
    pub resolution: Resolution,
    /// In the order of time, each whole. Buckets without a sample are left out; the first may begin before the range
    /// does and the last end after it, since buckets lie on whole multiples of their length (in local time).
    pub buckets: Vec<VmBucket>,
    /// Whether there are more behind the last.
    #[serde(default)]
    pub more: bool,
}

/// No history: of a VM that does not exist, that has no row in the range, or that the principal may not know of.
impl Default for VmSeries {
    fn default() -> Self {
        Self {
            step_ms: 0,
            resolution: Resolution::Raw,
            buckets: Vec::new(),
            more: false,
        }
    }
}

/// Reads a VM's history, reduced to at most as many buckets as there are points, from the rows or the rollups: as
/// fine as the points can show, so that a year costs what a day does.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_begins_before_it_ends() {
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
    fn points_are_an_integer_from_1_to_2000() {
        for (text, points) in [("1", 1), ("2000", 2000)] {
            assert_eq!(serde_json::from_str::<Points>(text).unwrap().get(), points);
        }
        for bad in ["0", "2001", "-1", "1.5", "\"5\"", "null"] {
            let error = serde_json::from_str::<Points>(bad).unwrap_err().to_string();
            assert!(error.contains(Points::RULE), "{bad}: {error}");
        }
    }

    #[test]
    fn summary_matches_golden_json() {
        let golden = r#"{"instance_id":"vm-1","at_ms":1483277879001,"last_report_ms":1483277880000,"cpu_util":1.5,"mem":8.6,"disk_read":0.0,"disk_write":128.8,"net_incoming":0.6,"net_outgoing":5.7,"proc":95,"cpu_sparkline":[null,1.5]}"#;
        let summary: VmSummary = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&summary).unwrap(), golden);
    }

    #[test]
    fn a_bucket_of_the_wire_is_what_its_golden_text_says() {
        let golden = r#"{"at_ms":1483277880000,"count":2,"cpu_util":[0.0,1.5,3.0],"mem":null,"disk_read":null,"disk_write":null,"net_incoming":null,"net_outgoing":null,"proc":[95.0,95.5,96.0]}"#;
        let bucket: VmBucket = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&bucket).unwrap(), golden);
    }
}
