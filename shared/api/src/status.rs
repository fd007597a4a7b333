//! The state of vmwatch itself, for administrators: the programs that run, waiting samples, compaction, the disk of the
//! database, agents and hypervisors.
//!
//! metrics-svc answers its part over the bus ([`MetricsStatus`]). The gateway adds the rest, and answers with [`Status`] in
//! the REST API. Durations are in milliseconds.

use serde::{Deserialize, Serialize};

use super::{Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service};

/// Maximum number of VMs that a [`VmGroup`] names.
pub const MAX_NAMED: usize = 20;

/// A running replica of a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReplicaStatus {
    /// Random id of the process.
    pub id: String,
    /// Version of the program.
    pub version: String,
}

/// The replicas of a program that answered within half a second.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ProgramStatus {
    /// Name of the program, such as `vmwatch-metrics`.
    pub name: String,
    /// Sorted by version.
    pub replicas: Vec<ReplicaStatus>,
}

/// Messages with samples that wait until metrics-svc has stored them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SampleBacklog {
    /// Number of waiting messages.
    pub messages: u64,
    /// Size of the waiting messages in bytes.
    pub bytes: u64,
    /// Size at which NATS refuses further samples, in bytes.
    pub max_bytes: u64,
    /// Age of the oldest waiting message; null if none waits.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub oldest_ms: Option<u64>,
    /// Number of dead letters: messages that were refused because of their content. Null if unknown.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub dead_letters: Option<u64>,
}

/// The progress of compaction, which merges the blocks of closed hours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CompactionStatus {
    /// Age of the oldest closed hour whose blocks are not all merged; 0 if there is none.
    pub lag_ms: u64,
    /// Time since compaction last looked at all recent hours.
    pub passed_ago_ms: u64,
}

/// The file system of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DatabaseDisk {
    pub used_bytes: u64,
    pub size_bytes: u64,
    /// Growth per day over at most the last week, negative if the usage has shrunk; null until it was measured for six hours.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub bytes_per_day: Option<i64>,
    /// Days until the file system is full at this growth; null if it does not grow or the growth is unknown.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub days_left: Option<u64>,
}

/// VMs with a common property.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VmGroup {
    /// Number of these VMs.
    pub count: u64,
    /// Ids of the first of them, at most 20.
    pub vms: Vec<InstanceId>,
}

impl VmGroup {
    /// Adds a VM.
    pub fn add(&mut self, id: &InstanceId) {
        self.count += 1;
        if self.vms.len() < MAX_NAMED {
            self.vms.push(id.clone());
        }
    }
}

/// The agents of the VMs in the scope of the user.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentsStatus {
    /// Number of VMs whose agent reports.
    pub reporting: u64,
    /// Number of VMs whose agent has not reported for longer than `VMWATCH_SILENT_AFTER`.
    pub silent: u64,
    /// Number of VMs without an agent.
    pub never: u64,
    /// VMs whose agent is older than metrics-svc.
    pub outdated: VmGroup,
    /// VMs that send more than a limit of one VM allows, so that their samples are stored late.
    pub over_limit: VmGroup,
    /// VMs with a wrong clock or UTC offset.
    pub wrong_clock: VmGroup,
    /// VMs with another fault: two agents, or samples that are not stored because of their time.
    pub other_faults: VmGroup,
}

/// A hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HypervisorStatus {
    /// Configured name of the hypervisor.
    pub name: String,
    /// Whether the last attempt to list its VMs succeeded.
    pub reachable: bool,
    /// Whether it is reachable but a new list of its VMs is overdue.
    pub late: bool,
    /// Time since its VMs were last listed, accurate to about a minute; null if never.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub listed_ago_ms: Option<u64>,
}

/// A part of the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum StatusPart {
    Programs,
    Samples,
    Compaction,
    Disk,
    Agents,
    Hypervisors,
    /// A part that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

/// What a notice means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum NoticeKind {
    /// The part needs attention.
    Attention,
    /// The part is missing from the answer or out of date.
    Unavailable,
    /// A kind that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

/// Something that an administrator should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Notice {
    /// The part of the status that the notice is about.
    pub part: StatusPart,
    /// Whether the part needs attention or is unavailable.
    pub kind: NoticeKind,
    /// Description for administrators.
    pub detail: String,
}

/// The state of vmwatch itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Status {
    /// What needs attention, and which parts are unavailable; empty if all is well.
    pub notices: Vec<Notice>,
    /// The programs of a deployment, except agents; null if NATS is unreachable.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub programs: Option<Vec<ProgramStatus>>,
    /// Samples that wait to be stored; null if unknown.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub samples: Option<SampleBacklog>,
    /// Progress of compaction; null if unknown.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub compaction: Option<CompactionStatus>,
    /// File system of the database; null if the database does not report it.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub disk: Option<DatabaseDisk>,
    /// Agents; null if unknown.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub agents: Option<AgentsStatus>,
    /// The hypervisors, at most 500, those that are unreachable or late first; null if unknown.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub hypervisors: Option<Vec<HypervisorStatus>>,
}

/// The parameters of [`MetricsStatus`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusQuery {}

/// What metrics-svc knows about the state of vmwatch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricsState {
    /// `None` if JetStream did not answer.
    #[serde(default)]
    pub samples: Option<SampleBacklog>,
    /// `None` if the database did not answer, or if compaction has never run.
    #[serde(default)]
    pub compaction: Option<CompactionStatus>,
    /// `None` if the database does not report the size of its file system.
    #[serde(default)]
    pub disk: Option<DatabaseDisk>,
    pub agents: AgentsStatus,
}

/// Reads the state of ingestion, storage and agents.
#[derive(Debug)]
pub struct MetricsStatus;

impl Method for MetricsStatus {
    type Params = StatusQuery;
    type Reply = MetricsState;
    const INFO: MethodInfo = MethodInfo {
        service: Service::Metrics,
        subject: "metrics.status",
        access: Access::Role(Role::Admin),
        kind: Kind::Query,
        class: Class::CheapRead,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_of_a_newer_version_is_readable() {
        let notice = r#"{"part":"of_a_newer_version","kind":"of_a_newer_version","detail":"x","more":1}"#;
        let notice: Notice = serde_json::from_str(notice).unwrap();
        assert_eq!(
            (notice.part, notice.kind),
            (StatusPart::Unknown, NoticeKind::Unknown)
        );
        let least = r#"{"agents":{"reporting":1,"silent":0,"never":0,"outdated":{"count":0,"vms":[]},
            "over_limit":{"count":0,"vms":[]},"wrong_clock":{"count":0,"vms":[]},"other_faults":{"count":0,"vms":[]}}}"#;
        let state: MetricsState = serde_json::from_str(least).unwrap();
        assert_eq!((state.samples, state.agents.reporting), (None, 1));
    }

    #[test]
    fn group_names_a_limited_number_of_vms() {
        let mut group = VmGroup::default();
        for number in 0..=MAX_NAMED {
            group.add(&format!("vm-{number}").parse().unwrap());
        }
        assert_eq!((group.count, group.vms.len()), (21, 20));
    }
}
