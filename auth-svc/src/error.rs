//! The errors of auth-svc, and the faults that callers receive for them.

use std::time::Duration;

use vmwatch_api::{
    UserName,
    audit::AuditResult,
    enrollment::no_such_agent,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    BusError,
    audit::AuditError,
    follow::NotCurrent,
    jetstream::JetStreamError,
    provision::{ProvisionError, setup::SetupError},
};

use crate::{audit_watch::API_TOKEN_PERIOD, config::AGENT_NATS_URL, enrollment::Refusal};

#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// User name and password do not match. The fault does not reveal which of the two is wrong.
    #[error("wrong user name or password")]
    WrongCredentials,
    /// No permit to hash a password became free in time.
    #[error("too many logins at once")]
    Busy,
    /// The login was refused because password hashing queued earlier would take too long.
    #[error("too many logins: the hashing queue takes {0:?}")]
    QueueFull(Duration),
    /// There were too many failed logins recently. The value is the time after which a retry is possible.
    #[error("too many recent failed logins")]
    Throttled(Duration),
    #[error("the request to the user database failed")]
    Store(#[from] mongodb::error::Error),
    /// A JetStream KV bucket of auth-svc could not be read or written.
    #[error("a KV bucket could not be read or written")]
    Bucket(#[from] JetStreamError),
    #[error("a session record could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// Hashing a password failed, or a stored hash is damaged.
    #[error("the password could not be hashed: {0}")]
    Hash(String),
    #[error("the operating system's random generator failed")]
    Random(#[source] getrandom::Error),
    #[error(transparent)]
    Bus(#[from] BusError),
    /// Reading a password from the terminal or starting the health listener failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// A KV bucket or stream could not be opened or created.
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The audit is required, but the audit record could not be appended.
    #[error("the change could not be recorded in the audit, so it was not made; try again shortly")]
    NotAudited(#[source] AuditError),
    #[error("there is no user {0}")]
    NoSuchUser(UserName),
    /// The requested name for a new user already belongs to another user.
    #[error("the user name {0} is taken")]
    NameTaken(UserName),
    /// The change would leave no administrator.
    #[error("{0} is the last administrator; add another administrator first")]
    LastAdministrator(UserName),
    #[error("a service account can be a viewer or an operator, not an administrator")]
    ServiceAdministrator,
    #[error("{0} is a service account, which has no password")]
    ServicePassword(UserName),
    /// Users that can log in create their own tokens.
    #[error("{0} is not a service account; users create their own API tokens")]
    NoServiceAccount(UserName),
    #[error(
        "creating API tokens of a service account, and listing those of all users, requires the role admin"
    )]
    TokensOfOthers,
    /// The token would permit more than its owner may do.
    #[error("an API token cannot permit more than its owner may do: {0}")]
    TokenBeyondOwner(String),
    #[error("there is no such API token")]
    NoSuchApiToken,
    /// Otherwise, a user could evict older records from the audit.
    #[error("this user has created too many API tokens recently; try again in ten minutes")]
    TooManyNewApiTokens,
    #[error("too many API tokens are stored; revoke those that are no longer needed")]
    TooManyApiTokens,
    /// Only administrators may set the password of another user.
    #[error("changing another user's password requires the role admin")]
    NotYours,
    /// Users must confirm a change of their own password with the current one, so a stolen session is not
    /// sufficient to change it.
    #[error("old_password is required to change your own password")]
    OldPasswordNeeded,
    /// The current password given with a password change is wrong.
    #[error("old_password is wrong")]
    WrongOldPassword,
    /// The change is stored in the database but was not propagated to the gateways.
    #[error(
        "the change was stored but may not be in effect yet, because the gateways could not be notified; repeat the request"
    )]
    NotPassedOn(#[source] Box<AuthError>),
    /// Every attempt to change the record conflicted with a concurrent change.
    #[error("the record was changed by other requests at the same time")]
    Contended,
    /// The user has no session with the given id.
    #[error("there is no such session")]
    NoSuchSession,
    /// An agent was not enrolled.
    #[error(transparent)]
    Enrollment(#[from] Refusal),
    /// There were too many enrolments with a wrong secret recently. The value is the time after which a retry is
    /// possible.
    #[error("too many recent enrolments with a wrong join token")]
    EnrollmentThrottled(Duration),
    /// The deployment does not say how agents reach NATS.
    #[error(
        "agents cannot enrol, because auth-svc does not know how they reach NATS; set {} of auth-svc",
        AGENT_NATS_URL.name
    )]
    EnrollmentOff,
    #[error("public_key must be the public nkey of a user; its checksum is wrong")]
    InvalidAgentKey,
    #[error("there is no such join token")]
    NoSuchJoinToken,
    #[error("this VM has no enrolled agent")]
    NoSuchAgent,
    #[error("too many valid join tokens are stored; revoke those that are no longer needed")]
    TooManyJoinTokens,
    /// The copy of a KV bucket in memory is not up to date.
    #[error(transparent)]
    Stale(#[from] NotCurrent),
    /// A command-line command was refused; the text contains the reason.
    #[error("{0}")]
    Refused(String),
}

impl AuthError {
    /// The result to write to the audit record for this error.
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
            | Self::ServiceAdministrator
            | Self::ServicePassword(_)
            | Self::NoServiceAccount(_)
            | Self::TokensOfOthers
            | Self::TokenBeyondOwner(_)
            | Self::NoSuchApiToken
            | Self::TooManyNewApiTokens
            | Self::TooManyApiTokens
            | Self::NotYours
            | Self::OldPasswordNeeded
            | Self::WrongOldPassword
            | Self::Enrollment(_)
            | Self::EnrollmentThrottled(_)
            | Self::EnrollmentOff
            | Self::InvalidAgentKey
            | Self::NoSuchJoinToken
            | Self::NoSuchAgent
            | Self::TooManyJoinTokens => AuditResult::Refused,
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
                "too many recent failed logins; try again later",
            )
            .retry_after(wait),
            AuthError::TooManyNewApiTokens => {
                Self::new(FaultKind::Throttled, error.to_string()).retry_after(API_TOKEN_PERIOD)
            }
            AuthError::EnrollmentThrottled(wait) => {
                let text = format!("{error}; check the token and try again later");
                Self::new(FaultKind::Throttled, text).retry_after(wait)
            }
            AuthError::Enrollment(refusal) => Self::new(refusal.kind(), refusal.to_string()),
            AuthError::EnrollmentOff => Self::new(FaultKind::Unavailable, error.to_string()),
            AuthError::InvalidAgentKey => Self::new(FaultKind::Invalid, error.to_string()),
            AuthError::NoSuchAgent => no_such_agent(),
            AuthError::NoSuchUser(_)
            | AuthError::NoSuchSession
            | AuthError::NoSuchJoinToken
            | AuthError::NoSuchApiToken => Self::new(FaultKind::NotFound, error.to_string()),
            AuthError::NameTaken(_)
            | AuthError::LastAdministrator(_)
            | AuthError::TooManyJoinTokens
            | AuthError::TooManyApiTokens
            | AuthError::ServiceAdministrator
            | AuthError::ServicePassword(_)
            | AuthError::NoServiceAccount(_) => Self::new(FaultKind::Conflict, error.to_string()),
            AuthError::Stale(_) => Self::new(
                FaultKind::Unavailable,
                "the tokens and agents cannot be read at the moment; try again shortly",
            )
            .caused_by(error),
            AuthError::NotYours
            | AuthError::OldPasswordNeeded
            | AuthError::WrongOldPassword
            | AuthError::TokensOfOthers
            | AuthError::TokenBeyondOwner(_) => Self::new(FaultKind::Forbidden, error.to_string()),
            AuthError::NotPassedOn(_) => Self::new(FaultKind::Backend, error.to_string()).caused_by(error),
            AuthError::NotAudited(_) => Self::new(FaultKind::Unavailable, error.to_string()).caused_by(error),
            AuthError::Busy => Self::new(FaultKind::Overloaded, TOO_MANY_LOGINS).caused_by(error),
            AuthError::QueueFull(wait) => Self::new(FaultKind::Overloaded, TOO_MANY_LOGINS)
                .retry_after(wait)
                .caused_by(error),
            AuthError::Contended => Self::new(
                FaultKind::Overloaded,
                "the record was changed by other requests at the same time; try again shortly",
            ),
            AuthError::Store(_) | AuthError::Bucket(_) | AuthError::Provision(_) | AuthError::Audit(_) => {
                Self::new(
                    FaultKind::Backend,
                    "the store of users and sessions is unreachable; try again shortly",
                )
                .caused_by(error)
            }
            other => Self::new(
                FaultKind::Internal,
                "the service failed to process this request; the cause is in its log",
            )
            .caused_by(other),
        }
    }
}
