//! What can go wrong in auth-svc, and what a caller is told of it.

use std::time::Duration;

use vmwatch_api::{
    UserName,
    audit::AuditResult,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    BusError,
    audit::AuditError,
    provision::{ProvisionError, setup::SetupError},
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
    /// Too many logins wait; what lies ahead takes so long.
    #[error("too many logins wait: {0:?} of hashing lies ahead")]
    QueueFull(Duration),
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
    /// The audit could not be read.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// A bucket or stream could not be opened or made.
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    /// The command `setup` failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The audit is required and takes no record.
    #[error("the change could not be recorded in the audit, so it was not made; try again shortly")]
    NotAudited(#[source] AuditError),
    /// There is no such user.
    #[error("there is no user {0}")]
    NoSuchUser(UserName),
    /// A new user's name is another's.
    #[error("the name {0} is taken")]
    NameTaken(UserName),
    /// Nobody would be left to manage users.
    #[error("{0} is the last administrator; add another first")]
    LastAdministrator(UserName),
    /// Another's password is for administrators to set.
    #[error("another user's password needs the role admin")]
    NotYours,
    /// Who changes its own password proves that it is no stolen session.
    #[error("old_password is needed to change one's own password")]
    OldPasswordNeeded,
    /// It proved nothing.
    #[error("old_password is wrong")]
    WrongOldPassword,
    /// The change is in the database, but gateways do not know of it yet.
    #[error(
        "the change was stored, but it could not be passed on to the gateways and may not be in effect yet; repeat it"
    )]
    NotPassedOn(#[source] Box<AuthError>),
    /// Others changed the same record each time that it was tried.
    #[error("others changed the same record at the same time")]
    Contended,
    /// The user has no session with this name.
    #[error("there is no such session")]
    NoSuchSession,
    /// A user command cannot be carried out; the text says why.
    #[error("{0}")]
    Refused(String),
}

impl AuthError {
    /// A failure of a bucket.
    pub(crate) fn bucket(error: impl Into<async_nats::Error>) -> Self {
        Self::Bucket(error.into())
    }

    /// What the audit says of it.
    pub(crate) const fn audit_result(&self) -> AuditResult {
        match self {
            Self::WrongCredentials
            | Self::Busy
            | Self::QueueFull(_)
            | Self::Throttled(_)
            | Self::NoSuchUser(_)
            | Self::NoSuchSession
            | Self::NameTaken(_)
            | Self::LastAdministrator(_)
            | Self::NotYours
            | Self::OldPasswordNeeded
            | Self::WrongOldPassword => AuditResult::Refused,
            _ => AuditResult::Failed,
        }
    }
}

const TOO_MANY_LOGINS: &str = "too many logins at once; try again shortly";

impl From<AuthError> for Fault {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::WrongCredentials => Self::new(FaultKind::Unauthenticated, error.to_string()),
            AuthError::Throttled(wait) => Self::new(
                FaultKind::Throttled,
                "too many failed logins of late; try again later",
            )
            .retry_after(wait),
            AuthError::NoSuchUser(_) | AuthError::NoSuchSession => {
                Self::new(FaultKind::NotFound, error.to_string())
            }
            AuthError::NameTaken(_) | AuthError::LastAdministrator(_) => {
                Self::new(FaultKind::Conflict, error.to_string())
            }
            AuthError::NotYours | AuthError::OldPasswordNeeded | AuthError::WrongOldPassword => {
                Self::new(FaultKind::Forbidden, error.to_string())
            }
            AuthError::NotPassedOn(_) => Self::new(FaultKind::Backend, error.to_string()).caused_by(error),
            AuthError::NotAudited(_) => Self::new(FaultKind::Unavailable, error.to_string()).caused_by(error),
            AuthError::Busy => Self::new(FaultKind::Overloaded, TOO_MANY_LOGINS).caused_by(error),
            AuthError::QueueFull(wait) => Self::new(FaultKind::Overloaded, TOO_MANY_LOGINS)
                .retry_after(wait)
                .caused_by(error),
            AuthError::Contended => Self::new(
                FaultKind::Overloaded,
                "others changed the same record at the same time; try again shortly",
            ),
            AuthError::Store(_) | AuthError::Bucket(_) | AuthError::Provision(_) | AuthError::Audit(_) => {
                Self::new(
                    FaultKind::Backend,
                    "users and sessions cannot be reached at the moment; try again shortly",
                )
                .caused_by(error)
            }
            other => {
                Self::new(FaultKind::Internal, "it failed on our side; it is in the log").caused_by(other)
            }
        }
    }
}
