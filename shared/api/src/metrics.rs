//! Methods of metrics-svc, the rows that they answer, and the samples that agents publish.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, de::Error};
use serde_json::value::RawValue;

use super::{Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service, bounded_text};
use crate::{
    time::CreateDate,
    wire::{Fault, FaultKind},
};

/// The stream of samples that wait to be stored; each instance has its own subject below [`SAMPLE_SUBJECT_PREFIX`].
pub const SAMPLE_STREAM: &str = "VMWATCH_SAMPLES";
/// `vmwatch.v1.samples.<instance_id>` is what the agent of that instance publishes, and all that it may.
pub const SAMPLE_SUBJECT_PREFIX: &str = "vmwatch.v1.samples.";
/// The stream of samples that were refused, with the reason.
pub const DEAD_LETTER_STREAM: &str = "VMWATCH_DEAD_LETTERS";
/// `vmwatch.v1.dead_letters.<instance_id>`.
pub const DEAD_LETTER_SUBJECT_PREFIX: &str = "vmwatch.v1.dead_letters.";
/// The most bytes of one part of a sample. A VM may have so many parts waiting in the stream that larger ones would let a
/// few guests fill it (`VMWATCH_STREAM_MESSAGES_PER_VM`).
pub const SAMPLE_PART_BYTES: usize = 32 * 1024;
/// The most process rows of one part of a sample: more than an agent's rows, of 110 bytes and more, fit the bytes.
pub const SAMPLE_PART_ROWS: usize = 300;
/// The most bytes of a message with one part: the part, and room for headers. The bus closes the connection of an agent
/// that sends more (deploy/nats/accounts.conf).
pub const SAMPLE_MESSAGE_BYTES: usize = SAMPLE_PART_BYTES + 4096;

/// The order of a VM row's keys, as the document's sample has it.
pub const VM_ROW_KEYS: [&str; 10] = [
    "net_incoming",
    "disk_write",
    "mem",
    "net_outgoing",
    "instance_id",
    "cpu_util",
    "disk_read",
    "create_date",
    "_id",
    "proc",
];

/// The order of a process row's keys, as the document's samples have it.
pub const PROCESS_ROW_KEYS: [&str; 13] = [
    "net_incoming",
    "shutdown_time",
    "mem",
    "net_outgoing",
    "cmd",
    "pid",
    "instance_id",
    "disk_write",
    "disk_read",
    "create_date",
    "_id",
    "cpu_util",
    "running_time",
];

/// How many rows a query may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Limit(u16);

impl Limit {
    /// The rule, for a caller who broke it.
    pub const RULE: &str = "must be an integer from 1 to 1000";

    /// The limit, if it is within 1 to 1000.
    pub fn new(limit: u64) -> Option<Self> {
        u16::try_from(limit)
            .ok()
            .filter(|limit| (1..=1000).contains(limit))
            .map(Self)
    }

    /// The number of rows.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl Default for Limit {
    fn default() -> Self {
        Self(10)
    }
}

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        serde_json::Value::deserialize(deserializer)?
            .as_u64()
            .and_then(Self::new)
            .ok_or_else(|| D::Error::custom(Self::RULE))
    }
}

/// The rows of an answer: a JSON array of objects in the documented key order, as the store encoded it. Who only
/// forwards it never decodes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rows(Arc<RawValue>);

impl Rows {
    /// Rows from the text of a JSON array.
    pub fn from_json(array: String) -> Result<Self, serde_json::Error> {
        RawValue::from_string(array).map(|rows| Self(rows.into()))
    }

    /// The text of the JSON array.
    pub fn as_json(&self) -> &str {
        self.0.get()
    }

    /// No rows.
    pub fn none() -> Result<Self, Fault> {
        Self::from_json("[]".to_owned())
            .map_err(|error| Fault::new(FaultKind::Internal, "no rows could not be encoded").caused_by(error))
    }
}

/// A page of newest rows, newest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RowPage {
    /// The rows.
    pub rows: Rows,
    /// The parameters of the next page that differ from those of this one; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<NextRows>,
}

/// What changes in the parameters of a query for the next page of its rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextRows {
    /// How many rows are still missing.
    pub limit: Limit,
    /// Where the page ended.
    pub before: RowPlace,
}

/// A row's place in the order of the newest: by its date, and among rows of one date by its id.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RowPlace {
    /// The row's date.
    pub create_date: CreateDate,
    /// The row's `_id`.
    pub id: RowId,
}

/// The `_id` of a row: an `ObjectId` as 24 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct RowId(String);

impl RowId {
    const RULE: &str = "must be 24 lower-case hex digits";

    /// The id, if the text is one.
    pub fn new(text: &str) -> Option<Self> {
        Self::allows(text).then(|| Self(text.to_owned()))
    }

    /// The 24 digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        text.len() == 24 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }
}

impl<'de> Deserialize<'de> for RowId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl RowPage {
    /// The only page of these rows.
    pub const fn whole(rows: Rows) -> Self {
        Self { rows, next: None }
    }

    /// No rows.
    pub fn none() -> Result<Self, Fault> {
        Rows::none().map(Self::whole)
    }
}

/// Asks for an instance's newest rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latest {
    /// Which VM.
    pub instance_id: InstanceId,
    /// At most how many rows.
    #[serde(default)]
    pub limit: Limit,
    /// Only rows behind this place, where the page before ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<RowPlace>,
}

/// Asks for the newest rows of an instance's processes of one name, or of all where no name is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatestByName {
    /// Which VM.
    pub instance_id: InstanceId,
    /// At most how many rows.
    #[serde(default)]
    pub limit: Limit,
    /// The name, matched exactly against `cmd`.
    #[serde(
        default,
        deserialize_with = "process_name",
        skip_serializing_if = "Option::is_none"
    )]
    pub proc_name: Option<String>,
    /// Only rows behind this place, where the page before ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<RowPlace>,
}

fn process_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    // The kernel's own bound is 15 bytes; rows of other reporters may carry longer names.
    bounded_text(deserializer, "must be a text of at most 256 bytes", |text| {
        text.len() <= 256
    })
    .map(Some)
}

const fn query(subject: &'static str) -> MethodInfo {
    MethodInfo {
        service: Service::Metrics,
        subject,
        access: Access::Role(Role::Viewer),
        kind: Kind::Query,
        class: Class::CheapRead,
    }
}

/// The newest rows of a VM's processes.
#[derive(Debug)]
pub struct ProcessLatest;

impl Method for ProcessLatest {
    type Params = Latest;
    type Reply = RowPage;
    const INFO: MethodInfo = query("metrics.process.latest");

    fn instance(params: &Latest) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<RowPage, Fault> {
        RowPage::none()
    }
}

/// The newest rows of a VM.
#[derive(Debug)]
pub struct VmLatest;

impl Method for VmLatest {
    type Params = Latest;
    type Reply = RowPage;
    const INFO: MethodInfo = query("metrics.vm.latest");

    fn instance(params: &Latest) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<RowPage, Fault> {
        RowPage::none()
    }
}

/// The newest rows of a VM's processes of one name.
#[derive(Debug)]
pub struct ProcessByName;

impl Method for ProcessByName {
    type Params = LatestByName;
    type Reply = RowPage;
    const INFO: MethodInfo = query("metrics.process.by_name");

    fn instance(params: &LatestByName) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<RowPage, Fault> {
        RowPage::none()
    }
}

/// What an agent saw at one moment, or one part of it. Rates in KiB/s and shares in percent, as the wire contract's
/// table of units says, rounded to one decimal by the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The VM; must equal the subject's last token.
    pub instance_id: InstanceId,
    /// The moment, one for all rows and all parts.
    pub create_date: CreateDate,
    /// Which part of the sample this is, from 0.
    #[serde(default)]
    pub part: u32,
    /// The VM's receive rate, KiB/s.
    pub net_incoming: f64,
    /// The VM's transmit rate, KiB/s.
    pub net_outgoing: f64,
    /// The VM's own row; only the first part carries it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmSample>,
    /// Rows of its processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<ProcessSample>,
}

/// The VM's own row of a sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmSample {
    /// Busy share of all cores, 0 to 100.
    pub cpu_util: f64,
    /// Share of memory in use, percent.
    pub mem: f64,
    /// Read rate of all whole disks, KiB/s.
    pub disk_read: f64,
    /// Write rate of all whole disks, KiB/s.
    pub disk_write: f64,
    /// Number of processes.
    pub proc: u32,
    /// Parts of samples that the agent dropped since the sample before; no part of the row.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropped_parts: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// One process of a sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessSample {
    /// The kernel's short name.
    pub cmd: String,
    /// The process id.
    pub pid: u32,
    /// Share of one core, percent; may pass 100.
    pub cpu_util: f64,
    /// Share of the VM's memory, percent.
    pub mem: f64,
    /// Read rate, KiB/s; 0 where the agent may not read it.
    pub disk_read: f64,
    /// Write rate, KiB/s; 0 where the agent may not read it.
    pub disk_write: f64,
    /// When it started, Unix seconds.
    pub running_time: f64,
    /// When it was seen to have ended, Unix seconds; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shutdown_time: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_an_integer_from_1_to_1000() {
        for (text, limit) in [("1", 1), ("10", 10), ("1000", 1000)] {
            assert_eq!(serde_json::from_str::<Limit>(text).unwrap().get(), limit);
        }
        for bad in [
            "0",
            "1001",
            "-1",
            "1.5",
            "\"5\"",
            "null",
            "1e3",
            "99999999999999999999",
            "[1]",
        ] {
            let error = serde_json::from_str::<Limit>(bad).unwrap_err().to_string();
            assert!(error.contains(Limit::RULE), "{bad}: {error}");
        }
    }

    #[test]
    fn a_sample_of_the_wire_is_what_its_golden_text_says() {
        let golden = r#"{"instance_id":"vm-1","create_date":"2017-01-01T21:37:59.001065","part":1,"net_incoming":0.6,"net_outgoing":5.7,"vm":{"cpu_util":0.0,"mem":8.6,"disk_read":0.0,"disk_write":128.8,"proc":95},"processes":[{"cmd":"lvmetad","pid":479,"cpu_util":0.0,"mem":0.2,"disk_read":0.0,"disk_write":0.0,"running_time":1482236515.63}]}"#;
        let sample: Sample = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&sample).unwrap(), golden);
    }
}
