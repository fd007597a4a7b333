//! What a hypervisor must be able to do. A trait, because there really are several.

#[cfg(feature = "libvirt")]
mod libvirt;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use shared::api::{InstanceId, lifecycle::MachineState};

use crate::config::{CallLimits, Endpoint};

/// A hypervisor, or the API of a cloud. Every call ends within the limit that its driver was given.
#[async_trait]
pub(crate) trait Driver: fmt::Debug + Send + Sync {
    /// Whether it answers.
    async fn check(&self) -> Result<(), DriverError>;

    /// What it says of the machine.
    async fn state(&self, id: &InstanceId) -> Result<MachineState, DriverError>;

    /// Makes the machine run, from whatever state: a paused one is resumed. A success says that the hypervisor took
    /// the command, not that the machine runs.
    async fn start(&self, id: &InstanceId) -> Result<(), DriverError>;
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
    /// It did not answer in time. A command may be carried out all the same.
    #[error("it did not answer in time")]
    Timeout,
    /// It refused.
    #[error("{0}")]
    Rejected(String),
}

/// The driver of an endpoint. Connects when it is first used.
pub(crate) fn open(endpoint: Endpoint, limits: CallLimits) -> Arc<dyn Driver> {
    match endpoint {
        #[cfg(feature = "libvirt")]
        Endpoint::Libvirt(uri) => Arc::new(libvirt::Libvirt::new(uri, limits)),
    }
}
