//! Publishes a part to the stream.

use std::{fmt, time::Duration};

use async_nats::{header::NATS_EXPECTED_STREAM, jetstream};
use tracing::{Instrument, field::Empty, info_span};
use vmwatch_api::metrics::{SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX};
use vmwatch_bus::{Bus, stream_requests::JetStreamError, trace_headers};

use crate::parts::Part;

/// Deadline for the stream's acknowledgement. It passes each time if the server forbids the subject, because the server
/// does not answer then.
const ACK_DEADLINE: Duration = Duration::from_secs(5);
/// The stream is at a limit, such as "maximum bytes exceeded" or "maximum messages per subject exceeded".
const STORE_FAILED: jetstream::ErrorCode = jetstream::ErrorCode::STREAM_STORE_FAILED;
/// Too many messages for the stream are queued in the server's memory.
const TOO_MANY_REQUESTS: jetstream::ErrorCode = jetstream::ErrorCode::STREAM_TOO_MANY_REQUESTS;

/// Whether a part was sent before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// It was not sent since this agent started.
    First,
    /// It was sent, and may have been stored although no acknowledgement came.
    Repeated,
}

/// Why a part was not acknowledged. Every cause may be temporary, so the part is kept.
#[derive(Debug)]
pub(crate) enum PublishError {
    /// There is no connection to NATS.
    Disconnected,
    /// No stream takes the subject.
    NoStream,
    /// The stream is full.
    Full(String),
    /// This VM has the maximum number of messages in the stream.
    ShareFull,
    /// The server temporarily accepts no more messages for the stream.
    Busy,
    /// The stream treated it as a duplicate of another message and did not store it.
    Duplicate,
    /// The server or the stream refused it.
    Refused(String),
    /// There was no answer before the deadline.
    Unanswered,
}

impl PublishError {
    /// The text for `/readyz`, which also identifies the kind of error.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Disconnected => "no connection to NATS: samples wait in the spool",
            Self::NoStream => {
                "the stream of samples does not exist yet (metrics-svc creates it): samples wait in the spool"
            }
            Self::Full(_) => "the stream of samples is full: samples wait in the spool",
            Self::ShareFull => {
                "this VM's share of the stream of samples is full: samples wait in the spool until metrics-svc has \
                 stored some"
            }
            Self::Busy => "NATS is busy and accepts no more samples: they wait in the spool",
            Self::Duplicate => {
                "the stream treated a new sample as a duplicate and did not store it; sending it again"
            }
            Self::Refused(_) => "NATS refuses samples (see the log): they wait in the spool",
            Self::Unanswered => {
                "NATS does not acknowledge samples (check the user's permission to publish): they wait in the spool"
            }
        }
    }
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match self {
            Self::Full(why) | Self::Refused(why) => write!(f, ": {why}"),
            _ => Ok(()),
        }
    }
}

/// Publishes a part and waits for the stream's acknowledgement.
///
/// The message has no id, because all VMs share the ids of the stream: one guest could cause another's sample to be
/// dropped as a duplicate. A part that is stored twice is harmless, because its rows have stable ids.
pub(crate) async fn publish(
    bus: Bus,
    subject: String,
    part: Part,
    attempt: Attempt,
) -> Result<(), PublishError> {
    // A message queued now would be sent after reconnecting, when the part has been sent again already.
    if !bus.is_connected() {
        return Err(PublishError::Disconnected);
    }
    // Follows OpenTelemetry's semantic conventions for messaging. metrics-svc links its batch to this span.
    let span = info_span!(
        "publish",
        otel.name = format!("publish {SAMPLE_SUBJECT_PREFIX}*"),
        otel.kind = "producer",
        otel.status_code = Empty,
        messaging.system = "nats",
        messaging.operation.name = "publish",
        messaging.operation.type = "send",
        messaging.destination.name = subject,
        messaging.message.id = part.id,
    );
    let mut headers = trace_headers(&span);
    // Ignores acknowledgements of any other stream that takes the subject.
    headers.insert(NATS_EXPECTED_STREAM, SAMPLE_STREAM);
    let stored = bus.publish_stored(subject, headers, part.body, ACK_DEADLINE);
    let outcome = match stored.instrument(span.clone()).await {
        Ok(stored) if stored.duplicate && attempt == Attempt::First => Err(PublishError::Duplicate),
        Ok(_) => Ok(()),
        Err(error) => Err(classify(error)),
    };
    if outcome.is_err() {
        span.record("otel.status_code", "ERROR");
    }
    outcome
}

fn classify(error: JetStreamError) -> PublishError {
    match error {
        JetStreamError::NoResponders => PublishError::NoStream,
        JetStreamError::Timeout => PublishError::Unanswered,
        JetStreamError::Refused(refusal) => classify_refusal(&refusal),
        JetStreamError::NotSent(error) => PublishError::Refused(error.to_string()),
        JetStreamError::Unreadable(error) => PublishError::Refused(error.to_string()),
    }
}

fn classify_refusal(refusal: &jetstream::Error) -> PublishError {
    match refusal.error_code() {
        // A full share has the same code as a full stream; only the text differs.
        STORE_FAILED if refusal.to_string().contains("per subject") => PublishError::ShareFull,
        STORE_FAILED => PublishError::Full(refusal.to_string()),
        TOO_MANY_REQUESTS => PublishError::Busy,
        _ => PublishError::Refused(refusal.to_string()),
    }
}
