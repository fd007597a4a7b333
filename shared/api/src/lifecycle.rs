//! Methods of lifecycle-svc.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use super::operation::{
    Event, Operation, OperationFault, OperationFilter, OperationId, OperationPage, OperationPlace,
    OperationRef, OperationState,
};
use super::{Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service, metrics::Limit};
use crate::wire::Fault;

/// Which VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Its id.
    pub instance_id: InstanceId,
}

/// What the hypervisor says of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
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
    /// It stopped by a fault of its own, and is kept as it was.
    Crashed,
    /// It is asleep, or its memory is on disk.
    Suspended,
    /// The hypervisor says something else, or nothing.
    #[serde(other)]
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
    /// What the hypervisor calls it, where that is known without asking again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
}

/// What a command does to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// Makes it run.
    Start,
    /// Asks its system to shut down, as its power button does.
    Stop,
    /// Starts its system anew.
    Reboot,
    /// Cuts its power.
    ForceStop,
    /// What only a newer version knows: its record is shown, and left alone.
    #[serde(other)]
    Unknown,
}

impl Verb {
    /// The name, as on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Reboot => "reboot",
            Self::ForceStop => "force_stop",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A row of the table for a method that the document does not know.
const fn row(subject: &'static str, kind: Kind) -> MethodInfo {
    MethodInfo {
        service: Service::Lifecycle,
        subject,
        access: Access::Role(match kind {
            Kind::Query => Role::Viewer,
            Kind::Command => Role::Operator,
        }),
        kind,
        class: match kind {
            Kind::Query => Class::CheapRead,
            Kind::Command => Class::Command,
        },
    }
}

/// Starts a VM; answers well only when the hypervisor says that it runs. Starting a running VM is a success.
#[derive(Debug)]
pub struct Start;

impl Method for Start {
    type Params = Target;
    type Reply = Machine;
    const INFO: MethodInfo = MethodInfo {
        ..row("lifecycle.start", Kind::Command)
    };

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Asks a VM's system to shut down; answers well only when the hypervisor says that the VM is off. A system may
/// ignore it: then the deadline passes, and there is [`ForceStop`].
#[derive(Debug)]
pub struct Stop;

impl Method for Stop {
    type Params = Target;
    type Reply = Machine;
    const INFO: MethodInfo = row("lifecycle.stop", Kind::Command);

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Cuts a VM's power; answers well only when the hypervisor says that it is off.
#[derive(Debug)]
pub struct ForceStop;

impl Method for ForceStop {
    type Params = Target;
    type Reply = Machine;
    const INFO: MethodInfo = row("lifecycle.force_stop", Kind::Command);

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Which VM to reboot, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebootTarget {
    /// Its id.
    pub instance_id: InstanceId,
    /// Resets it without asking its system, as its reset button does.
    #[serde(default)]
    pub hard: bool,
}

/// Reboots a running VM; answers well when the hypervisor took the command and says that the VM runs. What the VM's
/// system makes of it no hypervisor can see.
#[derive(Debug)]
pub struct Reboot;

impl Method for Reboot {
    type Params = RebootTarget;
    type Reply = Machine;
    const INFO: MethodInfo = row("lifecycle.reboot", Kind::Command);

    fn instance(params: &RebootTarget) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Reads a VM's state.
#[derive(Debug)]
pub struct State;

impl Method for State {
    type Params = Target;
    type Reply = Machine;
    const INFO: MethodInfo = row("lifecycle.state", Kind::Query);

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Asks for the VMs that the principal may see, a page at a time, in the order of their ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// Only ids behind this one: the last of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<InstanceId>,
    /// At most how many.
    #[serde(default)]
    pub limit: Limit,
}

/// A VM of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedMachine {
    /// Its id.
    pub instance_id: InstanceId,
    /// What the hypervisor calls it.
    pub name: String,
    /// What the service's settings call the hypervisor.
    pub hypervisor: String,
    /// Its state.
    pub state: MachineState,
}

/// A page of VMs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineList {
    /// In the order of their ids.
    pub machines: Vec<ListedMachine>,
    /// Whether there are more behind the last.
    pub more: bool,
    /// The hypervisors that did not answer, whose VMs are missing here.
    pub silent: Vec<String>,
}

/// Lists VMs.
#[derive(Debug)]
pub struct List;

impl Method for List {
    type Params = Page;
    type Reply = MachineList;
    const INFO: MethodInfo = row("lifecycle.list", Kind::Query);
}

/// Reads a command's record.
#[derive(Debug)]
pub struct OperationsGet;

impl Method for OperationsGet {
    type Params = OperationRef;
    type Reply = Operation;
    const INFO: MethodInfo = row("lifecycle.operations.get", Kind::Query);
}

/// Lists the newest commands on the VMs that the principal may see.
#[derive(Debug)]
pub struct OperationsList;

impl Method for OperationsList {
    type Params = OperationFilter;
    type Reply = OperationPage;
    const INFO: MethodInfo = row("lifecycle.operations.list", Kind::Query);

    fn instance(params: &OperationFilter) -> Option<&InstanceId> {
        params.instance_id.as_ref()
    }

    fn hidden() -> Result<OperationPage, Fault> {
        Ok(OperationPage::default())
    }
}
