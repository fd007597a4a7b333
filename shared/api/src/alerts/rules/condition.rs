//! The condition of a rule.

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::{
    agents::AgentFault,
    bounded_text,
    lifecycle::MachineState,
    measures::{VM_MEASURES, VmValues},
    processes::ProcessName,
};

/// Maximum number of states that a condition names.
const MAX_STATES: usize = 7;

/// The condition of a rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Condition {
    /// A measure of the VM is beyond a threshold.
    Measure {
        measure: MeasureName,
        threshold: Threshold,
    },
    /// The used part of a filesystem, in percent, is beyond a threshold. The subject is the mount point.
    Filesystem {
        /// Only these mount points; all if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mount_point: Option<MountPattern>,
        threshold: Threshold,
    },
    /// The number of processes with a name is beyond a threshold; below 1 means that there is none. The subject is the name.
    ProcessCount { name: ProcessName, threshold: Threshold },
    /// The CPU usage of all processes with a name, in percent of one core, is beyond a threshold. The subject is the name.
    ProcessCpu { name: ProcessName, threshold: Threshold },
    /// The memory usage of all processes with a name, in percent of the VM's memory, is beyond a threshold. The subject is
    /// the name.
    ProcessMem { name: ProcessName, threshold: Threshold },
    /// The hypervisor reports the VM in one of these states. The subject is the hypervisor.
    VmState {
        #[serde(deserialize_with = "states")]
        states: Vec<MachineState>,
    },
    /// The agent has sent no sample for the duration of the rule. The time stands still while vmwatch itself receives no
    /// samples. A VM that an operation has stopped is not silent.
    AgentSilent {},
    /// The samples of the agent may be wrong, or are stored late or not at all.
    AgentFault { fault: FaultKind },
    /// An operation on the VM failed, timed out or has an unknown outcome, and none has succeeded since.
    OperationFailed {},
    /// vmwatch receives no samples: the stream is unreachable, samples wait for more than a minute, or most agents fell silent
    /// within one minute. The alert has no VM.
    NotReceiving {},
}

impl Condition {
    /// The name of the kind on the wire.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Measure { .. } => "measure",
            Self::Filesystem { .. } => "filesystem",
            Self::ProcessCount { .. } => "process_count",
            Self::ProcessCpu { .. } => "process_cpu",
            Self::ProcessMem { .. } => "process_mem",
            Self::VmState { .. } => "vm_state",
            Self::AgentSilent {} => "agent_silent",
            Self::AgentFault { .. } => "agent_fault",
            Self::OperationFailed {} => "operation_failed",
            Self::NotReceiving {} => "not_receiving",
        }
    }

    /// The threshold, if the condition compares a value with one.
    pub const fn threshold(&self) -> Option<Threshold> {
        match self {
            Self::Measure { threshold, .. }
            | Self::Filesystem { threshold, .. }
            | Self::ProcessCount { threshold, .. }
            | Self::ProcessCpu { threshold, .. }
            | Self::ProcessMem { threshold, .. } => Some(*threshold),
            _ => None,
        }
    }

    /// The process name that the condition is about.
    pub const fn process(&self) -> Option<&ProcessName> {
        match self {
            Self::ProcessCount { name, .. }
            | Self::ProcessCpu { name, .. }
            | Self::ProcessMem { name, .. } => Some(name),
            _ => None,
        }
    }
}

fn states<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<MachineState>, D::Error> {
    let states = Vec::<MachineState>::deserialize(deserializer)?;
    let are_known = !states.contains(&MachineState::Unknown);
    if (1..=MAX_STATES).contains(&states.len()) && are_known {
        Ok(states)
    } else {
        Err(D::Error::custom("must list 1 to 7 states of VMs"))
    }
}

/// The side of a limit on which a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Direction {
    /// The value is greater than the limit.
    Above,
    /// The value is less than the limit.
    Below,
}

/// A limit, and the value at which an alert ends again.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawThreshold")]
pub struct Threshold {
    direction: Direction,
    limit: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    clear: Option<f64>,
}

#[derive(Deserialize)]
struct RawThreshold {
    direction: Direction,
    limit: f64,
    #[serde(default)]
    clear: Option<f64>,
}

impl TryFrom<RawThreshold> for Threshold {
    type Error = &'static str;

    fn try_from(raw: RawThreshold) -> Result<Self, Self::Error> {
        Self::new(raw.direction, raw.limit, raw.clear).ok_or(Self::RULE)
    }
}

impl Threshold {
    /// The rule for thresholds, as quoted in error messages to callers.
    pub const RULE: &str =
        "limit and clear must be finite numbers, and clear must be at the limit or on its other side";

    /// Returns `None` unless the numbers are finite and `clear` is on the other side of the limit, or at it.
    pub fn new(direction: Direction, limit: f64, clear: Option<f64>) -> Option<Self> {
        let is_other_side = |clear: f64| match direction {
            Direction::Above => clear <= limit,
            Direction::Below => clear >= limit,
        };
        let fits = limit.is_finite() && clear.is_none_or(|clear| clear.is_finite() && is_other_side(clear));
        fits.then_some(Self {
            direction,
            limit,
            clear,
        })
    }

    pub const fn direction(self) -> Direction {
        self.direction
    }

    pub const fn limit(self) -> f64 {
        self.limit
    }

    /// The value at which an alert ends; the limit unless set.
    pub fn clear(self) -> f64 {
        self.clear.unwrap_or(self.limit)
    }

    /// Whether the condition holds for this value, if it held for the previous one or did not. Between `clear` and `limit`
    /// it stays as it was.
    pub fn holds(self, value: f64, held: bool) -> bool {
        let bound = if held { self.clear() } else { self.limit };
        match self.direction {
            Direction::Above => value > bound,
            Direction::Below => value < bound,
        }
    }
}

/// The name of a measure of VMs, from [`VM_MEASURES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct MeasureName(&'static str);

impl MeasureName {
    const RULE: &str = "must be the name of a measure of VMs, such as cpu_util";

    /// Returns `None` if there is no measure with this name.
    pub fn new(name: &str) -> Option<Self> {
        let mut measures = VM_MEASURES.into_array().into_iter();
        measures
            .find(|measure| measure.name == name)
            .map(|measure| Self(measure.name))
    }

    pub const fn as_str(self) -> &'static str {
        self.0
    }

    /// The value of this measure; `None` if it is unknown.
    pub fn value(self, values: &VmValues) -> Option<f64> {
        let values = values.as_floats();
        let mut described = values.described();
        described.find_map(|(measure, value)| (measure.name == self.0).then_some(value))?
    }
}

impl<'de> Deserialize<'de> for MeasureName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = bounded_text(deserializer, Self::RULE, |_| true)?;
        Self::new(&name).ok_or_else(|| D::Error::custom(Self::RULE))
    }
}

/// Mount points: a path of at most 1,024 bytes, in which `*` stands for any text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct MountPattern(String);

impl MountPattern {
    const RULE: &str = "must be a path of at most 1024 bytes that begins with / or *";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the pattern selects this mount point.
    pub fn matches(&self, mount_point: &str) -> bool {
        super::selector::matches(&self.0, mount_point)
    }
}

impl<'de> Deserialize<'de> for MountPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let allows = |text: &str| text.len() <= super::super::MAX_SUBJECT && text.starts_with(['/', '*']);
        bounded_text(deserializer, Self::RULE, allows).map(Self)
    }
}

/// A kind of fault of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = AgentFaultKind))]
pub enum FaultKind {
    /// The clock of the VM is wrong.
    Clock,
    /// The agent has a wrong UTC offset.
    UtcOffset,
    /// Two agents report as this VM.
    TwoAgents,
    /// Rows are not stored, because they are older than the retention or more than a day ahead.
    NotStored,
    /// The VM sends more than a limit allows.
    OverLimit,
}

impl FaultKind {
    /// Whether a fault of an agent is of this kind.
    pub const fn is(self, fault: &AgentFault) -> bool {
        matches!(
            (self, fault),
            (Self::Clock, AgentFault::Clock { .. })
                | (Self::UtcOffset, AgentFault::UtcOffset { .. })
                | (Self::TwoAgents, AgentFault::TwoAgents)
                | (
                    Self::NotStored,
                    AgentFault::ExpiredRows { .. } | AgentFault::DateAhead { .. }
                )
                | (Self::OverLimit, AgentFault::OverLimit { .. })
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threshold_has_hysteresis() {
        let above = Threshold::new(Direction::Above, 90.0, Some(80.0)).unwrap();
        assert!(!above.holds(90.0, false) && above.holds(90.1, false));
        assert!(above.holds(80.1, true) && !above.holds(80.0, true));
        let below = Threshold::new(Direction::Below, 1.0, None).unwrap();
        assert!(below.holds(0.0, false) && !below.holds(1.0, true));
        assert_eq!(Threshold::new(Direction::Above, 90.0, Some(91.0)), None);
        assert_eq!(Threshold::new(Direction::Below, 1.0, Some(0.5)), None);
        assert_eq!(Threshold::new(Direction::Above, f64::NAN, None), None);
    }

    #[test]
    fn conditions_match_golden_json() {
        for golden in [
            r#"{"kind":"measure","measure":"cpu_util","threshold":{"direction":"above","limit":95.0,"clear":90.0}}"#,
            r#"{"kind":"filesystem","mount_point":"/var*","threshold":{"direction":"above","limit":90.0}}"#,
            r#"{"kind":"process_count","name":"postgres","threshold":{"direction":"below","limit":1.0}}"#,
            r#"{"kind":"vm_state","states":["shut_off","crashed"]}"#,
            r#"{"kind":"agent_silent"}"#,
            r#"{"kind":"agent_fault","fault":"two_agents"}"#,
        ] {
            let condition: Condition = serde_json::from_str(golden).unwrap();
            assert_eq!(serde_json::to_string(&condition).unwrap(), golden);
            assert!(golden.contains(condition.kind()));
        }
        for bad in [
            r#"{"kind":"measure","measure":"cmd","threshold":{"direction":"above","limit":95}}"#,
            r#"{"kind":"vm_state","states":[]}"#,
            r#"{"kind":"vm_state","states":["of_a_newer_version"]}"#,
            r#"{"kind":"filesystem","mount_point":"var","threshold":{"direction":"above","limit":90}}"#,
            r#"{"kind":"of_a_newer_version"}"#,
        ] {
            assert!(serde_json::from_str::<Condition>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn measure_is_read_by_its_name() {
        let values = VmValues {
            cpu_util: Some(12.5),
            proc: Some(7),
            ..VmValues::default()
        };
        let value = |name| MeasureName::new(name).unwrap().value(&values);
        assert_eq!(
            (value("cpu_util"), value("proc"), value("mem")),
            (Some(12.5), Some(7.0), None)
        );
        assert_eq!(MeasureName::new("cmd"), None);
    }
}
