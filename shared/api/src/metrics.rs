//! Methods of metrics-svc, the rows that they return, and the samples that agents publish.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, de::Error};
use serde_json::value::RawValue;

use super::{Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service, bounded_text};
use crate::{
    time::CreateDate,
    wire::{Fault, FaultKind},
};

/// The JetStream stream of samples that wait to be stored. Each VM has its own subject below [`SAMPLE_SUBJECT_PREFIX`].
pub const SAMPLE_STREAM: &str = "VMWATCH_SAMPLES";
/// Prefix of sample subjects. The agent of a VM publishes on `vmwatch.v1.samples.<instance_id>` and has no permission
/// for the subjects of other VMs.
pub const SAMPLE_SUBJECT_PREFIX: &str = "vmwatch.v1.samples.";
/// The JetStream stream of rejected samples, each with the reason for its rejection.
pub const DEAD_LETTER_STREAM: &str = "VMWATCH_DEAD_LETTERS";
/// Prefix of dead-letter subjects: `vmwatch.v1.dead_letters.<instance_id>`.
pub const DEAD_LETTER_SUBJECT_PREFIX: &str = "vmwatch.v1.dead_letters.";
/// The NATS header that says how a sample part is encoded. Without it, the part is JSON.
pub const CONTENT_TYPE: &str = "Content-Type";
/// Maximum size of one sample part as it is published. Each VM can have `VMWATCH_STREAM_MESSAGES_PER_VM` sample parts in
/// the sample stream, so with larger parts a few guests could fill the stream.
pub const SAMPLE_PART_BYTES: usize = 512 * 1024;
/// Maximum number of process rows in one sample part. Encoded by an agent, that many rows take some 60 KiB.
pub const SAMPLE_PART_ROWS: usize = 5000;
/// Maximum number of filesystem rows in one sample.
pub const SAMPLE_FILESYSTEMS: usize = 64;
/// Maximum length of a mount point in bytes.
pub const MOUNT_POINT_BYTES: usize = 1024;
/// Maximum number of bytes that an encoded sample part takes in memory when it is decoded.
pub const SAMPLE_PART_DECODED_BYTES: usize = 4 << 20;
/// Maximum size of a NATS message with one part of a sample, including headers. NATS closes the connection of an agent
/// that sends a larger message (deploy/nats/accounts.conf).
pub const SAMPLE_MESSAGE_BYTES: usize = SAMPLE_PART_BYTES + 4096;

/// The JSON keys of a VM row, in the order of the example in the documented API.
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

/// The keys of a VM row in exports of the REST API: those of the documented API, and the measures that only the REST API
/// has.
pub const VM_EXPORT_KEYS: [&str; 17] = [
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
    "cores",
    "steal",
    "load",
    "swap",
    "pressure_cpu",
    "pressure_mem",
    "pressure_io",
];

/// The JSON keys of a process row, in the order of the examples in the documented API.
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

/// The keys of a filesystem row in exports of the REST API.
pub const FILESYSTEM_ROW_KEYS: [&str; 7] = [
    "mount_point",
    "filesystem",
    "used_bytes",
    "total_bytes",
    "instance_id",
    "create_date",
    "_id",
];

/// Maximum number of rows that a query may request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Limit(u16);

impl Limit {
    /// The validation rule for the limit of a query, as quoted in error messages to callers.
    pub const RULE: &str = "must be an integer from 1 to 1000";

    /// One row.
    pub const ONE: Self = Self(1);

    /// Returns `None` unless `limit` is from 1 to 1000.
    pub fn new(limit: u64) -> Option<Self> {
        u16::try_from(limit)
            .ok()
            .filter(|limit| (1..=1000).contains(limit))
            .map(Self)
    }

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

/// The rows of a reply: a JSON array of objects with keys in the documented order, encoded by the service that reads
/// the database. Programs that only forward the rows do not decode them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rows(Arc<RawValue>);

impl Rows {
    /// Creates rows from the text of a JSON array.
    pub fn from_json(array: String) -> Result<Self, serde_json::Error> {
        RawValue::from_string(array).map(|rows| Self(rows.into()))
    }

    pub fn as_json(&self) -> &str {
        self.0.get()
    }

    /// Returns an empty list of rows.
    pub fn none() -> Result<Self, Fault> {
        Self::from_json("[]".to_owned()).map_err(|error| {
            Fault::new(FaultKind::Internal, "an empty list of rows could not be encoded").caused_by(error)
        })
    }
}

/// A page of the newest rows of a VM, newest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RowPage {
    pub rows: Rows,
    /// The parameters to change for the next page; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<NextRows>,
}

/// The query parameters that the client must change to request the next page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextRows {
    /// Number of rows that remain to be returned.
    pub limit: Limit,
    /// Position of the last row of this page.
    pub before: RowPosition,
}

/// The position of a row in a list that is sorted by effective date, newest first, then by `create_date` and id. The
/// effective date is the earlier of `create_date` and the arrival of the row.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RowPosition {
    /// Effective date of the row, Unix microseconds.
    pub effective_us: i64,
    pub create_date: CreateDate,
    pub id: RowId,
}

/// The `_id` of a row: a MongoDB `ObjectId`, written as 24 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct RowId(String);

impl RowId {
    const RULE: &str = "must be 24 lower-case hex digits";

    /// Returns `None` if the text is not a valid row id.
    pub fn new(text: &str) -> Option<Self> {
        Self::allows(text).then(|| Self(text.to_owned()))
    }

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
    /// Creates a page that contains all rows, so no further page exists.
    pub const fn whole(rows: Rows) -> Self {
        Self { rows, next: None }
    }

    /// Creates a page without rows.
    pub fn none() -> Result<Self, Fault> {
        Rows::none().map(Self::whole)
    }
}

/// Selects the newest rows of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latest {
    pub instance_id: InstanceId,
    /// Maximum number of rows to return.
    #[serde(default)]
    pub limit: Limit,
    /// Returns only rows after this position, which is where the previous page ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<RowPosition>,
}

/// Selects the newest process rows of a VM, either of one process name or of all processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatestByName {
    pub instance_id: InstanceId,
    /// Maximum number of process rows to return.
    #[serde(default)]
    pub limit: Limit,
    /// Returns only rows whose `cmd` equals this process name.
    #[serde(
        default,
        deserialize_with = "process_name",
        skip_serializing_if = "Option::is_none"
    )]
    pub proc_name: Option<String>,
    /// Returns only process rows after this position, which is where the previous page ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<RowPosition>,
}

fn process_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
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

/// Reads the newest process rows of a VM.
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

/// Reads the newest rows of a VM.
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

/// Reads the newest process rows of a VM with a given process name.
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

/// A sample that an agent measured, or one part of it if the sample is too large for a single message. Rates
/// are in KiB/s and usage in percent, as the documented API defines them; the agent rounds values to one decimal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Instance id of the VM; it must equal the last token of the NATS subject.
    pub instance_id: InstanceId,
    /// Time of the sample, the same in all its parts and rows.
    pub create_date: CreateDate,
    /// Index of this sample part within the sample, starting at 0.
    #[serde(default)]
    pub part: u32,
    /// Network receive rate of the VM, KiB/s.
    pub net_incoming: f64,
    /// Network transmit rate of the VM, KiB/s.
    pub net_outgoing: f64,
    /// The VM's row; only the first sample part contains it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmSample>,
    /// CPU time of the VM since the previous sample of its processes; absent if there are no process rows or no earlier
    /// sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_cpu: Option<CpuSeconds>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<ProcessSample>,
    /// CPU time of processes without rows of their own, by name and user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sums: Vec<SumSample>,
    /// How the agent measures processes that end between two samples; absent if there are no process rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_lived: Option<ShortLived>,
    /// The filesystems of the VM, at most [`SAMPLE_FILESYSTEMS`]; only the first sample part contains them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filesystems: Vec<FilesystemSample>,
}

/// The values of a filesystem's row, as sent in a sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesystemSample {
    /// Path at which the filesystem is mounted; at most [`MOUNT_POINT_BYTES`].
    pub mount_point: String,
    /// Type of the filesystem, such as `ext4` or `nfs4`.
    pub filesystem: String,
    /// Space in use, bytes.
    pub used_bytes: u64,
    /// Size of the filesystem, bytes.
    pub total_bytes: u64,
}

/// How an agent measures the CPU time of processes that end between two samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ShortLived {
    /// The kernel reports each process that ends.
    Recorded,
    /// The kernel does not report them, or records were lost. The agent estimates the CPU time of the others from what the
    /// kernel adds to the parents of ended processes.
    Estimated,
}

impl ShortLived {
    /// The name of the method in rows and in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Recorded => "recorded",
            Self::Estimated => "estimated",
        }
    }

    /// The method with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Recorded, Self::Estimated]
            .into_iter()
            .find(|method| method.as_str() == name)
    }
}

/// Processes without rows of their own that have the same name and user.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SumSample {
    /// The name of the processes, or [`OTHER_PROCESSES`]; if their CPU time is estimated, the name of their parent.
    pub cmd: String,
    /// Number of processes; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    /// CPU usage of the processes together, percent of one core; can exceed 100.
    pub cpu_util: f64,
    /// Memory usage of those processes that still run, percent of the VM's memory.
    #[serde(default)]
    pub mem: f64,
    /// Read rate of the processes together, KiB/s.
    #[serde(default)]
    pub disk_read: f64,
    /// Write rate of the processes together, KiB/s.
    #[serde(default)]
    pub disk_write: f64,
    /// CPU time of the processes since the previous sample, seconds, not rounded.
    pub cpu_seconds: f64,
    /// User, unit and container, as far as all of the processes have the same.
    #[serde(default, skip_serializing_if = "ProcessOwner::is_unknown")]
    pub owner: ProcessOwner,
}

/// The name of the row with all processes that an agent does not select for reporting.
pub const OTHER_PROCESSES: &str = "other processes";

/// The values of a VM's row, as sent in a sample.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VmSample {
    /// CPU usage of all cores, percent, 0 to 100; absent if the kernel's counters do not allow to compute it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_util: Option<f64>,
    /// Memory usage, percent of the VM's memory; absent if the kernel does not report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem: Option<f64>,
    /// Read rate of all disks, KiB/s; partitions are not counted in addition to their disk.
    pub disk_read: f64,
    /// Write rate of all disks, KiB/s; partitions are not counted in addition to their disk.
    pub disk_write: f64,
    /// Number of processes in the VM; absent if the agent cannot see all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proc: Option<u32>,
    /// Why the agent cannot see all processes; absent if it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restricted: Option<Restriction>,
    #[serde(flatten)]
    pub system: SystemSample,
    /// Number of sample parts that the agent has dropped since the previous sample. This number is not stored in the
    /// row.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropped_parts: u32,
    /// Number of times that the kernel or the agent dropped records of ended processes since the previous sample. The
    /// stored row has it only if it is not 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lost_exit_records: u32,
}

/// Values of a VM's row that only the REST API has. A value is absent if the kernel does not report it, and rates also
/// in the first sample of an agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct SystemSample {
    /// Number of CPU cores that are online.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<u32>,
    /// CPU time that the hypervisor gave to others while the VM had work, percent of all cores, 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steal: Option<f64>,
    /// Load average of one minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<f64>,
    /// Swap space in use, percent, 0 to 100; absent if the VM has no swap space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<f64>,
    /// Share of the time in which some process waited for a core, percent, 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure_cpu: Option<f64>,
    /// Share of the time in which some process waited for memory, percent, 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure_mem: Option<f64>,
    /// Share of the time in which some process waited for a disk, percent, 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure_io: Option<f64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

/// CPU time of a VM in seconds, by the kind of its use. Together these are the CPU time that processes can explain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CpuSeconds {
    /// Time in user mode, without `nice`.
    pub user: f64,
    /// Time in user mode of processes with lowered priority.
    pub nice: f64,
    /// Time in the kernel.
    pub system: f64,
}

impl CpuSeconds {
    pub fn total(&self) -> f64 {
        self.user + self.nice + self.system
    }
}

/// The owner of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessOwner {
    /// Name of the user, or the number if the VM's list of users does not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The pid of the parent process; 0 if it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_pid: Option<u32>,
    /// The systemd unit, such as `nginx.service`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// The name of the container, or the first digits of its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The command line without secrets; only if the agent is configured to report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
    /// Whether unit and container are those of an ancestor, because the process ended before it could be sampled.
    #[serde(default, skip_serializing_if = "is_false")]
    pub inherited: bool,
}

impl ProcessOwner {
    /// Whether nothing is known about the owner.
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

/// Why an agent cannot see all processes of its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Restriction {
    /// `/proc` hides the processes of other users, by its mount option `hidepid` or by a security module.
    Hidepid,
    /// The agent runs in a pid namespace of its own, such as that of a container.
    PidNamespace,
}

impl Restriction {
    /// The name of the restriction in rows and in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hidepid => "hidepid",
            Self::PidNamespace => "pid_namespace",
        }
    }

    /// The restriction with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Hidepid, Self::PidNamespace]
            .into_iter()
            .find(|restriction| restriction.as_str() == name)
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessSample {
    /// The process name: the kernel's name or, if the kernel truncated it to 15 bytes, the base name of the program, at
    /// most 256 bytes.
    pub cmd: String,
    pub pid: u32,
    /// CPU usage of the process, percent of one core; can exceed 100.
    pub cpu_util: f64,
    /// Memory usage of the process, percent of the VM's memory; 0 if the size of the VM's memory is unknown. Memory that
    /// a process has mapped several times counts several times, so the value can exceed 100.
    pub mem: f64,
    /// Read rate of the process, KiB/s; 0 if the agent has no permission to read it.
    pub disk_read: f64,
    /// Write rate of the process, KiB/s; 0 if the agent has no permission to read it.
    pub disk_write: f64,
    /// Start time of the process, Unix seconds.
    pub running_time: f64,
    /// Time at which the agent noticed that the process had ended, in Unix seconds; absent while the process runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shutdown_time: Option<f64>,
    /// CPU time of the process since the previous sample, seconds, not rounded; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_seconds: Option<f64>,
    /// Exit status of an ended process, 128 plus the number of the signal if a signal ended it; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u32>,
    #[serde(default, skip_serializing_if = "ProcessOwner::is_unknown")]
    pub owner: ProcessOwner,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_limit_must_be_from_1_to_1000() {
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
    fn documented_sample_is_valid() {
        let page = include_str!("../../../docs/api/samples.md");
        let example = page.lines().filter_map(|line| line.strip_prefix("    "));
        let sample: Sample = serde_json::from_str(&example.collect::<String>()).unwrap();
        assert_eq!(sample.sums[0].processes, Some(18_211));
        assert_eq!(sample.short_lived, Some(ShortLived::Recorded));
        assert_eq!(sample.processes[0].owner.unit.as_deref(), Some("backup.service"));
        assert_eq!(sample.vm.unwrap().system.cores, Some(2));
        let accounted = sample.processes[0].cpu_seconds.unwrap() + sample.sums[0].cpu_seconds;
        assert!((0.95..=1.0).contains(&(accounted / sample.vm_cpu.unwrap().total())));
    }

    #[test]
    fn sample_matches_golden_json() {
        let golden = r#"{"instance_id":"vm-1","create_date":"2017-01-01T21:37:59.001065","part":1,"net_incoming":0.6,"net_outgoing":5.7,"vm":{"cpu_util":0.0,"mem":8.6,"disk_read":0.0,"disk_write":128.8,"proc":95},"processes":[{"cmd":"lvmetad","pid":479,"cpu_util":0.0,"mem":0.2,"disk_read":0.0,"disk_write":0.0,"running_time":1482236515.63}]}"#;
        let sample: Sample = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&sample).unwrap(), golden);
    }
}
