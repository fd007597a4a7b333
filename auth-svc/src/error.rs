//! What can go wrong in auth-svc, and what a caller is told of it.

use std::time::Duration;

use shared::{
    bus::BusError,
    wire::{Fault, FaultKind},
};

/// A failure of auth-svc.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// Name and password do not belong together; which of them is wrong is never told.
    #[error("wrong user name or password")]
    WrongCredentials,
    /// All permits for hashing were taken for too long.
    #[error("too many logins at once")]
    Busy,
    /// Too many failures of late; again after the wait.
    #[error("too many failed logins of late")]
    Throttled(Duration),
    /// The database failed.
    #[error("the user database failed")]
    Store(#[from] mongodb::error::Error),
    /// Sessions or counters could not be read or written.
    #[error("a bucket failed")]
    Bucket(#[source] async_nats::Error),
    /// A session could not be encoded.
    #[error("a session record could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// Hashing failed, or a stored hash is damaged.
    #[error("the password could not be hashed: {0}")]
    Hash(String),
    /// The system's random source failed.
    #[error("the system's random source does not answer")]
    Random(#[source] getrandom::Error),
    /// The bus could not be used.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A listener or terminal failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A user command cannot be carried out; the text says why.
    #[error("{0}")]
    Refused(String),
}

impl AuthError {
    /// A failure of a bucket.
    pub(crate) fn bucket(error: impl Into<async_nats::Error>) -> Self {
        Self::Bucket(error.into())
    }
}

impl From<AuthError> for Fault {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::WrongCredentials => Self::new(FaultKind::Unauthenticated, error.to_string()),
            AuthError::Busy => Self::new(
                FaultKind::Overloaded,
                "too many logins at once; try again shortly",
            )
            .caused_by(error),
            AuthError::Store(_) | AuthError::Bucket(_) => Self::new(
                FaultKind::Backend,
                "users cannot be checked at the moment; try again shortly",
            )
            .caused_by(error),
            other => Self::new(
                FaultKind::Internal,
                "the login failed on our side; it is in the log",
            )
            .caused_by(other),
        }
    }
}
