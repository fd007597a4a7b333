//! The actions on VMs, and why the state of a VM does not allow one.
//!
//! lifecycle-svc decides with its state machine which actions a state allows. All other programs only pass its answer on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::lifecycle::Verb;

/// An action on a VM: a [`Verb`] together with whether the guest is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmAction {
    Start,
    /// Asks the guest to shut down.
    Stop,
    /// Asks the guest to reboot.
    Reboot,
    /// Restarts the VM without asking the guest.
    Reset,
    /// Cuts the VM's power.
    ForceStop,
    /// An action that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

impl VmAction {
    /// All actions that this version knows.
    pub const ALL: [Self; 5] = [
        Self::Start,
        Self::Stop,
        Self::Reboot,
        Self::Reset,
        Self::ForceStop,
    ];

    /// The verb of the action, and whether it is carried out without asking the guest (`hard`).
    pub const fn verb(self) -> (Verb, bool) {
        match self {
            Self::Start => (Verb::Start, false),
            Self::Stop => (Verb::Stop, false),
            Self::Reboot => (Verb::Reboot, false),
            Self::Reset => (Verb::Reboot, true),
            Self::ForceStop => (Verb::ForceStop, false),
            Self::Unknown => (Verb::Unknown, false),
        }
    }
}

/// Why the state of a VM does not allow an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(as = ActionRefusal)
)]
pub enum Refusal {
    /// The VM runs already, so that a start has no effect.
    AlreadyRunning,
    /// The VM is off already, so that a shutdown has no effect.
    AlreadyOff,
    /// The VM is off and must be started instead.
    Off,
    /// The VM is starting or shutting down.
    InTransition,
    /// The VM is paused or suspended.
    NotRunning,
    /// The VM has crashed and is kept for inspection.
    Crashed,
    /// The hypervisor reports a state that vmwatch does not know.
    UnknownState,
    /// The VM is locked in the cloud.
    Locked,
    /// The cloud is changing the VM: it is being started, shut down, resized, rebuilt, migrated or copied.
    Busy,
    /// The VM is in rescue mode.
    Rescue,
    /// The VM was resized, which must be confirmed or reverted.
    ResizeUnconfirmed,
    /// The host of the VM is down.
    HostDown,
    /// The cloud reports the VM as off, but its host reports that the guest runs.
    OutOfSync,
    /// The cloud reports an error for the VM, whose guest runs.
    ErrorState,
    /// The cloud cannot power off a VM that is paused or suspended.
    ResumeFirst,
    /// No hypervisor is known to have the VM.
    NoHypervisor,
    /// Several hypervisors have the VM, so that the action must name one.
    SeveralHypervisors,
    /// Another hypervisor has the VM too, and it is not off there.
    NotOffElsewhere,
    /// Another hypervisor that had the VM recently does not answer, so that the VM may still run there.
    FormerHypervisorUnreachable,
    /// The service does not know the action.
    UnknownAction,
    /// A reason that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

impl Refusal {
    /// Describes the reason to users.
    pub const fn text(self) -> &'static str {
        match self {
            Self::AlreadyRunning => "the VM is running already",
            Self::AlreadyOff => "the VM is off already",
            Self::Off => "the VM is off; start it",
            Self::InTransition => "the VM is starting or shutting down; wait until that has ended",
            Self::NotRunning => "the VM is paused or suspended; start it first, or force it off",
            Self::Crashed => "the VM has crashed and is kept for inspection; force it off first",
            Self::UnknownState => {
                "the hypervisor reports an unknown state, in which the VM can only be forced off"
            }
            Self::Locked => "the VM is locked in the cloud; unlock it there first",
            Self::Busy => "the cloud is changing the VM; wait until that has ended",
            Self::Rescue => "the VM is in rescue mode; end the rescue in the cloud first",
            Self::ResizeUnconfirmed => "the VM was resized; confirm or revert the resize in the cloud first",
            Self::HostDown => "the host of the VM is down; repair it, or evacuate the VM in the cloud",
            Self::OutOfSync => {
                "the cloud reports the VM as off, but its guest runs; correct that in the cloud first"
            }
            Self::ErrorState => "the cloud reports an error for the VM; reset it, or force it off",
            Self::ResumeFirst => {
                "the cloud cannot power off a VM that is paused or suspended; start it first"
            }
            Self::NoHypervisor => "no hypervisor has this VM",
            Self::SeveralHypervisors => {
                "several hypervisors have this VM; choose the hypervisor of the action"
            }
            Self::NotOffElsewhere => {
                "the VM is not off on another hypervisor, so that a second copy of it would run"
            }
            Self::FormerHypervisorUnreachable => {
                "another hypervisor that had the VM does not answer, so that the VM may still run there"
            }
            Self::UnknownAction => "this version of the service does not know the action",
            Self::Unknown => "the state of the VM does not allow the action",
        }
    }
}

/// The actions that the state of a VM does not allow, with the reasons. Every state that a hypervisor reports refuses at
/// least one action, so an empty map means that the reasons are unknown.
pub type Refused = BTreeMap<VmAction, Refusal>;

/// The actions that are allowed, given those that are not.
pub fn allowed(refused: &Refused) -> Vec<VmAction> {
    let mut allowed = VmAction::ALL.to_vec();
    allowed.retain(|action| !refused.contains_key(action));
    allowed
}

/// The answer if no action is allowed, whatever the state of the VM.
pub fn all_refused(reason: Refusal) -> Refused {
    VmAction::ALL.map(|action| (action, reason)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_actions_of_a_newer_version_are_read_as_unknown() {
        let newer = r#"{"start":"quota","migrate":"locked","stop":"already_off"}"#;
        let refused: Refused = serde_json::from_str(newer).unwrap();
        let expected = [
            (VmAction::Start, Refusal::Unknown),
            (VmAction::Stop, Refusal::AlreadyOff),
            (VmAction::Unknown, Refusal::Locked),
        ];
        assert_eq!(refused, expected.into());
        assert_eq!(
            allowed(&refused),
            [VmAction::Reboot, VmAction::Reset, VmAction::ForceStop]
        );
        assert_eq!(allowed(&all_refused(Refusal::NoHypervisor)), []);
    }
}
