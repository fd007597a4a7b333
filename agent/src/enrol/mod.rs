//! Enrolment: the agent registers the public key of its nkey at the gateway, with a join token. docs/agents.md describes it.

#![expect(
    missing_docs,
    reason = "the names of the errors and their fields are sufficient documentation"
)]

mod clone;
pub mod command;
mod error;
mod http;
mod identity;
mod platform;
mod start;
mod tls;

use std::{io::Read, path::Path};

use hyper::StatusCode;
use serde::Deserialize;
use vmwatch_api::{
    InstanceId,
    enrollment::{Enrolled, Enrollment, JoinToken, Platform, SecretText},
};

pub use error::{EXIT_CODES, EnrolError};
pub use identity::IdentityError;
pub use tls::TlsError;

pub(crate) use http::GatewayUrl;
pub(crate) use identity::IdentityDir;
pub(crate) use start::{Connection, StartError, connection};

use http::Answer;
use identity::Record;
use tls::CaFile;

use crate::config::{Timing, is_nats_url};

/// The route of the gateway.
const ROUTE: &str = "/api/v1/agents";
/// Maximum size of a file with a join token or certificate authorities.
const INPUT_BYTES: u64 = 256 * 1024;
/// Maximum number of characters of an error text that is shown.
const DETAIL_CHARS: usize = 300;
/// A clock difference, in seconds, from which on the user is warned.
const CLOCK_WARNING: i64 = 2;
/// Maximum number of URLs of NATS servers in an answer.
const MAX_URLS: usize = 16;

/// What is needed for an enrolment.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) gateway: GatewayUrl,
    pub(crate) ca_file: Option<CaFile>,
    pub(crate) token: JoinToken,
    pub(crate) instance_id: InstanceId,
    pub(crate) platform: Option<Platform>,
}

/// A completed enrolment.
#[derive(Debug)]
pub(crate) struct Enrolment {
    pub(crate) record: Record,
    /// What to tell the user about the VM's clock.
    pub(crate) clock_warning: Option<String>,
}

/// Registers this agent and stores its identity. An enrolment whose answer was lost can be repeated.
pub(crate) async fn enrol(request: Request, dir: &IdentityDir) -> Result<Enrolment, EnrolError> {
    let locked = dir.lock()?;
    let key = locked.key_for(&request.instance_id, &request.token.id)?;
    let enrollment = Enrollment {
        token: SecretText::new(&request.token),
        instance_id: request.instance_id,
        public_key: key.public().clone(),
        platform: request.platform,
    };
    let json = serde_json::to_vec(&enrollment).map_err(|error| EnrolError::Usage(error.to_string()))?;
    let answer = http::post(&request.gateway, ROUTE, json, request.ca_file.as_ref()).await?;
    let clock_warning = clock_warning(answer.clock_ahead);
    let record = Record {
        answer: accepted(&answer, &enrollment.instance_id)?,
        instance_id: enrollment.instance_id,
        public_key: enrollment.public_key,
        platform: enrollment.platform,
        join_token: request.token.id,
    };
    locked.store(&record)?;
    Ok(Enrolment {
        record,
        clock_warning,
    })
}

fn clock_warning(ahead: i64) -> Option<String> {
    let direction = if ahead > 0 { "ahead of" } else { "behind" };
    let difference = ahead.unsigned_abs();
    (ahead.abs() > CLOCK_WARNING).then(|| {
        format!(
            "the clock of this VM is at least {difference} s {direction} the gateway's, so the times of its samples are wrong; \
             synchronize it, for example with chrony"
        )
    })
}

/// Decodes and checks the answer to a successful request.
fn accepted(answer: &Answer, instance_id: &InstanceId) -> Result<Enrolled, EnrolError> {
    if !matches!(answer.status, StatusCode::OK | StatusCode::CREATED) {
        return Err(refusal(answer));
    }
    let enrolled: Enrolled =
        serde_json::from_slice(&answer.body).map_err(|error| EnrolError::Answer(error.to_string()))?;
    let urls = &enrolled.nats_urls;
    let problem = if enrolled.instance_id != *instance_id {
        Some("it has another instance id".to_owned())
    } else if urls.is_empty() || urls.len() > MAX_URLS || !urls.iter().all(|url| is_nats_url(url)) {
        Some("it has no valid URLs of NATS servers".to_owned())
    } else if !tls::has_only_certificates(&enrolled.ca_certificates) {
        Some("its certificate authorities are not PEM certificates".to_owned())
    } else {
        Timing::enrolled(&enrolled).err()
    };
    problem.map_or(Ok(enrolled), |problem| Err(EnrolError::Answer(problem)))
}

fn refusal(answer: &Answer) -> EnrolError {
    let (status, detail) = (answer.status.as_u16(), detail(&answer.body));
    match status {
        401 | 403 => EnrolError::Token(detail),
        409 => EnrolError::HasAgent(detail),
        429 => EnrolError::Throttled {
            wait: answer.retry_after,
            detail,
        },
        400 | 413 | 415 | 422 => EnrolError::Refused { status, detail },
        500..=599 => EnrolError::Unavailable { status, detail },
        300..=399 => EnrolError::Answer(format!("HTTP status {status}, a redirection")),
        _ => EnrolError::Answer(format!("HTTP status {status}")),
    }
}

/// The detail of a problem document (RFC 9457), without characters that could control a terminal.
fn detail(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Problem {
        detail: String,
    }
    let detail = serde_json::from_slice(body).map_or_else(|_| String::new(), |Problem { detail }| detail);
    let printable = detail.chars().filter(|letter| !letter.is_control());
    printable.take(DETAIL_CHARS).collect()
}

/// Reads a join token from a file, or from standard input if the path is `-`.
fn read_token(path: &Path) -> Result<JoinToken, EnrolError> {
    let content = "join token";
    let bytes = if path == Path::new("-") {
        read_bounded(std::io::stdin().lock())
    } else {
        read_file(path)
    };
    let path = path.to_owned();
    let bytes = bytes.map_err(|source| EnrolError::Input {
        path: path.clone(),
        content,
        source,
    })?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim();
    if text.is_empty() {
        return Err(EnrolError::NoInput { path, content });
    }
    text.parse()
        .map_err(|error: vmwatch_api::enrollment::InvalidJoinToken| EnrolError::Token(error.to_string()))
}

fn read_ca_file(path: &Path) -> Result<CaFile, EnrolError> {
    let read = read_file(path).map_err(|source| EnrolError::Input {
        path: path.to_owned(),
        content: "gateway's certificate authorities",
        source,
    });
    let path = path.to_owned();
    read.map(|pem| CaFile { path, pem })
}

fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    read_bounded(std::fs::File::open(path)?)
}

fn read_bounded(source: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(INPUT_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > INPUT_BYTES {
        let text = format!("it has more than {INPUT_BYTES} bytes");
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}
