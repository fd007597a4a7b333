//! What metrics-svc learns about the agent of a VM from the headers of its messages: its clock, its UTC offset, and whether
//! another agent reports as the same VM; and the status message of an agent.

use serde::{Deserialize, Deserializer, Serialize};

use super::{InstanceId, bounded_text, time::UtcOffset};

/// Maximum length of an [`AgentText`], in bytes.
const MAX_AGENT_TEXT: usize = 128;

/// Header of a sample message: when the agent sent it, by the clock of the VM, in Unix milliseconds. A message that is
/// sent again has the new time.
pub const SENT_AT: &str = "Vmwatch-Sent-At";
/// Header of a sample message: the UTC offset of the agent, such as `+08:00`.
pub const UTC_OFFSET: &str = "Vmwatch-Utc-Offset";
/// Header of a sample message: the random id of the process that sent it.
pub const RUN_ID: &str = "Vmwatch-Run-Id";

/// The random id of a process of the agent: 16 hexadecimal digits on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub u64);

impl RunId {
    /// Decodes a header.
    pub fn from_header(text: &str) -> Option<Self> {
        let is_hex = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex.then(|| u64::from_str_radix(text, 16).ok())?.map(Self)
    }

    /// The value of the header.
    pub fn to_header(self) -> String {
        format!("{:016x}", self.0)
    }
}

/// The sender of a sample message, as decoded from its headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sender {
    /// When the message arrived at the NATS server, Unix milliseconds.
    pub arrived_ms: u64,
    /// By how much the clock of the VM was ahead of the clock of the NATS server, in milliseconds; negative if it was behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_ahead_ms: Option<i64>,
    /// The UTC offset of the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utc_offset: Option<UtcOffset>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_id: Option<RunId>,
}

/// The subjects of the status messages of all agents.
pub const STATUS_SUBJECTS: &str = "vmwatch.v1.agents.*.status";
/// The KV bucket with the last status of each agent. Its keys are the ids of VMs; metrics-svc owns it.
pub const STATUS_BUCKET: &str = "vmwatch_agent_status";

/// The VM in the subject of a status message.
pub fn status_instance(subject: &str) -> Option<InstanceId> {
    let rest = subject.strip_prefix("vmwatch.v1.agents.")?;
    rest.strip_suffix(".status")?.parse().ok()
}

/// The subject of the status messages of a VM's agent.
pub fn status_subject(instance_id: &InstanceId) -> String {
    format!("vmwatch.v1.agents.{instance_id}.status")
}

/// The status message of an agent, as JSON. An agent sends it after each connection and about once per hour. A value that
/// the agent cannot read is absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Version of the agent.
    pub version: AgentText,
    /// Architecture of the VM's processor, such as `x86_64`.
    pub architecture: AgentText,
    /// Release of the kernel, such as `6.1.0-18-amd64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<AgentText>,
    /// Name of the distribution (`PRETTY_NAME` in `/etc/os-release`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distribution: Option<AgentText>,
    /// The kernel's random id of this boot of the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<AgentText>,
}

/// A text of an agent's status: 1 to 128 bytes without control characters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct AgentText(String);

impl AgentText {
    const RULE: &str = "must be a text of 1 to 128 bytes without control characters";

    /// Shortens the text to the permitted length, without control characters; `None` if nothing is left.
    pub fn shortened(text: &str) -> Option<Self> {
        let printable: String = text.chars().filter(|letter| !letter.is_control()).collect();
        let trimmed = printable.trim();
        let mut end = trimmed.len().min(MAX_AGENT_TEXT);
        while !trimmed.is_char_boundary(end) {
            end -= 1;
        }
        let text = trimmed.get(..end)?.trim_end();
        Self::allows(text).then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        (1..=MAX_AGENT_TEXT).contains(&text.len()) && !text.chars().any(char::is_control)
    }
}

impl Default for AgentText {
    fn default() -> Self {
        Self("?".to_owned())
    }
}

impl<'de> Deserialize<'de> for AgentText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

/// Why the samples of a VM may be wrong or misleading, or are stored late or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum AgentFault {
    /// The clock of the VM differs from the clock of the NATS server by more than two seconds.
    Clock {
        /// By how much the clock of the VM is ahead, in milliseconds; negative if it is behind.
        ahead_ms: i64,
    },
    /// The agent has another UTC offset than the deployment, so the times of its samples are wrong.
    UtcOffset {
        /// The offset of the agent.
        #[cfg_attr(feature = "openapi", schema(value_type = String))]
        agent: UtcOffset,
        /// The offset of the deployment.
        #[cfg_attr(feature = "openapi", schema(value_type = String))]
        deployment: UtcOffset,
    },
    /// Two agents report as this VM, for example because it was cloned, so its samples are those of two VMs.
    TwoAgents,
    /// Samples of this VM arrive, but rows of them are not stored, because they are older than the retention.
    ExpiredRows {
        /// Age of the last such sample when it arrived, in milliseconds.
        age_ms: u64,
    },
    /// Samples of this VM arrive, but they are refused, because their times are more than a day ahead.
    DateAhead {
        /// By how much the time of the last such sample was ahead of its arrival, in milliseconds.
        ahead_ms: u64,
    },
    /// The VM sends more than a limit of one VM allows. Its samples are stored late; above the limit of dead letters, its
    /// refused samples are only counted.
    OverLimit {
        limit: VmLimit,
        /// How long the VM has been above the limit, in milliseconds.
        for_ms: u64,
    },
    /// A fault that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

/// A limit of what one VM may send; metrics-svc has a setting for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum VmLimit {
    /// Messages per second (`VMWATCH_VM_MESSAGES_PER_SECOND`).
    Messages,
    /// Bytes per second (`VMWATCH_VM_BYTES_PER_SECOND`).
    Bytes,
    /// Rows per second (`VMWATCH_VM_ROWS_PER_SECOND`).
    Rows,
    /// Five-minute rollups that its samples change per second (`VMWATCH_VM_BUCKETS_PER_SECOND`).
    Buckets,
    /// Messages that wait to be stored (`VMWATCH_STREAM_MESSAGES_PER_VM`).
    Waiting,
    /// Refused samples, of which one becomes a dead letter within a time (`VMWATCH_VM_DEAD_LETTER_INTERVAL`).
    DeadLetters,
    /// A limit that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_id_survives_its_header() {
        for id in [RunId(0), RunId(0xab), RunId(u64::MAX)] {
            assert_eq!(RunId::from_header(&id.to_header()), Some(id));
        }
        for bad in [
            "",
            "ab",
            "00000000000000000",
            "+00000000000000a",
            "zz00000000000000",
        ] {
            assert_eq!(RunId::from_header(bad), None, "{bad}");
        }
    }

    #[test]
    fn agent_faults_match_golden_json() {
        for golden in [
            r#"{"kind":"clock","ahead_ms":-28800000}"#,
            r#"{"kind":"utc_offset","agent":"+00:00","deployment":"+08:00"}"#,
            r#"{"kind":"two_agents"}"#,
            r#"{"kind":"expired_rows","age_ms":2678400000}"#,
            r#"{"kind":"date_ahead","ahead_ms":90000000}"#,
            r#"{"kind":"over_limit","limit":"rows","for_ms":61000}"#,
        ] {
            let fault: AgentFault = serde_json::from_str(golden).unwrap();
            assert_eq!(serde_json::to_string(&fault).unwrap(), golden);
        }
        let newer = r#"{"kind":"of_a_newer_version","more":1}"#;
        assert_eq!(
            serde_json::from_str::<AgentFault>(newer).unwrap(),
            AgentFault::Unknown
        );
        let newer = r#"{"kind":"over_limit","limit":"of_a_newer_version","for_ms":1}"#;
        assert_eq!(
            serde_json::from_str::<AgentFault>(newer).unwrap(),
            AgentFault::OverLimit {
                limit: VmLimit::Unknown,
                for_ms: 1
            }
        );
    }

    #[test]
    fn agent_status_matches_golden_json_and_its_texts_are_bounded() {
        let golden = r#"{"version":"0.1.0","architecture":"x86_64","kernel":"6.1.0-18-amd64","distribution":"Debian GNU/Linux 12 (bookworm)","boot_id":"1b4e28ba-2fa1-41d2-883f-0016d3cca427"}"#;
        let status: AgentStatus = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&status).unwrap(), golden);
        let id = "vm-1".parse().unwrap();
        assert_eq!(status_instance(&status_subject(&id)), Some(id));
        assert_eq!(status_instance("vmwatch.v1.agents.a.b.status"), None);
        let least = r#"{"version":"1","architecture":"a","of_a_newer_version":1}"#;
        assert_eq!(serde_json::from_str::<AgentStatus>(least).unwrap().kernel, None);
        for bad in [String::new(), "x".repeat(129), "a\\nb".to_owned()] {
            let text = format!(r#"{{"version":"{bad}","architecture":"a"}}"#);
            assert!(serde_json::from_str::<AgentStatus>(&text).is_err(), "{bad}");
        }
        let shortened = |text: &str| AgentText::shortened(text).map(|text| text.0);
        assert_eq!(shortened(" Debian\n12 ").as_deref(), Some("Debian12"));
        assert_eq!(shortened(&"é".repeat(200)), Some("é".repeat(64)));
        assert_eq!(shortened("\n"), None);
    }
}
