//! The samples of VMs that lifecycle-svc reads from hypervisors, and sends to metrics-svc.
//!
//! The subject is the source: only lifecycle-svc may publish on these subjects, and the agent of a VM only on its own
//! subject.

use serde::{Deserialize, Serialize};

use super::{InstanceId, time::CreateDate};

/// Prefix of the subjects of these samples; the id of the VM follows.
pub const HYPERVISOR_SAMPLE_SUBJECT_PREFIX: &str = "vmwatch.v1.hypervisor_samples.";

/// Maximum size of a message, in bytes.
pub const HYPERVISOR_SAMPLE_BYTES: usize = 4096;

/// The keys of a hypervisor's row in exports of the REST API.
pub const HYPERVISOR_ROW_KEYS: [&str; 12] = [
    "net_incoming",
    "disk_write",
    "mem",
    "net_outgoing",
    "instance_id",
    "cpu_util",
    "disk_read",
    "create_date",
    "_id",
    "cores",
    "steal",
    "hypervisor",
];

/// What a hypervisor measured of one VM at one moment, as JSON. A value is absent if the hypervisor does not know it; a
/// rate is also absent in the first sample after the VM was started or has moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HypervisorSample {
    /// Id of the VM; it must equal the last token of the NATS subject.
    pub instance_id: InstanceId,
    /// Time of the sample, by the clock of lifecycle-svc, at the UTC offset of the deployment.
    pub create_date: CreateDate,
    /// The configured name of the hypervisor.
    pub hypervisor: String,
    /// CPU usage of all virtual CPUs, percent, 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_util: Option<f64>,
    /// Memory in use by the guest, percent of the VM's memory; known only with statistics of the balloon driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem: Option<f64>,
    /// Read rate of all disks, KiB/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_read: Option<f64>,
    /// Write rate of all disks, KiB/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_write: Option<f64>,
    /// Receive rate of all network interfaces, KiB/s, as the guest sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_incoming: Option<f64>,
    /// Transmit rate of all network interfaces, KiB/s, as the guest sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_outgoing: Option<f64>,
    /// Number of virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<u32>,
    /// Time in which a virtual CPU was ready to run and waited for a core of the host, percent of all virtual CPUs, 0 to
    /// 100; absent if the hypervisor does not report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steal: Option<f64>,
}

/// The subject of the hypervisor's samples of a VM.
pub fn hypervisor_sample_subject(instance_id: &InstanceId) -> String {
    format!("{HYPERVISOR_SAMPLE_SUBJECT_PREFIX}{instance_id}")
}
