//! Evaluation records: what alert-svc needs of each stored sample part. metrics-svc publishes one to a stream before it
//! acknowledges the part.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{InstanceId, measures::VmValues, processes::ProcessName};

/// The JetStream stream of evaluation records, which metrics-svc owns. Its oldest records are discarded when it is full, so
/// it never delays the storing of samples.
pub const EVALUATION_STREAM: &str = "VMWATCH_EVALUATION";
/// Prefix of the subjects of evaluation records, followed by the id of the VM.
pub const EVALUATION_SUBJECT_PREFIX: &str = "vmwatch.v1.evaluation.";
/// Time for which evaluation records are kept, in seconds.
pub const EVALUATION_KEEP_SECONDS: u64 = 3600;
/// Maximum size of all evaluation records.
pub const EVALUATION_BYTES: i64 = 256 << 20;
/// The KV bucket with the process names that rules are about. alert-svc owns it; metrics-svc follows it.
pub const WATCHED_BUCKET: &str = "vmwatch_watched_names";
/// The only key of that bucket; its value is [`WatchedNames`].
pub const WATCHED_KEY: &str = "names";
/// Maximum number of names that are watched.
pub const MAX_WATCHED_NAMES: usize = 1000;

/// The process names that rules are about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchedNames {
    /// At most [`MAX_WATCHED_NAMES`] names; metrics-svc ignores those beyond.
    pub names: BTreeSet<ProcessName>,
}

/// The source of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The agent in the VM.
    Agent,
    /// The hypervisor of the VM.
    Hypervisor,
}

/// What alert-svc needs of one sample part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    pub instance_id: InstanceId,
    pub source: Source,
    /// Effective date of the sample, Unix milliseconds.
    pub at_ms: u64,
    /// When the sample part arrived at the NATS server, Unix milliseconds. The difference to `at_ms` is large for samples
    /// from a spool.
    pub arrived_ms: u64,
    /// Number of the part within its sample. The parts of one sample have the same `at_ms`.
    #[serde(default)]
    pub part: u32,
    /// The VM's row, which only the first part has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmValues>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filesystems: Vec<FilesystemUse>,
    /// Whether the part has rows of processes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_processes: bool,
    /// The watched names of which the part has processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<WatchedProcesses>,
    /// Revision of the list of watched names that was used; 0 if it was not known. A name that this revision contains and
    /// that no part of the sample has is missing in the VM.
    #[serde(default)]
    pub watched_revision: u64,
}

/// How full a filesystem is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FilesystemUse {
    pub mount_point: String,
    /// Percent, 0 to 100.
    pub used: f64,
}

/// The processes with a watched name, of one sample part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WatchedProcesses {
    pub name: ProcessName,
    /// Number of processes.
    pub processes: u32,
    /// CPU usage of these processes, percent of one core.
    pub cpu_util: f64,
    /// Memory usage of these processes, percent of the VM's memory.
    pub mem: f64,
}

/// The subject of the evaluation records of a VM.
pub fn evaluation_subject(instance_id: &InstanceId) -> String {
    format!("{EVALUATION_SUBJECT_PREFIX}{instance_id}")
}
