//! Errors of commands, and the exit code of each kind.

use std::{fmt::Write as _, io, path::PathBuf};

use crate::{text::printable, time::InvalidMoment};

/// Exit codes, as `vmwatch --help` and docs/integrations.md list them. All but the first are those of `sysexits.h`.
pub(crate) mod exit {
    pub(crate) const FAILED: u8 = 1;
    pub(crate) const USAGE: u8 = 64;
    pub(crate) const REFUSED: u8 = 65;
    pub(crate) const NOT_FOUND: u8 = 66;
    pub(crate) const UNAVAILABLE: u8 = 69;
    pub(crate) const NO_PERMISSION: u8 = 77;
}

/// Description of the exit codes for `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0   success
  1   the operation failed, or an unexpected error occurred
  64  invalid arguments or configuration
  65  refused: the state of the VM does not allow the action, or the change conflicts with another one
  66  not found, or outside of your scope
  69  the gateway or a service is unreachable or overloaded; try again later
  77  not signed in, or your role or token does not allow the request";

#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Moment(#[from] InvalidMoment),
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("not signed in to {0}; run `vmwatch login`, or set VMWATCH_TOKEN_FILE")]
    NoToken(String),
    #[error("{url} cannot be reached: {reason}")]
    Unreachable { url: String, reason: String },
    #[error("{0} did not answer in time")]
    Timeout(String),
    /// A problem document of the gateway, or another answer that is no success.
    #[error("{}", problem(detail, *retry_after, request_id.as_deref()))]
    Problem {
        status: u16,
        detail: String,
        retry_after: Option<u64>,
        request_id: Option<String>,
    },
    #[error("unexpected answer: {0}; is this the address of a gateway of vmwatch?")]
    Answer(String),
    #[error("there is no VM with the id or name \"{0}\"")]
    NoSuchVm(String),
    #[error("the operation {id} failed: {reason}")]
    OperationFailed { id: String, reason: String },
    #[error("the operation {0} has not ended; follow it with `vmwatch operations`")]
    OperationOpen(String),
    #[error("the terminal cannot be used: {0}")]
    Terminal(io::Error),
    #[error("writing the output failed: {0}")]
    Output(io::Error),
}

impl CliError {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Moment(_) | Self::File { .. } => exit::USAGE,
            Self::NoToken(_) => exit::NO_PERMISSION,
            Self::NoSuchVm(_) => exit::NOT_FOUND,
            Self::Unreachable { .. } | Self::Timeout(_) => exit::UNAVAILABLE,
            Self::Problem { status, .. } => match status {
                400 | 405 | 413 | 415 | 422 => exit::USAGE,
                401 | 403 => exit::NO_PERMISSION,
                404 => exit::NOT_FOUND,
                409 => exit::REFUSED,
                408 | 429 | 502..=504 => exit::UNAVAILABLE,
                _ => exit::FAILED,
            },
            // The program that reads the output, such as `head`, has read enough.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Answer(_)
            | Self::OperationFailed { .. }
            | Self::OperationOpen(_)
            | Self::Terminal(_)
            | Self::Output(_) => exit::FAILED,
        }
    }

    /// Whether the same request may succeed later, so that a stream connects again.
    pub(crate) const fn is_temporary(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Timeout(_) => true,
            Self::Problem { status, .. } => matches!(status, 408 | 429 | 500 | 502..=504),
            _ => false,
        }
    }
}

fn problem(detail: &str, retry_after: Option<u64>, request_id: Option<&str>) -> String {
    // Writing to a String cannot fail.
    let mut text = printable(detail);
    if let Some(seconds) = retry_after {
        let _ = write!(text, "; try again in {seconds} s");
    }
    if let Some(id) = request_id {
        let _ = write!(text, " (request {})", printable(id));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_failure_has_its_exit_code() {
        let problem = |status| CliError::Problem {
            status,
            detail: String::new(),
            retry_after: None,
            request_id: None,
        };
        let codes =
            [400, 401, 403, 404, 409, 422, 429, 500, 502, 503, 504].map(|status| problem(status).exit_code());
        assert_eq!(codes, [64, 77, 77, 66, 65, 64, 69, 1, 69, 69, 69]);
        let closed = CliError::Output(io::ErrorKind::BrokenPipe.into());
        assert_eq!(closed.exit_code(), 0);
        let full = CliError::Output(io::ErrorKind::StorageFull.into());
        assert_eq!(full.exit_code(), 1);
    }

    #[test]
    fn problem_names_the_request_and_the_wait() {
        let error = CliError::Problem {
            status: 429,
            detail: "too many\u{1b}[2J requests".to_owned(),
            retry_after: Some(3),
            request_id: Some("5e".to_owned()),
        };
        assert_eq!(
            error.to_string(),
            "too many\u{fffd}[2J requests; try again in 3 s (request 5e)"
        );
        for code in [1, 64, 65, 66, 69, 77] {
            assert!(EXIT_CODES.contains(&format!("\n  {code} ")), "{code}");
        }
    }
}
