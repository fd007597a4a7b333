//! Live events: what has just happened, for clients that follow it.
//!
//! All kinds share one stream, so that a single stream sequence marks a reader's position. Publishing is at most once
//! and never blocks: everything that must not be lost is in the store or the audit. Readers start at a sequence or at
//! the present and filter by subject.

use serde::{Deserialize, Serialize};

use super::{
    InstanceId,
    lifecycle::{MachineState, Operation},
    measures::VmValues,
};

/// The stream of live events, created by metrics-svc. Readers use consumers of their own and do not acknowledge.
pub const EVENT_STREAM: &str = "VMWATCH_EVENTS";
/// `vmwatch.v1.events.<kind>.<instance_id>`, see [`LiveEvent::kind`].
pub const EVENT_SUBJECT_PREFIX: &str = "vmwatch.v1.events.";

/// A live event; the body of its message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum LiveEvent {
    /// A row of a VM was stored.
    Sample(SampleEvent),
    /// Rows of a VM's processes were stored.
    Processes(ProcessesEvent),
    /// An operation changed; holds its current record.
    Operation(Box<Operation>),
    /// The hypervisor reported a different state of a VM.
    Machine(MachineEvent),
}

/// A row of a VM, with the values of [`super::history::VmSummary`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleEvent {
    pub instance_id: InstanceId,
    /// Time of the sample, Unix milliseconds.
    pub at_ms: u64,
    #[serde(flatten)]
    pub values: VmValues,
}

/// Announces that the process table of a time can be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessesEvent {
    pub instance_id: InstanceId,
    /// Time of the sample, Unix milliseconds.
    pub at_ms: u64,
    /// Number of rows in this part of the sample.
    pub rows: u64,
}

/// The state of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineEvent {
    pub instance_id: InstanceId,
    /// When the state was observed, Unix milliseconds.
    pub at_ms: u64,
    /// The state reported by the hypervisor; `None` if no hypervisor has the VM any more.
    pub state: Option<MachineState>,
}

/// The kinds known to this version.
const KINDS: [&str; 4] = ["sample", "processes", "operation", "machine"];

/// The fields of every event, of any version.
#[derive(Deserialize)]
struct AnyEvent {
    kind: String,
}

impl LiveEvent {
    /// Decodes the body of a message; `None` for a kind that only a newer version knows.
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

    /// The kind, as in the subject and the body.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Sample(_) => "sample",
            Self::Processes(_) => "processes",
            Self::Operation(_) => "operation",
            Self::Machine(_) => "machine",
        }
    }

    /// The VM that the event is about.
    pub const fn instance(&self) -> &InstanceId {
        match self {
            Self::Sample(event) => &event.instance_id,
            Self::Processes(event) => &event.instance_id,
            Self::Operation(event) => &event.instance_id,
            Self::Machine(event) => &event.instance_id,
        }
    }

    /// The subject to publish the event on.
    pub fn subject(&self) -> String {
        format!("{EVENT_SUBJECT_PREFIX}{}.{}", self.kind(), self.instance())
    }
}

/// The filter subject for all kinds of events of one VM, or of all VMs if none is given.
pub fn event_filter(instance: Option<&InstanceId>) -> String {
    match instance {
        Some(instance) => format!("{EVENT_SUBJECT_PREFIX}*.{instance}"),
        None => format!("{EVENT_SUBJECT_PREFIX}>"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignores_event_of_a_newer_kind() {
        assert_eq!(
            LiveEvent::read(br#"{"kind":"alert","severity":3}"#).unwrap(),
            None
        );
        let more = br#"{"kind":"processes","instance_id":"vm-1","at_ms":1,"rows":2,"users":[1]}"#;
        assert!(LiveEvent::read(more).unwrap().is_some());
        for broken in [&b"{}"[..], b"x", br#"{"kind":"processes"}"#] {
            assert!(LiveEvent::read(broken).is_err());
        }
    }

    #[test]
    fn event_matches_golden_json() {
        let golden = r#"{"kind":"processes","instance_id":"vm-1","at_ms":1483277879001,"rows":95}"#;
        let event: LiveEvent = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&event).unwrap(), golden);
        assert_eq!(event.subject(), "vmwatch.v1.events.processes.vm-1");
        assert_eq!(event_filter(Some(event.instance())), "vmwatch.v1.events.*.vm-1");
    }
}
