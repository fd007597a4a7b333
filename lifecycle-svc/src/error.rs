//! Errors that end lifecycle-svc or one of its commands. A failed call to a hypervisor is a
//! [`DriverError`](crate::driver::DriverError) instead.

use vmwatch_api::wire::Fault;
use vmwatch_bus::{BusError, audit::AuditError, provision::setup::SetupError};

use crate::driver::TlsError;

/// Why lifecycle-svc or one of its commands failed.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// The connection to the bus failed.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The health listener or another input or output operation failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The TLS certificates for HTTPS to a cloud cannot be used.
    #[error("cannot connect to the cloud: {0}")]
    Tls(String),
    /// The operating system's source of random numbers failed.
    #[error("the operating system's source of random numbers failed")]
    Random(#[from] getrandom::Error),
    /// The running service answered the query of the command-line client with a fault.
    #[error(transparent)]
    Answer(#[from] Fault),
    /// The audit stream could not be read.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The `setup` command failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The answer of the service could not be encoded as JSON.
    #[error("the answer could not be encoded")]
    Encode(#[from] serde_json::Error),
}

impl From<TlsError> for LifecycleError {
    fn from(error: TlsError) -> Self {
        Self::Tls(error.to_string())
    }
}
