//! Interface to a hypervisor. It is a trait because there are two implementations: libvirt and OpenStack Nova.

mod labels;
#[cfg(feature = "libvirt")]
mod libvirt;
mod nova;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use domain_stats::DomainStats;
use vmwatch_api::{InstanceId, actions::Refusal, lifecycle::MachineState};

pub(crate) use self::{
    labels::FoundLabels,
    nova::{NovaSettings, TlsError},
};
use crate::{
    config::{CallLimits, Endpoint},
    fence::Fence,
};

/// A hypervisor or a cloud. Every call ends within the driver's time limit. If an action returns success, the
/// hypervisor has accepted it, but the VM may not have reached the wanted state yet; the caller must read the state to
/// find out. When an action has its permit, and immediately before the call that takes effect, it checks with its
/// [`Fence`] that its deadline and its lease have not passed.
#[async_trait]
pub(crate) trait Driver: fmt::Debug + Send + Sync {
    /// Checks that the hypervisor answers.
    async fn check(&self) -> Result<(), DriverError>;

    /// Reads the state of a VM from the hypervisor.
    async fn state(&self, id: &InstanceId) -> Result<VmState, DriverError>;

    /// Returns the hypervisor's reason for the VM's state, if it reports one that matters to users, such as a crash.
    async fn failure_reason(&self, id: &InstanceId) -> Result<Option<String>, DriverError>;

    /// Starts the VM from any state; resumes a paused VM, and unshelves a shelved one.
    async fn start(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError>;

    /// Asks the guest operating system to shut down.
    async fn shutdown(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError>;

    /// Reboots the guest. With `hard`, resets the VM without asking the guest.
    async fn reboot(&self, id: &InstanceId, hard: bool, fence: &Fence) -> Result<(), DriverError>;

    /// Powers the VM off without asking the guest.
    async fn destroy(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError>;

    /// Lists the VMs of the hypervisor, at most [`MAX_LISTED`].
    async fn list(&self) -> Result<Vec<Found>, DriverError>;

    /// Reads the counters of the active VMs, of at most [`MAX_LISTED`]; none if the hypervisor has no counters.
    async fn stats(&self) -> Result<Vec<(InstanceId, DomainStats)>, DriverError>;
}

/// Maximum number of VMs that are listed, or measured, for one hypervisor.
pub(crate) const MAX_LISTED: usize = 10_000;

/// The state of a VM on its hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmState {
    pub(crate) state: MachineState,
    /// Why the hypervisor refuses actions that the state would allow. The state machine decides which ones.
    pub(crate) hindrance: Option<Refusal>,
}

impl From<MachineState> for VmState {
    fn from(state: MachineState) -> Self {
        Self {
            state,
            hindrance: None,
        }
    }
}

/// A VM in the list of a hypervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) id: InstanceId,
    pub(crate) name: String,
    pub(crate) state: VmState,
    /// The labels of the VM; `None` if this list has not read them, so that those that are known stay.
    pub(crate) labels: Option<FoundLabels>,
}

/// Why a call to a hypervisor failed. Messages come from the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DriverError {
    /// The hypervisor has no such VM.
    #[error("there is no such VM")]
    NotFound,
    /// The hypervisor refused the action because of the VM's state.
    #[error("{0}")]
    Conflict(String),
    /// The hypervisor is unreachable. An action may still have taken effect.
    #[error("{0}")]
    Unavailable(String),
    /// The call was not made: no permit became free in time, or the fence did not allow the action any more.
    #[error("the command was not sent: {0}")]
    NotBegun(&'static str),
    /// The hypervisor did not answer within the time limit. An action may still take effect.
    #[error("the hypervisor did not answer in time")]
    Timeout,
    /// The hypervisor refused the call for any other reason.
    #[error("{0}")]
    Rejected(String),
}

/// Creates the driver for a hypervisor. It connects on first use.
pub(crate) fn open(endpoint: Endpoint, limits: CallLimits) -> Result<Arc<dyn Driver>, TlsError> {
    Ok(match endpoint {
        #[cfg(feature = "libvirt")]
        Endpoint::Libvirt(uri) => Arc::new(libvirt::Libvirt::new(uri, limits)),
        Endpoint::Nova(settings) => Arc::new(nova::Nova::new(*settings, limits)?),
    })
}

/// Error of a call that got no permit of its hypervisor within its time limit.
const NO_PERMIT: DriverError = DriverError::NotBegun("too many concurrent calls to the hypervisor");

/// Shortens a hypervisor's message to one line of at most 300 characters.
fn one_line(words: &str) -> String {
    let mut line = words
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    if let Some((end, _)) = line.char_indices().nth(300) {
        line.truncate(end);
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hypervisor_messages_are_shortened_to_one_line() {
        assert_eq!(
            one_line("internal error:\n\tno\u{0}such  disk\n"),
            "internal error: no such disk"
        );
        assert_eq!(one_line(&"é".repeat(1000)).chars().count(), 301);
    }
}
