//! The fields of Nova's answers that the driver uses.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use vmwatch_api::{actions::Refusal, lifecycle::MachineState};

use crate::driver::{VmState, labels::FoundLabels};

/// A server (VM), as returned by Nova.
#[derive(Debug, Deserialize)]
pub(super) struct Server {
    pub(super) id: String,
    #[serde(default)]
    pub(super) name: String,
    pub(super) status: String,
    #[serde(rename = "OS-EXT-STS:task_state", default)]
    pub(super) task: Option<String>,
    /// State of the guest on its host, as a number of [`power`]; `None` if Nova does not show it.
    #[serde(rename = "OS-EXT-STS:power_state", default)]
    pub(super) power: Option<i64>,
    /// Whether the compute service of the host reports; only administrators of the cloud see it.
    #[serde(default)]
    pub(super) host_status: Option<String>,
    #[serde(default)]
    pub(super) locked: bool,
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

/// Nova's numbers for the state of a guest on its host.
mod power {
    pub(super) const RUNNING: i64 = 1;
    pub(super) const PAUSED: i64 = 3;
    pub(super) const SHUTDOWN: i64 = 4;
    pub(super) const CRASHED: i64 = 6;
    pub(super) const SUSPENDED: i64 = 7;
}

impl Server {
    /// Whether the server is shelved, so that `unshelve` starts it.
    pub(super) fn is_shelved(&self) -> bool {
        self.status.starts_with("SHELVED")
    }

    /// Whether the server was deleted. Until it reclaims such a server, Nova shows it and refuses all actions, but does not
    /// list it.
    pub(super) fn is_deleted(&self) -> bool {
        matches!(self.status.as_str(), "SOFT_DELETED" | "DELETED")
    }

    /// Whether Nova does not know what happens on the host of the server. A server without a host has an empty status.
    fn is_host_down(&self) -> bool {
        matches!(self.host_status.as_deref(), Some("DOWN" | "UNKNOWN"))
    }
}

/// Derives the state of a VM. Nova reports separately what the VM should be (`status`), what it is doing with the VM
/// (`task_state`), what the host last reported of the guest (`power_state`), and whether the host reports at all.
pub(super) fn state_of(server: &Server) -> VmState {
    let (state, hindrance) = by_status(server);
    if server.is_host_down() {
        let is_off = state == MachineState::ShutOff;
        return VmState {
            state: if is_off { state } else { MachineState::Unknown },
            hindrance: Some(Refusal::HostDown),
        };
    }
    VmState {
        state,
        hindrance: if server.locked {
            Some(Refusal::Locked)
        } else {
            hindrance
        },
    }
}

fn by_status(server: &Server) -> (MachineState, Option<Refusal>) {
    use MachineState as Is;
    match (server.status.as_str(), server.task.as_deref()) {
        ("ACTIVE", Some("powering-off" | "suspending" | "pausing" | "deleting" | "soft-deleting")) => {
            (Is::ShuttingDown, Some(Refusal::Busy))
        }
        ("ACTIVE", Some(task)) if task.starts_with("shelving") => (Is::ShuttingDown, Some(Refusal::Busy)),
        ("ACTIVE", Some(task)) if task.starts_with("reboot") => (Is::Starting, Some(Refusal::Busy)),
        ("REBOOT" | "HARD_REBOOT" | "BUILD", _)
        | ("SHUTOFF", Some("powering-on"))
        | ("PAUSED", Some("unpausing"))
        | ("SUSPENDED", Some("resuming"))
        | ("SHELVED" | "SHELVED_OFFLOADED", Some("unshelving")) => (Is::Starting, Some(Refusal::Busy)),
        ("ACTIVE", None) => (active(server.power), None),
        ("SHUTOFF", None) if server.power == Some(power::RUNNING) => (Is::Unknown, Some(Refusal::OutOfSync)),
        ("SHUTOFF" | "SHELVED" | "SHELVED_OFFLOADED", None) => (Is::ShutOff, None),
        ("PAUSED", None) => (Is::Paused, Some(Refusal::ResumeFirst)),
        ("SUSPENDED", None) => (Is::Suspended, Some(Refusal::ResumeFirst)),
        ("ERROR", _) if server.power == Some(power::RUNNING) => (Is::Running, Some(Refusal::ErrorState)),
        ("ERROR", _) => (Is::Crashed, None),
        ("VERIFY_RESIZE", _) => match server.power {
            Some(power::SHUTDOWN) => (Is::ShutOff, Some(Refusal::ResizeUnconfirmed)),
            power => (active(power), Some(Refusal::ResizeUnconfirmed)),
        },
        ("ACTIVE" | "PASSWORD" | "MIGRATING", _) => (active(server.power), Some(Refusal::Busy)),
        ("SHUTOFF" | "SHELVED" | "SHELVED_OFFLOADED", _) => (Is::ShutOff, Some(Refusal::Busy)),
        ("PAUSED", _) => (Is::Paused, Some(Refusal::Busy)),
        ("SUSPENDED", _) => (Is::Suspended, Some(Refusal::Busy)),
        ("RESIZE" | "REVERT_RESIZE" | "REBUILD", _) => (Is::Unknown, Some(Refusal::Busy)),
        // The rescue system runs, not the VM's own.
        ("RESCUE", _) => (Is::Unknown, Some(Refusal::Rescue)),
        _ => (Is::Unknown, None),
    }
}

/// The state of a VM that should run. If its guest does not run, it counts as crashed: Nova refuses to start it, but can
/// power it off.
const fn active(power: Option<i64>) -> MachineState {
    match power {
        None | Some(power::RUNNING) => MachineState::Running,
        Some(power::PAUSED | power::SHUTDOWN | power::CRASHED | power::SUSPENDED) => MachineState::Crashed,
        Some(_) => MachineState::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn server(status: &str, task: Option<&str>, more: &Value) -> Server {
        let mut server = json!({"id": "", "status": status, "OS-EXT-STS:task_state": task});
        server
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        serde_json::from_value(server).unwrap()
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "the table has one entry per case")]
    fn vm_state_is_derived_from_nova_status_task_power_and_host() {
        use MachineState as Is;
        let power = |number: i64| json!({"OS-EXT-STS:power_state": number});
        let none = || json!({});
        for (status, task, more, state, hindrance) in [
            ("ACTIVE", None, none(), Is::Running, None),
            ("ACTIVE", None, power(1), Is::Running, None),
            ("ACTIVE", None, power(0), Is::Unknown, None),
            ("ACTIVE", None, power(3), Is::Crashed, None),
            ("ACTIVE", None, power(4), Is::Crashed, None),
            ("ACTIVE", None, power(6), Is::Crashed, None),
            ("ACTIVE", None, json!({"host_status": "UP"}), Is::Running, None),
            (
                "ACTIVE",
                None,
                json!({"host_status": "MAINTENANCE"}),
                Is::Running,
                None,
            ),
            (
                "ACTIVE",
                None,
                json!({"host_status": "DOWN"}),
                Is::Unknown,
                Some(Refusal::HostDown),
            ),
            (
                "ACTIVE",
                None,
                json!({"host_status": "UNKNOWN"}),
                Is::Unknown,
                Some(Refusal::HostDown),
            ),
            (
                "SHUTOFF",
                None,
                json!({"host_status": "DOWN", "locked": true}),
                Is::ShutOff,
                Some(Refusal::HostDown),
            ),
            (
                "ACTIVE",
                None,
                json!({"locked": true}),
                Is::Running,
                Some(Refusal::Locked),
            ),
            (
                "RESCUE",
                None,
                json!({"locked": true}),
                Is::Unknown,
                Some(Refusal::Locked),
            ),
            (
                "ACTIVE",
                Some("powering-off"),
                power(1),
                Is::ShuttingDown,
                Some(Refusal::Busy),
            ),
            (
                "ACTIVE",
                Some("shelving_image_uploading"),
                power(1),
                Is::ShuttingDown,
                Some(Refusal::Busy),
            ),
            (
                "ACTIVE",
                Some("reboot_started"),
                power(4),
                Is::Starting,
                Some(Refusal::Busy),
            ),
            (
                "ACTIVE",
                Some("image_snapshot"),
                power(1),
                Is::Running,
                Some(Refusal::Busy),
            ),
            (
                "MIGRATING",
                Some("migrating"),
                power(1),
                Is::Running,
                Some(Refusal::Busy),
            ),
            (
                "REBOOT",
                Some("reboot_pending"),
                none(),
                Is::Starting,
                Some(Refusal::Busy),
            ),
            ("SHUTOFF", None, power(4), Is::ShutOff, None),
            ("SHUTOFF", None, power(1), Is::Unknown, Some(Refusal::OutOfSync)),
            (
                "SHUTOFF",
                Some("powering-on"),
                power(4),
                Is::Starting,
                Some(Refusal::Busy),
            ),
            (
                "SHUTOFF",
                Some("image_snapshot"),
                power(4),
                Is::ShutOff,
                Some(Refusal::Busy),
            ),
            ("PAUSED", None, power(3), Is::Paused, Some(Refusal::ResumeFirst)),
            (
                "PAUSED",
                Some("unpausing"),
                power(3),
                Is::Starting,
                Some(Refusal::Busy),
            ),
            (
                "SUSPENDED",
                None,
                power(4),
                Is::Suspended,
                Some(Refusal::ResumeFirst),
            ),
            ("SHELVED", None, power(4), Is::ShutOff, None),
            (
                "SHELVED",
                Some("shelving_offloading"),
                power(4),
                Is::ShutOff,
                Some(Refusal::Busy),
            ),
            (
                "SHELVED_OFFLOADED",
                None,
                json!({"host_status": ""}),
                Is::ShutOff,
                None,
            ),
            (
                "SHELVED_OFFLOADED",
                Some("unshelving"),
                power(4),
                Is::Starting,
                Some(Refusal::Busy),
            ),
            (
                "VERIFY_RESIZE",
                None,
                power(1),
                Is::Running,
                Some(Refusal::ResizeUnconfirmed),
            ),
            (
                "VERIFY_RESIZE",
                None,
                power(4),
                Is::ShutOff,
                Some(Refusal::ResizeUnconfirmed),
            ),
            (
                "RESIZE",
                Some("resize_migrating"),
                power(1),
                Is::Unknown,
                Some(Refusal::Busy),
            ),
            (
                "REVERT_RESIZE",
                Some("resize_reverting"),
                power(1),
                Is::Unknown,
                Some(Refusal::Busy),
            ),
            (
                "PASSWORD",
                Some("updating_password"),
                power(1),
                Is::Running,
                Some(Refusal::Busy),
            ),
            (
                "PASSWORD",
                Some("updating_password"),
                power(4),
                Is::Crashed,
                Some(Refusal::Busy),
            ),
            (
                "REBUILD",
                Some("rebuilding"),
                power(1),
                Is::Unknown,
                Some(Refusal::Busy),
            ),
            ("RESCUE", None, power(1), Is::Unknown, Some(Refusal::Rescue)),
            ("ERROR", None, power(1), Is::Running, Some(Refusal::ErrorState)),
            ("ERROR", None, power(4), Is::Crashed, None),
            ("ERROR", None, none(), Is::Crashed, None),
            (
                "BUILD",
                Some("spawning"),
                power(0),
                Is::Starting,
                Some(Refusal::Busy),
            ),
            ("UNKNOWN", None, power(4), Is::Unknown, None),
        ] {
            let server = server(status, task, &more);
            assert_eq!(state_of(&server), VmState { state, hindrance }, "{server:?}");
        }
    }
}
