//! Handing a part to the stream.

use std::{fmt, time::Duration};

use async_nats::jetstream::{
    self,
    context::{PublishError, PublishErrorKind},
    message::PublishMessage,
};
use tracing::{Instrument, field::Empty, info_span};
use vmwatch_api::metrics::{SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX};
use vmwatch_bus::{Bus, trace_headers};

use crate::parts::Part;

/// How long the stream may take to acknowledge. A server that forbids the subject answers nothing: then this passes each
/// time.
const ACK_DEADLINE: Duration = Duration::from_secs(5);
/// The stream is at a limit: "maximum bytes exceeded", "maximum messages per subject exceeded" and the like.
const STORE_FAILED: jetstream::ErrorCode = jetstream::ErrorCode::STREAM_STORE_FAILED;
/// Too many messages wait for the stream in the server's memory.
const TOO_MANY_REQUESTS: jetstream::ErrorCode = jetstream::ErrorCode::STREAM_TOO_MANY_REQUESTS;

/// Whether a part was sent before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// Not since this agent started.
    First,
    /// Yes, and it may have been stored although no acknowledgement came.
    Repeated,
}

/// Why a part was not acknowledged. Each may pass, and the part is kept.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// There is no connection.
    Away,
    /// Nothing takes the subject.
    NoStream,
    /// The stream is at its limit.
    Full(String),
    /// This VM has as many messages in the stream as one VM may have.
    ShareFull,
    /// The server takes no more messages for the stream at this moment.
    Busy,
    /// The stream took it for a repetition of another message and did not store it.
    Duplicate,
    /// The server or the stream refused it.
    Refused(String),
    /// No answer came.
    Unanswered,
}

impl Trouble {
    /// For `/readyz`, and to tell one trouble from the next.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Away => "no connection to NATS: samples wait in the spool",
            Self::NoStream => {
                "there is no stream of samples yet (metrics-svc makes it): samples wait in the spool"
            }
            Self::Full(_) => "the stream of samples is full: samples wait in the spool",
            Self::ShareFull => {
                "this VM's share of the stream of samples is full: samples wait in the spool until metrics-svc has \
                 stored some"
            }
            Self::Busy => "NATS takes no more samples at this moment: they wait in the spool",
            Self::Duplicate => {
                "the stream took a new sample for a repetition and did not store it; sending it again"
            }
            Self::Refused(_) => "NATS refuses samples (see the log): they wait in the spool",
            Self::Unanswered => {
                "NATS acknowledges no sample (may this user publish to its subject?): they wait in the spool"
            }
        }
    }
}

impl fmt::Display for Trouble {
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
/// It has no message id: the stream's ids are shared by all VMs, so that one guest could have another's sample dropped as
/// a repetition. A part that is stored twice is harmless, because its rows have ids of their own.
pub(crate) async fn publish(bus: Bus, subject: String, part: Part, attempt: Attempt) -> Result<(), Trouble> {
    // What is queued now would be sent after the reconnect, when it has been sent again already.
    if !bus.is_connected() {
        return Err(Trouble::Away);
    }
    // By OpenTelemetry's semantic conventions for messaging. metrics-svc links its batch to this span.
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
    let message = PublishMessage::build()
        .headers(trace_headers(&span))
        .payload(part.body)
        // An acknowledgement of any other stream that takes the subject as well would mean nothing.
        .expected_stream(SAMPLE_STREAM);
    let acknowledged = async { bus.jetstream().send_publish(subject, message).await?.await };
    let acknowledged = tokio::time::timeout(ACK_DEADLINE, acknowledged).instrument(span.clone());
    let outcome = match acknowledged.await {
        Ok(Ok(stored)) if stored.duplicate && attempt == Attempt::First => Err(Trouble::Duplicate),
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(trouble(&error)),
        Err(_) => Err(Trouble::Unanswered),
    };
    if outcome.is_err() {
        span.record("otel.status_code", "ERROR");
    }
    outcome
}

fn trouble(error: &PublishError) -> Trouble {
    let refusal =
        std::error::Error::source(error).and_then(|source| source.downcast_ref::<jetstream::Error>());
    match error.kind() {
        PublishErrorKind::StreamNotFound => Trouble::NoStream,
        PublishErrorKind::TimedOut => Trouble::Unanswered,
        PublishErrorKind::BrokenPipe => Trouble::Away,
        _ => match refusal {
            Some(refusal) => refused(refusal),
            None => Trouble::Refused(error.to_string()),
        },
    }
}

fn refused(refusal: &jetstream::Error) -> Trouble {
    match refusal.error_code() {
        // The code is that of a full stream; only the text tells the two apart.
        STORE_FAILED if refusal.to_string().contains("per subject") => Trouble::ShareFull,
        STORE_FAILED => Trouble::Full(refusal.to_string()),
        TOO_MANY_REQUESTS => Trouble::Busy,
        _ => Trouble::Refused(refusal.to_string()),
    }
}
