//! Live events: notifications of changes that clients receive while they happen.
//!
//! All kinds of events share one JetStream stream, so a single sequence number marks a reader's position. Events
//! are published at most once, and publishing never blocks: data that must not be lost is in the database or in the
//! audit. A reader starts at a sequence number or at the newest event, and filters by subject.

use serde::{Deserialize, Serialize};

use super::{
    InstanceId,
    agents::{Sender, VmLimit},
    alerts::Alert,
    current::ProcessUse,
    lifecycle::{MachineState, Operation},
    measures::VmValues,
    metrics::Restriction,
};

/// The JetStream stream of live events, created by metrics-svc. Each reader creates its own consumer and does not
/// acknowledge events.
pub const EVENT_STREAM: &str = "VMWATCH_EVENTS";
/// Prefix of event subjects: an event is published on `vmwatch.v1.events.<kind>.<instance_id>`; [`LiveEvent::kind`]
/// lists the kinds. An event about vmwatch itself has [`OWN_TOKEN`] instead of the id.
pub const EVENT_SUBJECT_PREFIX: &str = "vmwatch.v1.events.";
/// Last token of the subject of an event about vmwatch itself. No VM can have it as its id.
const OWN_TOKEN: &str = "~";

/// A live event, as encoded in the body of a NATS message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum LiveEvent {
    /// A row of a VM was stored.
    Sample(SampleEvent),
    /// A row that the hypervisor measured of a VM was stored.
    HypervisorSample(HypervisorSampleEvent),
    /// Rows of a VM's processes were stored.
    Processes(ProcessesEvent),
    /// An operation changed; the event holds its current record.
    Operation(Box<Operation>),
    /// The hypervisor reported a different state of a VM.
    Machine(MachineEvent),
    /// An administrator removed a VM, and its history was deleted.
    Removed(RemovedEvent),
    /// Rows of a VM's sample were not stored because of the time of the sample. Only for other replicas of metrics-svc;
    /// clients do not receive it.
    Unstored(UnstoredEvent),
    /// A VM sends more than a limit allows. Only for other replicas of metrics-svc; clients do not receive it.
    OverLimit(OverLimitEvent),
    /// An alert of a VM, or one about vmwatch itself, changed; the event holds its current record.
    Alert(Box<AlertEvent>),
}

/// An alert as it is after a change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlertEvent {
    /// `None` if the alert is about vmwatch itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    pub alert: Alert,
}

/// The values of a VM's row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleEvent {
    pub instance_id: InstanceId,
    /// Time of the sample, Unix milliseconds.
    pub at_ms: u64,
    #[serde(flatten)]
    pub values: VmValues,
    /// Why the agent cannot see all processes of the VM; `None` if it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restricted: Option<Restriction>,
    /// The sender of the sample; `None` if it did not come in a message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sender: Option<Sender>,
}

/// The values of a row that the hypervisor measured of a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HypervisorSampleEvent {
    pub instance_id: InstanceId,
    /// Time of the sample, Unix milliseconds.
    pub at_ms: u64,
    #[serde(flatten)]
    pub values: VmValues,
}

/// Live event: the process table of a sample has been stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessesEvent {
    pub instance_id: InstanceId,
    /// Time of the sample, Unix milliseconds.
    pub at_ms: u64,
    /// Number of process rows in this sample part.
    pub rows: u64,
    /// What the greatest processes of this sample part use, by name. Only for replicas of metrics-svc, and only if they
    /// are configured to list processes; clients do not receive it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub greatest: Vec<ProcessUse>,
    /// Number of names of this sample part that are not in `greatest`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub names_left_out: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A live event with the state of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineEvent {
    pub instance_id: InstanceId,
    /// Time at which the state was observed, in Unix milliseconds.
    pub at_ms: u64,
    /// The state reported by the hypervisor; `None` if no hypervisor has the VM any more.
    pub state: Option<MachineState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedEvent {
    pub instance_id: InstanceId,
    /// When the history had been deleted, Unix milliseconds.
    pub at_ms: u64,
}

/// A sample of a VM whose rows were not stored because of its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnstoredEvent {
    pub instance_id: InstanceId,
    /// Time of the sample, Unix milliseconds.
    pub at_ms: u64,
    /// When the sample arrived at the NATS server, Unix milliseconds.
    pub arrived_ms: u64,
    pub reason: UnstoredReason,
}

/// Why rows of a sample were not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnstoredReason {
    /// The rows are older than the retention.
    Expired,
    /// The time of the sample is more than a day ahead of its arrival.
    Ahead,
    /// A reason that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

/// A VM that sends more than a limit allows. The event is repeated while this lasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverLimitEvent {
    pub instance_id: InstanceId,
    pub limit: VmLimit,
    /// Since when the VM has been above the limit, Unix milliseconds.
    pub since_ms: u64,
    /// When this was last noticed, Unix milliseconds.
    pub at_ms: u64,
}

/// The event kinds known to this version of vmwatch.
const KINDS: [&str; 9] = [
    "sample",
    "hypervisor_sample",
    "processes",
    "operation",
    "machine",
    "removed",
    "unstored",
    "over_limit",
    "alert",
];

/// The fields that every event has, including events of kinds that a newer version of vmwatch added.
#[derive(Deserialize)]
struct AnyEvent {
    kind: String,
}

impl LiveEvent {
    /// Decodes the body of a live event; `None` if only a newer version of vmwatch knows the kind.
    pub fn read(body: &[u8]) -> Result<Option<Self>, serde_json::Error> {
        let error = match serde_json::from_slice(body) {
            Ok(event) => return Ok(Some(event)),
            Err(error) => error,
        };
        match serde_json::from_slice::<AnyEvent>(body) {
            Ok(any) if !KINDS.contains(&any.kind.as_str()) => Ok(None),
            _ => Err(error),
        }
    }

    /// The kind of the event, as in its subject and its body.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Sample(_) => "sample",
            Self::HypervisorSample(_) => "hypervisor_sample",
            Self::Processes(_) => "processes",
            Self::Operation(_) => "operation",
            Self::Machine(_) => "machine",
            Self::Removed(_) => "removed",
            Self::Unstored(_) => "unstored",
            Self::OverLimit(_) => "over_limit",
            Self::Alert(_) => "alert",
        }
    }

    /// The VM that the event is about; `None` if it is about vmwatch itself.
    pub const fn instance(&self) -> Option<&InstanceId> {
        Some(match self {
            Self::Sample(event) => &event.instance_id,
            Self::HypervisorSample(event) => &event.instance_id,
            Self::Processes(event) => &event.instance_id,
            Self::Operation(event) => &event.instance_id,
            Self::Machine(event) => &event.instance_id,
            Self::Removed(event) => &event.instance_id,
            Self::Unstored(event) => &event.instance_id,
            Self::OverLimit(event) => &event.instance_id,
            Self::Alert(event) => return event.instance_id.as_ref(),
        })
    }

    /// The NATS subject that the event is published on.
    pub fn subject(&self) -> String {
        let last = self.instance().map_or(OWN_TOKEN, InstanceId::as_str);
        format!("{EVENT_SUBJECT_PREFIX}{}.{last}", self.kind())
    }
}

/// The NATS subject filter for all kinds of events of one VM, or of all VMs if `instance` is `None`.
pub fn event_filter(instance: Option<&InstanceId>) -> String {
    match instance {
        Some(instance) => format!("{EVENT_SUBJECT_PREFIX}*.{instance}"),
        None => format!("{EVENT_SUBJECT_PREFIX}>"),
    }
}

/// The NATS subject filter for the events of one kind, of all VMs.
pub fn kind_filter(kind: &str) -> String {
    format!("{EVENT_SUBJECT_PREFIX}{kind}.*")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_kind_of_newer_version_is_ignored() {
        assert_eq!(
            LiveEvent::read(br#"{"kind":"of_a_newer_version","severity":3}"#).unwrap(),
            None
        );
        let more = br#"{"kind":"processes","instance_id":"vm-1","at_ms":1,"rows":2,"users":[1]}"#;
        assert!(LiveEvent::read(more).unwrap().is_some());
        for broken in [&b"{}"[..], b"x", br#"{"kind":"processes"}"#] {
            assert!(LiveEvent::read(broken).is_err());
        }
    }

    #[test]
    fn live_event_matches_golden_json() {
        let golden = r#"{"kind":"processes","instance_id":"vm-1","at_ms":1483277879001,"rows":95}"#;
        let event: LiveEvent = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&event).unwrap(), golden);
        assert_eq!(event.subject(), "vmwatch.v1.events.processes.vm-1");
        assert_eq!(event_filter(event.instance()), "vmwatch.v1.events.*.vm-1");
        let golden = r#"{"kind":"unstored","instance_id":"vm-1","at_ms":1483277879001,"arrived_ms":1483277879002,"reason":"expired"}"#;
        let event: LiveEvent = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&event).unwrap(), golden);
        assert_eq!(event.subject(), "vmwatch.v1.events.unstored.vm-1");
        let golden = r#"{"kind":"over_limit","instance_id":"vm-1","limit":"waiting","since_ms":1483277879001,"at_ms":1483277889001}"#;
        let event: LiveEvent = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&event).unwrap(), golden);
        assert_eq!(event.subject(), "vmwatch.v1.events.over_limit.vm-1");
    }
    #[test]
    fn subject_of_an_alert_about_vmwatch_itself_has_no_id_of_a_vm() {
        let golden = include_str!("../../../tests/golden/forms/event-alert-vmwatch.json");
        let event: LiveEvent = serde_json::from_str(golden).unwrap();
        assert_eq!(event.instance(), None);
        assert_eq!(event.subject(), "vmwatch.v1.events.alert.~");
        assert!(OWN_TOKEN.parse::<InstanceId>().is_err());
    }
}
