//! Methods of lifecycle-svc.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Access, Answer, Documented, InstanceId, Kind, Method, MethodInfo, Role, Service};

/// Which VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Its id.
    pub instance_id: InstanceId,
}

/// What the hypervisor says of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// It runs (which is not "its system has booted").
    Running,
    /// It is on its way up; a reboot counts as well.
    Starting,
    /// It is held in memory and does not run.
    Paused,
    /// It is on its way down.
    ShuttingDown,
    /// It is off.
    ShutOff,
    /// It stopped by a fault of its own.
    Crashed,
    /// It is asleep, or its memory is on disk.
    Suspended,
    /// The hypervisor says something else, or nothing.
    Unknown,
}

/// As on the wire.
impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Starting => "starting",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting_down",
            Self::ShutOff => "shut_off",
            Self::Crashed => "crashed",
            Self::Suspended => "suspended",
            Self::Unknown => "unknown",
        })
    }
}

/// A VM's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its id.
    pub instance_id: InstanceId,
    /// Its state.
    pub state: MachineState,
}

/// Starts a VM; answers well only when the hypervisor says that it runs. Starting a running VM is a success.
#[derive(Debug)]
pub struct Start;

impl Method for Start {
    type Params = Target;
    type Reply = Machine;
    const INFO: MethodInfo = MethodInfo {
        name: "startmonitor",
        service: Service::Lifecycle,
        subject: "lifecycle.start",
        access: Access::Role(Role::Operator),
        kind: Kind::Command,
        documented: Some(Documented {
            code: 32_523,
            success: "",
            answer: Answer::Null,
        }),
    };

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Reads a VM's state.
#[derive(Debug)]
pub struct State;

impl Method for State {
    type Params = Target;
    type Reply = Machine;
    const INFO: MethodInfo = MethodInfo {
        name: "state",
        service: Service::Lifecycle,
        subject: "lifecycle.state",
        access: Access::Role(Role::Viewer),
        kind: Kind::Query,
        documented: None,
    };

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}
