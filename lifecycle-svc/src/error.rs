//! Errors of lifecycle-svc as a program; failures of a call to a hypervisor are
//! [`DriverError`](crate::driver::DriverError).

use vmwatch_api::wire::Fault;
use vmwatch_bus::{BusError, audit::AuditError, provision::setup::SetupError};

use crate::driver::TlsError;

/// A failure of lifecycle-svc.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// The bus could not be used.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A listener failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The certificates for HTTPS to a cloud are not usable.
    #[error("cannot connect to the cloud: {0}")]
    Tls(String),
    /// The operating system's random source failed.
    #[error("the operating system's random source failed")]
    Random(#[from] getrandom::Error),
    /// A running service answered a request with a fault.
    #[error(transparent)]
    Answer(#[from] Fault),
    /// The audit stream could not be read.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The command `setup` failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// An answer could not be encoded as JSON.
    #[error("the answer could not be encoded")]
    Encode(#[from] serde_json::Error),
}

impl From<TlsError> for LifecycleError {
    fn from(error: TlsError) -> Self {
        Self::Tls(error.to_string())
    }
}
