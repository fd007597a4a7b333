//! Why an enrolment failed, with the exit codes of `vmwatch-agent enroll`.

use std::{path::PathBuf, time::Duration};

use super::{identity::IdentityError, tls::TlsError};

/// Why an enrolment failed, and what to do. The texts never contain the join token.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("{0}")]
    Usage(String),
    #[error("{file} cannot be read: {source}; give a file with the {content}", file = path.display())]
    Input {
        path: PathBuf,
        content: &'static str,
        source: std::io::Error,
    },
    #[error("{}: contains no {content}", path.display())]
    NoInput { path: PathBuf, content: &'static str },
    #[error(
        "the host name {host} cannot be resolved ({source}); check the URL, and the DNS servers of this VM"
    )]
    Dns { host: String, source: std::io::Error },
    #[error(
        "no connection to {address} ({source}); check that the gateway runs and that no firewall blocks the port"
    )]
    Connect { address: String, source: std::io::Error },
    #[error(transparent)]
    Tls(TlsError),
    #[error(
        "the certificate of {host} is not valid at the time of this VM ({source}); check the clock of this VM, then the \
         certificate"
    )]
    Clock { host: String, source: std::io::Error },
    #[error("the gateway did not answer within {} s; check that it is ready, then try again", .0.as_secs())]
    Timeout(Duration),
    #[error("the connection to the gateway broke off ({0}); try again")]
    Interrupted(#[source] hyper::Error),
    #[error(
        "the gateway is not available (HTTP status {status}{}); check that it and auth-svc are ready, then try again",
        in_words(detail)
    )]
    Unavailable { status: u16, detail: String },
    #[error("the gateway limits enrolments{}; try again in {} s", in_words(detail), wait.as_secs())]
    Throttled { wait: Duration, detail: String },
    #[error("the join token was refused{}; ask an administrator of vmwatch for a new one", in_words(.0))]
    Token(String),
    #[error("this VM has an agent already{}; to replace it, use a join token that allows replacement", in_words(.0))]
    HasAgent(String),
    #[error(
        "the gateway refused the request (HTTP status {status}{}); check the instance id and the versions of agent and \
             gateway",
        in_words(detail)
    )]
    Refused { status: u16, detail: String },
    #[error("this is not the answer of a vmwatch gateway: {0}; check the URL")]
    Answer(String),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("this process cannot switch to the owner of {} ({source})", path.display())]
    User { path: PathBuf, source: std::io::Error },
}

/// The detail of an error in an answer, as part of a sentence.
fn in_words(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(": {}", detail.trim_end_matches('.'))
    }
}

/// What `--help` says about the exit codes.
pub const EXIT_CODES: &str = "Exit codes of `enroll`:
  0   enrolled
  64  an argument or a setting is invalid
  65  the gateway refused the request, for example because of the instance id
  66  a file cannot be read or is empty
  68  the gateway's host name cannot be resolved (DNS)
  69  the gateway cannot be reached, or did not answer: connection refused, port blocked, or not ready
  73  the identity folder cannot be written, or another enrolment of this VM is running
  75  the gateway limits enrolments; try again later
  76  TLS: the gateway's certificate is not trusted
  77  the join token was refused: wrong, expired, used up, revoked or not for this VM
  79  this VM has an agent already
  80  clock: the gateway's certificate is not valid at the time of this VM
  81  the answer is not that of a vmwatch gateway";

impl EnrolError {
    /// The exit code of `enroll`; 64 to 77 have the meaning of sysexits.h.
    pub const fn exit_code(&self) -> i32 {
        match self {
            Self::Usage(_) => 64,
            Self::Refused { .. } => 65,
            Self::Input { .. } | Self::NoInput { .. } => 66,
            Self::Dns { .. } => 68,
            Self::Connect { .. } | Self::Timeout(_) | Self::Interrupted(_) | Self::Unavailable { .. } => 69,
            Self::Identity(_) | Self::User { .. } => 73,
            Self::Throttled { .. } => 75,
            Self::Tls(_) => 76,
            Self::Token(_) => 77,
            Self::HasAgent(_) => 79,
            Self::Clock { .. } => 80,
            Self::Answer(_) => 81,
        }
    }

    /// Whether the same request may succeed later without a change by an administrator.
    pub(crate) const fn is_temporary(&self) -> bool {
        matches!(self.exit_code(), 68 | 69 | 75)
    }
}
