//! The interface of a hypervisor. It is a trait because there are several implementations.

#[cfg(feature = "libvirt")]
mod libvirt;
mod nova;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use vmwatch_api::{InstanceId, lifecycle::MachineState};

pub(crate) use self::nova::{NovaSettings, TlsError};
use crate::{
    config::{CallLimits, Endpoint},
    fence::Fence,
};

/// A hypervisor or the API of a cloud. Every call ends within the driver's time limit. A successful action means that
/// the hypervisor accepted it, not that the VM has reached the wanted state; callers read the state to find out. An
/// action checks its fence while it holds the hypervisor's permit, immediately before the call that takes effect.
#[async_trait]
pub(crate) trait Driver: fmt::Debug + Send + Sync {
    /// Checks that the hypervisor answers.
    async fn check(&self) -> Result<(), DriverError>;

    /// The state of the VM.
    async fn state(&self, id: &InstanceId) -> Result<MachineState, DriverError>;

    /// The hypervisor's reason for the VM's state, if it reports a notable one such as a crash.
    async fn failure_reason(&self, id: &InstanceId) -> Result<Option<String>, DriverError>;

    /// Makes the VM run from any state: a paused VM is resumed.
    async fn start(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError>;

    /// Asks the guest to shut down.
    async fn shutdown(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError>;

    /// Reboots the guest; with `hard`, resets the VM without asking the guest.
    async fn reboot(&self, id: &InstanceId, hard: bool, fence: &Fence) -> Result<(), DriverError>;

    /// Cuts the VM's power.
    async fn destroy(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError>;

    /// All VMs, at most [`MAX_LISTED`].
    async fn list(&self) -> Result<Vec<Found>, DriverError>;
}

/// Maximum number of VMs listed for one hypervisor.
pub(crate) const MAX_LISTED: usize = 10_000;

/// A listed VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) id: InstanceId,
    pub(crate) name: String,
    pub(crate) state: MachineState,
}

/// Why a call to a hypervisor failed. The texts are the hypervisor's own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DriverError {
    /// The hypervisor has no such VM.
    #[error("there is no such VM")]
    NotFound,
    /// The VM's state does not allow the action.
    #[error("{0}")]
    Conflict(String),
    /// The hypervisor is unreachable. An action may still have taken effect.
    #[error("{0}")]
    Unavailable(String),
    /// The call was not made: no permit became free in time, or the action's fence was closed.
    #[error("the command was not sent: {0}")]
    NotBegun(&'static str),
    /// The hypervisor did not answer in time. An action may still take effect.
    #[error("the hypervisor did not answer in time")]
    Timeout,
    /// The hypervisor refused.
    #[error("{0}")]
    Rejected(String),
}

/// Makes the driver of an endpoint. It connects when it is first used.
pub(crate) fn open(endpoint: Endpoint, limits: CallLimits) -> Result<Arc<dyn Driver>, TlsError> {
    Ok(match endpoint {
        #[cfg(feature = "libvirt")]
        Endpoint::Libvirt(uri) => Arc::new(libvirt::Libvirt::new(uri, limits)),
        Endpoint::Nova(settings) => Arc::new(nova::Nova::new(*settings, limits)?),
    })
}

/// The error when no permit of a hypervisor became free within the time limit of a call.
const NO_PERMIT: DriverError = DriverError::NotBegun("too many calls to the hypervisor at once");

/// Reduces a hypervisor's message to one line of at most 300 characters.
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
    fn shortens_messages_to_one_line() {
        assert_eq!(
            one_line("internal error:\n\tno\u{0}such  disk\n"),
            "internal error: no such disk"
        );
        assert_eq!(one_line(&"é".repeat(1000)).chars().count(), 301);
    }
}
