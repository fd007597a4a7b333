//! Where samples go that can never be stored.

use std::time::Duration;

use async_nats::{
    HeaderMap,
    jetstream::{AckKind, Context, Message},
};
use metrics::counter;
use shared::api::metrics::{DEAD_LETTER_SUBJECT_PREFIX, SAMPLE_SUBJECT_PREFIX};
use tracing::warn;

use super::batch::acknowledge;
use crate::MetricsError;

/// The header that says why the sample was refused.
pub const REASON: &str = "Vmwatch-Reason";
/// The header that says what it was published on.
pub const SUBJECT: &str = "Vmwatch-Subject";

/// JetStream answers in milliseconds or not at all.
const DEADLINE: Duration = Duration::from_secs(5);

/// To the dead letters, and only then out of the stream.
pub(super) async fn put_aside(jetstream: &Context, message: &Message, reason: &str) {
    counter!("vmwatch_samples_refused_total").increment(1);
    warn!(subject = %message.subject, reason, "a sample was refused; see `vmwatch-metrics dead-letters list`");
    match tokio::time::timeout(DEADLINE, publish(jetstream, message, reason)).await {
        Ok(Ok(())) => acknowledge(message, AckKind::Term).await,
        // Not acknowledged: it is delivered again, and put aside then.
        Ok(Err(error)) => warn!(
            cause = error.cause(),
            "a refused sample could not be put aside yet"
        ),
        Err(_) => warn!("a refused sample could not be put aside in time"),
    }
}

async fn publish(jetstream: &Context, message: &Message, reason: &str) -> Result<(), MetricsError> {
    let mut headers = HeaderMap::new();
    headers.insert(REASON, reason.replace(['\r', '\n'], " "));
    headers.insert(SUBJECT, message.subject.as_str());
    if let Ok(info) = message.info() {
        // The same message is put aside once, however often it is tried.
        headers.insert("Nats-Msg-Id", format!("{}:{}", info.stream, info.stream_sequence));
    }
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
