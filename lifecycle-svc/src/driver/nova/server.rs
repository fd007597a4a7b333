//! The fields of Nova's answers that the driver uses.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use vmwatch_api::lifecycle::MachineState;

use crate::driver::labels::FoundLabels;

/// A server (VM), as returned by Nova.
#[derive(Debug, Deserialize)]
pub(super) struct Server {
    pub(super) id: String,
    #[serde(default)]
    pub(super) name: String,
    pub(super) status: String,
    #[serde(rename = "OS-EXT-STS:task_state", default)]
    pub(super) task: Option<String>,
    #[serde(default)]
    pub(super) fault: Option<ServerFault>,
    #[serde(default)]
    pub(super) metadata: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) tags: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ServerFault {
    pub(super) message: String,
}

#[derive(Deserialize)]
pub(super) struct OneServer {
    pub(super) server: Server,
}

#[derive(Deserialize)]
pub(super) struct Page {
    pub(super) servers: Vec<Server>,
    #[serde(default)]
    pub(super) servers_links: Vec<Value>,
}

#[derive(Deserialize)]
pub(super) struct Actions {
    #[serde(rename = "instanceActions")]
    pub(super) actions: Vec<ActionEntry>,
}

#[derive(Deserialize)]
pub(super) struct OneAction {
    #[serde(rename = "instanceAction")]
    pub(super) action: ActionEntry,
}

#[derive(Deserialize)]
pub(super) struct ActionEntry {
    pub(super) action: String,
    pub(super) request_id: String,
    pub(super) message: Option<String>,
    #[serde(default)]
    pub(super) events: Vec<ActionEvent>,
}

#[derive(Deserialize)]
pub(super) struct ActionEvent {
    #[serde(default)]
    pub(super) details: Option<String>,
}

/// Metadata and tags as labels. A tag `key=value` becomes the label with this key and value, another tag a label without
/// a value. If two have the same key, metadata comes before tags.
pub(super) fn labels_of(server: &Server) -> FoundLabels {
    let mut labels = FoundLabels::default();
    for (key, value) in &server.metadata {
        labels.add(key, value);
    }
    for tag in &server.tags {
        let (key, value) = tag.split_once('=').unwrap_or((tag, ""));
        labels.add(key, value);
    }
    labels
}

/// Derives the state of a VM from its status and its current task, which Nova reports separately.
pub(super) fn state_of(server: &Server) -> MachineState {
    match (server.status.as_str(), server.task.as_deref()) {
        ("ACTIVE", Some("powering-off" | "suspending" | "shelving" | "deleting")) => {
            MachineState::ShuttingDown
        }
        ("ACTIVE", Some(task)) if task.starts_with("reboot") => MachineState::Starting,
        ("ACTIVE" | "PASSWORD" | "MIGRATING", _) => MachineState::Running,
        ("REBOOT" | "HARD_REBOOT" | "BUILD", _)
        | ("SHUTOFF", Some("powering-on"))
        | ("PAUSED", Some("unpausing"))
        | ("SUSPENDED", Some("resuming")) => MachineState::Starting,
        ("SHUTOFF", _) => MachineState::ShutOff,
        ("PAUSED", _) => MachineState::Paused,
        ("SUSPENDED", _) => MachineState::Suspended,
        ("ERROR", _) => MachineState::Crashed,
        _ => MachineState::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_state_is_derived_from_nova_status_and_task() {
        for (status, task, state) in [
            ("ACTIVE", None, MachineState::Running),
            ("ACTIVE", Some("powering-off"), MachineState::ShuttingDown),
            ("ACTIVE", Some("reboot_started"), MachineState::Starting),
            ("REBOOT", Some("reboot_pending"), MachineState::Starting),
            ("SHUTOFF", None, MachineState::ShutOff),
            ("SHUTOFF", Some("powering-on"), MachineState::Starting),
            ("PAUSED", None, MachineState::Paused),
            ("ERROR", None, MachineState::Crashed),
            ("SHELVED_OFFLOADED", None, MachineState::Unknown),
        ] {
            let task = task.map(str::to_owned);
            let server = Server {
                id: String::new(),
                name: String::new(),
                status: status.to_owned(),
                task,
                fault: None,
                metadata: BTreeMap::new(),
                tags: Vec::new(),
            };
            assert_eq!(state_of(&server), state, "{server:?}");
        }
    }
}
