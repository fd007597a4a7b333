//! What a hypervisor must be able to do. A trait, because there really are several.

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

/// A hypervisor, or the API of a cloud. Every call ends within the limit that its driver was given. The success of a
/// command says that the hypervisor took it, not that the machine is as it was asked to be: that is read. A command asks
/// its fence under the hypervisor's permit, immediately before the call that acts.
#[async_trait]
pub(crate) trait Driver: fmt::Debug + Send + Sync {
    /// Whether it answers.
    async fn check(&self) -> Result<(), DriverError>;

    /// What it says of the machine.
    async fn state(&self, id: &InstanceId) -> Result<MachineState, DriverError>;

    /// What it says of why the machine is as it is, where that is remarkable.
    async fn why(&self, id: &InstanceId) -> Result<Option<String>, DriverError>;

    /// Makes the machine run, from whatever state: a paused one is resumed.
    async fn start(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError>;

    /// Asks the machine's system to shut down.
    async fn shutdown(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError>;

    /// Starts the machine's system anew; `hard` without asking it.
    async fn reboot(&self, id: &InstanceId, hard: bool, fence: &Fence) -> Result<(), DriverError>;

    /// Cuts the machine's power.
    async fn destroy(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError>;

    /// All machines, at most [`MOST_LISTED`].
    async fn list(&self) -> Result<Vec<Found>, DriverError>;
}

/// The most machines that one hypervisor lists.
pub(crate) const MOST_LISTED: usize = 10_000;

/// A machine of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) id: InstanceId,
    pub(crate) name: String,
    pub(crate) state: MachineState,
}

/// Why a hypervisor did not do as it was told. The texts are the hypervisor's own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DriverError {
    /// It knows no such machine.
    #[error("there is no such machine")]
    NotFound,
    /// The machine is in a state that does not allow this.
    #[error("{0}")]
    Conflict(String),
    /// It cannot be reached. A command may have been carried out all the same.
    #[error("{0}")]
    Unavailable(String),
    /// The call was not made: none was free in time, or the fence of the command was closed.
    #[error("the command was not sent: {0}")]
    NotBegun(&'static str),
    /// It did not answer in time. A command may be carried out all the same.
    #[error("it did not answer in time")]
    Timeout,
    /// It refused.
    #[error("{0}")]
    Rejected(String),
}

/// The driver of an endpoint. Connects when it is first used.
pub(crate) fn open(endpoint: Endpoint, limits: CallLimits) -> Result<Arc<dyn Driver>, TlsError> {
    Ok(match endpoint {
        #[cfg(feature = "libvirt")]
        Endpoint::Libvirt(uri) => Arc::new(libvirt::Libvirt::new(uri, limits)),
        Endpoint::Nova(settings) => Arc::new(nova::Nova::new(*settings, limits)?),
    })
}

/// All permits of a hypervisor were taken for as long as a call may take.
const BUSY: DriverError = DriverError::NotBegun("too many calls to the hypervisor at once");

/// A hypervisor's words as one line of at most 300 characters, for people.
fn plain(words: &str) -> String {
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
    fn words_become_one_line_of_bounded_length() {
        assert_eq!(
            plain("internal error:\n\tno\u{0}such  disk\n"),
            "internal error: no such disk"
        );
        assert_eq!(plain(&"é".repeat(1000)).chars().count(), 301);
    }
}
