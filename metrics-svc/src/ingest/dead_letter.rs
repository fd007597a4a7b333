//! Where samples go that can never be stored.

use std::time::Duration;

use async_nats::{
    HeaderMap,
    header::NATS_MESSAGE_ID,
    jetstream::{AckKind, Context, Message},
};
use metrics::counter;
use tracing::warn;
use vmwatch_api::metrics::{DEAD_LETTER_SUBJECT_PREFIX, SAMPLE_SUBJECT_PREFIX};

use super::batch::acknowledge;
use crate::MetricsError;

/// The header that says why the sample was refused.
pub const REASON: &str = "Vmwatch-Reason";
/// The header that says what it was published on.
pub const SUBJECT: &str = "Vmwatch-Subject";

/// JetStream answers in milliseconds or not at all.
const DEADLINE: Duration = Duration::from_secs(5);

/// A message whose dead letter could not be published is delivered again after this time.
const AGAIN: Duration = Duration::from_mins(1);

/// Refuses a message that was taken in: counts, logs and keeps it as a dead letter.
pub(super) async fn put_aside(jetstream: &Context, message: &Message, reason: &str) {
    counter!("vmwatch_samples_refused_total", "vm" => "other").increment(1);
    warn!(subject = %message.subject, reason, "a sample was refused; see `vmwatch-metrics dead-letters list`");
    keep(jetstream, message, reason).await;
}

/// To the dead letters, and only then out of the stream.
pub(super) async fn keep(jetstream: &Context, message: &Message, reason: &str) {
    match tokio::time::timeout(DEADLINE, publish(jetstream, message, reason)).await {
        Ok(Ok(())) => acknowledge(message, AckKind::Term).await,
        Ok(Err(error)) => {
            warn!(
                cause = error.cause(),
                "a dead letter could not be published; trying again"
            );
            acknowledge(message, AckKind::Nak(Some(AGAIN))).await;
        }
        Err(_) => {
            warn!("a dead letter was not acknowledged in time; trying again");
            acknowledge(message, AckKind::Nak(Some(AGAIN))).await;
        }
    }
}

async fn publish(jetstream: &Context, message: &Message, reason: &str) -> Result<(), MetricsError> {
    let stored = message.info().ok();
    let stored = stored.map(|info| (info.stream, info.stream_sequence));
    let headers = headers(&message.subject, reason, stored);
    let instance = message
        .subject
        .strip_prefix(SAMPLE_SUBJECT_PREFIX)
        .unwrap_or("unknown");
    let subject = format!("{DEAD_LETTER_SUBJECT_PREFIX}{instance}");
    let acknowledged = jetstream
        .publish_with_headers(subject, headers, message.payload.clone())
        .await
        .map_err(MetricsError::jetstream)?;
    acknowledged.await.map(drop).map_err(MetricsError::jetstream)
}

/// The headers of a dead letter. `stored` is the stream and the sequence of the message.
fn headers(subject: &str, reason: &str, stored: Option<(&str, u64)>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(REASON, reason.replace(['\r', '\n'], " "));
    headers.insert(SUBJECT, subject);
    if let Some((stream, sequence)) = stored {
        // One dead letter for one message, however often it is tried.
        headers.insert(NATS_MESSAGE_ID, format!("{stream}:{sequence}"));
    }
    headers
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn headers_are_their_golden_file() {
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
