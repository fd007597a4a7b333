//! What can go wrong in lifecycle-svc as a program; what goes wrong with a machine is a
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
    /// The certificates for a cloud's https are not usable.
    #[error("a cloud cannot be used: {0}")]
    Tls(String),
    /// The system's random source failed.
    #[error("the system's random source does not answer")]
    Random(#[from] getrandom::Error),
    /// A running service answered a command with a fault.
    #[error(transparent)]
    Answer(#[from] Fault),
    /// The audit could not be read.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The command `setup` failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// An answer could not be printed.
    #[error("the answer could not be encoded")]
    Encode(#[from] serde_json::Error),
}

impl From<TlsError> for LifecycleError {
    fn from(error: TlsError) -> Self {
        Self::Tls(error.to_string())
    }
}
