//! Methods of lifecycle-svc: reading VM states, and actions on VMs.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use super::operation::{
    Event, Operation, OperationFault, OperationFilter, OperationId, OperationPage, OperationPosition,
    OperationRef, OperationState,
};
use super::{
    Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service,
    actions::{Refused, VmAction},
    bounded_text,
};
use crate::wire::Fault;

/// Maximum length of the name of a hypervisor in a request, in characters.
const MAX_HYPERVISOR: usize = 128;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    pub instance_id: InstanceId,
}

impl From<InstanceId> for Target {
    fn from(instance_id: InstanceId) -> Self {
        Self { instance_id }
    }
}

/// The VM that an action is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionTarget {
    pub instance_id: InstanceId,
    /// The configured name of the hypervisor that must carry out the action; without it, the only hypervisor that has the
    /// VM. An older service ignores it, and refuses the action if several hypervisors have the VM.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "hypervisor"
    )]
    pub hypervisor: Option<String>,
}

impl From<InstanceId> for ActionTarget {
    fn from(instance_id: InstanceId) -> Self {
        Self {
            instance_id,
            hypervisor: None,
        }
    }
}

fn hypervisor<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let rule = "must be a text of at most 128 characters";
    bounded_text(deserializer, rule, |text| text.chars().count() <= MAX_HYPERVISOR).map(Some)
}

/// The state of a VM, as reported by the hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum MachineState {
    /// The VM runs; its operating system may not have booted yet.
    Running,
    /// The VM is starting or rebooting.
    Starting,
    /// The VM is in memory but does not run.
    Paused,
    ShuttingDown,
    ShutOff,
    /// The VM stopped because of a fault; its memory is preserved.
    Crashed,
    /// The VM is asleep, or its memory was saved to disk.
    Suspended,
    /// The hypervisor reported a state that vmwatch does not know, or no state.
    #[serde(other)]
    Unknown,
}

impl MachineState {
    /// The VM state's name as used on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Starting => "starting",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting_down",
            Self::ShutOff => "shut_off",
            Self::Crashed => "crashed",
            Self::Suspended => "suspended",
            Self::Unknown => "unknown",
        }
    }
}

impl MachineState {
    /// Whether nothing of the VM is in memory, so that no copy of it can write to its disks.
    pub const fn is_off(self) -> bool {
        matches!(self, Self::ShutOff)
    }
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A VM and its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub instance_id: InstanceId,
    pub state: MachineState,
    /// The hypervisor's name for the VM, if it is known without a further request to the hypervisor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The configured name of the hypervisor that runs the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
    /// The actions that the state allows. Only in the reply of [`State`], and not from an older service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_actions: Vec<VmAction>,
    /// The other actions, and why the state does not allow them.
    #[serde(default, skip_serializing_if = "Refused::is_empty")]
    pub refused_actions: Refused,
}

/// An action on a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    Start,
    /// Asks the guest to shut down, like pressing the power button.
    Stop,
    /// Restarts the guest.
    Reboot,
    /// Cuts the VM's power.
    ForceStop,
    /// An action that only a newer version of vmwatch knows. Its operation is shown but not executed.
    #[serde(other)]
    Unknown,
}

impl Verb {
    /// The action's name as used on the wire.
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

/// The method table entry of a method for the REST API.
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

/// Starts a VM; succeeds only when the hypervisor reports it as running. Starting a running VM succeeds.
#[derive(Debug)]
pub struct Start;

impl Method for Start {
    type Params = ActionTarget;
    type Reply = Machine;
    const INFO: MethodInfo = MethodInfo {
        ..row("lifecycle.start", Kind::Command)
    };

    fn instance(params: &ActionTarget) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Asks a VM's guest to shut down; succeeds only when the hypervisor reports the VM as off. If the guest ignores the
/// request, the deadline passes; [`ForceStop`] then cuts the power.
#[derive(Debug)]
pub struct Stop;

impl Method for Stop {
    type Params = ActionTarget;
    type Reply = Machine;
    const INFO: MethodInfo = row("lifecycle.stop", Kind::Command);

    fn instance(params: &ActionTarget) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Cuts a VM's power; succeeds only when the hypervisor reports the VM as off.
#[derive(Debug)]
pub struct ForceStop;

impl Method for ForceStop {
    type Params = ActionTarget;
    type Reply = Machine;
    const INFO: MethodInfo = row("lifecycle.force_stop", Kind::Command);

    fn instance(params: &ActionTarget) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebootTarget {
    pub instance_id: InstanceId,
    /// Whether to reset the VM without asking the guest, like pressing the reset button.
    #[serde(default)]
    pub hard: bool,
    /// As in [`ActionTarget`].
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "hypervisor"
    )]
    pub hypervisor: Option<String>,
}

/// Reboots a running VM; succeeds when the hypervisor has accepted the request and reports the VM as running. Success
/// does not mean that the guest has booted, because the hypervisor cannot observe that.
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

/// Reads the state of a VM.
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

/// Reads the record of an operation.
#[derive(Debug)]
pub struct OperationsGet;

impl Method for OperationsGet {
    type Params = OperationRef;
    type Reply = Operation;
    const INFO: MethodInfo = row("lifecycle.operations.get", Kind::Query);
}

/// Lists the newest operations on the VMs that the principal may see.
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
