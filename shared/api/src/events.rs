//! Live events: what just happened, for who is looking now.
//!
//! One stream for all kinds, so that one number, the stream's sequence, says how far a reader has come. Publishing is
//! at most once and holds nobody up: what must not be lost is in the store or the audit. Readers follow from a
//! sequence, or from now, and filter by subject.

use serde::{Deserialize, Serialize};

use super::{
    InstanceId,
    lifecycle::{MachineState, Operation},
    measures::VmValues,
};

/// The stream of live events. metrics-svc makes it; readers have consumers of their own and acknowledge nothing.
pub const EVENT_STREAM: &str = "VMWATCH_EVENTS";
/// `vmwatch.v1.events.<kind>.<instance_id>`, see [`LiveEvent::kind`].
pub const EVENT_SUBJECT_PREFIX: &str = "vmwatch.v1.events.";

/// A live event, as the body of its message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum LiveEvent {
    /// A row of a VM was stored.
    Sample(SampleEvent),
    /// Rows of a VM's processes were stored.
    Processes(ProcessesEvent),
    /// A command on a VM came further: its record as it is now.
    Operation(Box<Operation>),
    /// A hypervisor says that a VM's state is another than it said before.
    Machine(MachineEvent),
}

/// A row of a VM, as in [`super::history::VmSummary`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleEvent {
    /// Which VM.
    pub instance_id: InstanceId,
    /// When it was sampled, Unix milliseconds.
    pub at_ms: u64,
    /// The values of the row.
    #[serde(flatten)]
    pub values: VmValues,
}

/// Tells that the process table of a moment can be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessesEvent {
    /// Which VM.
    pub instance_id: InstanceId,
    /// When they were sampled, Unix milliseconds.
    pub at_ms: u64,
    /// How many rows this part of the sample has.
    pub rows: u64,
}

/// A VM's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineEvent {
    /// Which VM.
    pub instance_id: InstanceId,
    /// When it was seen, Unix milliseconds.
    pub at_ms: u64,
    /// What the hypervisor says; nothing where no hypervisor has the VM any more.
    pub state: Option<MachineState>,
}

/// All kinds that this version knows.
const KINDS: [&str; 4] = ["sample", "processes", "operation", "machine"];

/// What every event has, of whatever version.
#[derive(Deserialize)]
struct AnyEvent {
    kind: String,
}

impl LiveEvent {
    /// Reads the body of a message; `None` of an event of a kind that only a newer version knows.
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

    /// The kind, as in the subject and in the body.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Sample(_) => "sample",
            Self::Processes(_) => "processes",
            Self::Operation(_) => "operation",
            Self::Machine(_) => "machine",
        }
    }

    /// The VM that it is about.
    pub const fn instance(&self) -> &InstanceId {
        match self {
            Self::Sample(event) => &event.instance_id,
            Self::Processes(event) => &event.instance_id,
            Self::Operation(event) => &event.instance_id,
            Self::Machine(event) => &event.instance_id,
        }
    }

    /// The subject that it is published on.
    pub fn subject(&self) -> String {
        format!("{EVENT_SUBJECT_PREFIX}{}.{}", self.kind(), self.instance())
    }
}

/// What a reader filters by: all kinds of events of one VM, or of all where none is given.
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
    fn passes_over_an_event_of_a_newer_kind() {
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
    fn an_event_of_the_wire_is_what_its_golden_text_says() {
        let golden = r#"{"kind":"processes","instance_id":"vm-1","at_ms":1483277879001,"rows":95}"#;
        let event: LiveEvent = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&event).unwrap(), golden);
        assert_eq!(event.subject(), "vmwatch.v1.events.processes.vm-1");
        assert_eq!(event_filter(Some(event.instance())), "vmwatch.v1.events.*.vm-1");
    }
}
