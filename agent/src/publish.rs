//! Publishes a sample part to the JetStream stream.

use std::{fmt, time::Duration};

use async_nats::{HeaderMap, header::NATS_EXPECTED_STREAM, jetstream};
use tracing::{Instrument, field::Empty, info_span};
use vmwatch_api::{
    agents::{RUN_ID, RunId, SENT_AT, UTC_OFFSET},
    metrics::{CONTENT_TYPE, SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX},
    time::{UtcOffset, unix_millis},
};
use vmwatch_blocks::SAMPLE_CONTENT_TYPE;
use vmwatch_bus::{Bus, jetstream::JetStreamError, trace_headers};

use crate::{AgentError, parts::Part};

/// Time limit for JetStream's acknowledgement. If the agent may not publish to the subject, NATS does not answer, so
/// each attempt takes this long.
const ACK_DEADLINE: Duration = Duration::from_secs(5);
/// JetStream's error code for a stream that has reached a limit. The text of the error says which one, such as "maximum
/// bytes exceeded" or "maximum messages per subject exceeded".
const STORE_FAILED: jetstream::ErrorCode = jetstream::ErrorCode::STREAM_STORE_FAILED;
/// JetStream's error code for a stream that has too many messages queued in the NATS server's memory.
const TOO_MANY_REQUESTS: jetstream::ErrorCode = jetstream::ErrorCode::STREAM_TOO_MANY_REQUESTS;
/// JetStream's error code for a message that is larger than the stream accepts.
const TOO_LARGE: jetstream::ErrorCode = jetstream::ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM;

/// The values that identify this agent process in the headers of each message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    run_id: RunId,
    utc_offset: UtcOffset,
}

impl Origin {
    /// Creates the origin of a process that starts now.
    pub(crate) fn new(utc_offset: UtcOffset) -> Result<Self, AgentError> {
        let mut bits = [0; 8];
        getrandom::fill(&mut bits).map_err(AgentError::Random)?;
        Ok(Self {
            run_id: RunId(u64::from_ne_bytes(bits)),
            utc_offset,
        })
    }

    /// Adds the headers of a message that is sent now.
    fn add_headers(self, headers: &mut HeaderMap) {
        headers.insert(SENT_AT, unix_millis().to_string());
        headers.insert(UTC_OFFSET, self.utc_offset.to_string());
        headers.insert(RUN_ID, self.run_id.to_header());
    }
}

/// Whether a sample part was sent before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// The sample part has not been sent since this agent started.
    First,
    /// The sample part was sent before, and JetStream may have stored it although no acknowledgement arrived.
    Repeated,
}

/// Why a sample part was not acknowledged. Every cause except [`Self::TooLarge`] may be temporary, so the part is kept.
#[derive(Debug)]
pub(crate) enum PublishError {
    /// The agent has no connection to NATS.
    Disconnected,
    /// No JetStream stream stores messages of the subject.
    NoStream,
    /// The sample stream is full.
    Full(String),
    /// This VM already has the maximum number of messages in the sample stream.
    ShareFull,
    /// The NATS server temporarily accepts no more messages for the sample stream.
    Busy,
    /// JetStream treated the message as a duplicate of another one and did not store it.
    Duplicate,
    /// NATS never accepts a message of this size.
    TooLarge,
    /// NATS refused the message.
    Refused(String),
    /// No acknowledgement arrived before the deadline.
    Unanswered,
}

impl PublishError {
    /// The reason shown by `/readyz`. It also identifies the kind of failure.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Disconnected => "no connection to NATS; samples wait in the spool",
            Self::NoStream => {
                "the sample stream does not exist yet (metrics-svc creates it); samples wait in the spool"
            }
            Self::Full(_) => "the sample stream is full; samples wait in the spool",
            Self::ShareFull => {
                "this VM has the maximum number of messages in the sample stream; samples wait in the spool until metrics-svc has \
                 stored some"
            }
            Self::Busy => "NATS is busy and accepts no samples at the moment; samples wait in the spool",
            Self::Duplicate => {
                "JetStream treated a new sample as a duplicate and did not store it; sending it again"
            }
            Self::TooLarge => "NATS does not accept a sample part of this size",
            Self::Refused(_) => "NATS refuses samples (see the log); samples wait in the spool",
            Self::Unanswered => {
                "NATS does not acknowledge samples (check the NATS user's permission to publish); samples wait in the spool"
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

/// Publishes a sample part and waits for JetStream's acknowledgement.
///
/// The message has no `Nats-Msg-Id`, because all VMs share the message ids of the stream: a guest could use another
/// guest's id and so cause that guest's sample to be dropped as a duplicate. A sample part that is stored twice is
/// harmless, because its rows have deterministic ids.
pub(crate) async fn publish(
    bus: Bus,
    subject: String,
    origin: Origin,
    part: Part,
    attempt: Attempt,
) -> Result<(), PublishError> {
    // Publishing without a connection fails immediately: the client would queue the message and send it after the
    // reconnection, when the agent has already sent the sample part again.
    if !bus.is_connected() {
        return Err(PublishError::Disconnected);
    }
    // The span follows OpenTelemetry's semantic conventions for messaging. metrics-svc links its batches to it.
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
    // With this header, only the sample stream acknowledges the message, even if another stream also stores the
    // subject.
    headers.insert(NATS_EXPECTED_STREAM, SAMPLE_STREAM);
    headers.insert(CONTENT_TYPE, SAMPLE_CONTENT_TYPE);
    origin.add_headers(&mut headers);
    // If the limit of the agents' account is lower than that of the server, the server closes the connection.
    let mut oversized = bus.oversized_messages();
    let stored = bus.publish_stored(subject, headers, part.body, ACK_DEADLINE);
    let stored = tokio::select! {
        stored = stored.instrument(span.clone()) => stored,
        Ok(()) = oversized.changed() => Err(JetStreamError::TooLarge),
    };
    let outcome = match stored {
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
        JetStreamError::TooLarge => PublishError::TooLarge,
        JetStreamError::Refused(refusal) => classify_refusal(&refusal),
        JetStreamError::NotSent(error) | JetStreamError::Unreadable(error) => {
            PublishError::Refused(error.to_string())
        }
        other => PublishError::Refused(other.to_string()),
    }
}

fn classify_refusal(refusal: &jetstream::Error) -> PublishError {
    match refusal.error_code() {
        // A VM's limit and the stream's limit have the same error code; only the text of the error differs.
        STORE_FAILED if refusal.to_string().contains("per subject") => PublishError::ShareFull,
        STORE_FAILED => PublishError::Full(refusal.to_string()),
        TOO_MANY_REQUESTS => PublishError::Busy,
        TOO_LARGE => PublishError::TooLarge,
        _ => PublishError::Refused(refusal.to_string()),
    }
}
