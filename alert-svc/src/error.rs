//! Errors of alert-svc, and the faults that callers get for them.

use vmwatch_api::wire::{Fault, FaultKind};
use vmwatch_bus::{
    BusError,
    audit::AuditError,
    jetstream::JetStreamError,
    provision::{ProvisionError, setup::SetupError},
};

use crate::seal::SealError;

/// Why alert-svc, one of its commands or a request failed.
#[derive(Debug, thiserror::Error)]
pub enum AlertError {
    /// A command to the MongoDB database failed.
    #[error("the database of alerts failed")]
    Store(#[from] mongodb::error::Error),
    /// A KV bucket or stream could not be read or written.
    #[error("a KV bucket or stream could not be read or written")]
    JetStream(#[from] JetStreamError),
    /// The connection to the bus failed.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A stream, KV bucket or consumer could not be opened or created.
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    /// The `setup` command failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The request is refused; the fault says why.
    #[error(transparent)]
    Refused(#[from] Fault),
    /// The audit record of a change could not be written, and the audit is required.
    #[error("the change could not be recorded in the audit, so it was not made; try again shortly")]
    NotAudited(#[from] AuditError),
    /// Other replicas kept changing the same messages.
    #[error("other replicas kept changing the messages of the channel")]
    Contended,
    /// TLS to receivers of notifications could not be set up.
    #[error("TLS to receivers of notifications could not be set up")]
    Tls(#[from] rustls::Error),
    /// A secret could not be sealed or opened.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A record could not be encoded.
    #[error("a record could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// A record could not be encoded for the database.
    #[error("a record could not be encoded for the database")]
    EncodeBson(#[from] mongodb::bson::error::Error),
    /// The operating system's source of random numbers failed.
    #[error("the operating system's source of random numbers failed")]
    Random(#[from] getrandom::Error),
    /// Reading or writing a file or a network connection failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl From<AlertError> for Fault {
    fn from(error: AlertError) -> Self {
        match error {
            AlertError::Store(_) => Self::new(
                FaultKind::Backend,
                "the database of alerts is unreachable; try again shortly",
            )
            .caused_by(error),
            AlertError::NotAudited(error) => error.into(),
            AlertError::Refused(fault) => fault,
            AlertError::Seal(SealError::NoKey) => Self::new(
                FaultKind::Conflict,
                "alert-svc has no key that seals secrets; an operator must configure one first",
            ),
            other => {
                Self::new(FaultKind::Internal, "an internal error occurred; it was logged").caused_by(other)
            }
        }
    }
}
