//! Publishes dead letters: messages with samples that can never be stored.

use std::time::Duration;

use async_nats::{
    HeaderMap,
    header::NATS_MESSAGE_ID,
    jetstream::{AckKind, Message},
};
use metrics::counter;
use tracing::warn;
use vmwatch_api::metrics::{CONTENT_TYPE, DEAD_LETTER_SUBJECT_PREFIX};
use vmwatch_bus::Bus;

use super::{
    batch::acknowledge,
    message::{content_type, instance_of},
};
use crate::MetricsError;

/// Header with the reason why the sample was refused.
pub const REASON: &str = "Vmwatch-Reason";
/// Header with the subject on which the sample was published.
pub const SUBJECT: &str = "Vmwatch-Subject";

/// Deadline of a JetStream request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);

/// Redelivery delay of a message whose dead letter could not be published.
const REDELIVERY_DELAY: Duration = Duration::from_mins(1);

/// Refuses a message that had passed the first checks: counts and logs the refusal, and publishes the message as a dead
/// letter.
pub(super) async fn refuse(bus: &Bus, message: &Message, reason: &str) {
    counter!("vmwatch_samples_refused_total", "vm" => "other").increment(1);
    warn!(subject = %message.subject, reason, "sample refused; see `vmwatch-metrics dead-letters list`");
    publish_then_remove(bus, message, reason).await;
}

/// Publishes the dead letter, then removes the message from the stream of samples.
pub(super) async fn publish_then_remove(bus: &Bus, message: &Message, reason: &str) {
    match publish(bus, message, reason).await {
        Ok(()) => acknowledge(message, AckKind::Term).await,
        Err(error) => {
            warn!(cause = error.cause(), "publishing a dead letter failed; retrying");
            acknowledge(message, AckKind::Nak(Some(REDELIVERY_DELAY))).await;
        }
    }
}

/// Publishes the dead letter of a message some of whose rows were refused, while the others are stored.
pub(super) async fn publish_copy(bus: &Bus, message: &Message, reason: &str) {
    if let Err(error) = publish(bus, message, reason).await {
        counter!("vmwatch_dead_letters_dropped_total").increment(1);
        warn!(
            cause = error.cause(),
            "publishing a dead letter failed; the refused rows are lost"
        );
    }
}

async fn publish(bus: &Bus, message: &Message, reason: &str) -> Result<(), MetricsError> {
    let stored = message.info().ok();
    let stored = stored.map(|info| (info.stream, info.stream_sequence));
    let mut headers = headers(&message.subject, reason, stored);
    // A replayed sample needs the `Content-Type` that it had.
    if let Some(content_type) = content_type(message) {
        headers.insert(CONTENT_TYPE, content_type);
    }
    let instance = instance_of(&message.subject).unwrap_or("unknown");
    let subject = format!("{DEAD_LETTER_SUBJECT_PREFIX}{instance}");
    let stored = bus.publish_stored(subject, headers, message.payload.clone(), DEADLINE);
    stored.await.map(drop).map_err(MetricsError::jetstream)
}

/// Headers of a dead letter. `stored` is the message's stream and its sequence number there.
fn headers(subject: &str, reason: &str, stored: Option<(&str, u64)>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(REASON, reason.replace(['\r', '\n'], " "));
    headers.insert(SUBJECT, subject);
    if let Some((stream, sequence)) = stored {
        // This id lets JetStream discard duplicates, so that a message gets one dead letter even if it is published
        // several times.
        headers.insert(NATS_MESSAGE_ID, format!("{stream}:{sequence}"));
    }
    headers
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn dead_letter_headers_match_golden_file() {
        const GOLDEN: &str = include_str!("../../../tests/golden/forms/dead-letter-headers.json");
        let golden: BTreeMap<String, String> = serde_json::from_str(GOLDEN).unwrap();
        let written = headers(
            "vmwatch.v1.samples.vm-1",
            "cpu_util:\nmust be a number",
            Some(("VMWATCH_SAMPLES", 17)),
        );
        let written: BTreeMap<_, _> = written
            .iter()
            .map(|(name, values)| (name.to_string(), values[0].to_string()))
            .collect();
        assert_eq!(written, golden);
    }
}
