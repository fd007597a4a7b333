//! Publishes samples in the stream of samples.

use std::time::Duration;

use async_nats::HeaderMap;
use futures::{StreamExt, stream};
use metrics::counter;
use tokio::time::Instant;
use tracing::warn;
use vmwatch_api::hypervisor_samples::{HypervisorSample, hypervisor_sample_subject};
use vmwatch_bus::{Bus, jetstream::JetStreamError};

/// Maximum number of samples of a hypervisor that wait for their acknowledgement.
const CONCURRENT: usize = 64;

/// Why a sample was not published.
#[derive(Debug, thiserror::Error)]
enum PublishError {
    #[error("there is no connection to NATS")]
    NotConnected,
    #[error("the time for publishing the samples of this interval is over")]
    Late,
    #[error("the sample could not be encoded")]
    Encode(#[from] serde_json::Error),
    #[error("the sample was not stored: {0}")]
    JetStream(#[from] JetStreamError),
}

/// Publishes the samples of a hypervisor within the limit. Those that could not be published are counted and logged.
pub(super) async fn all(bus: &Bus, hypervisor: &str, samples: Vec<HypervisorSample>, limit: Duration) {
    let end = Instant::now() + limit;
    let publishing = stream::iter(samples).map(|sample| one(bus, sample, end));
    let mut publishing = publishing.buffer_unordered(CONCURRENT);
    let (mut stored, mut lost, mut cause) = (0, 0, None);
    while let Some(done) = publishing.next().await {
        match done {
            Ok(()) => stored += 1,
            Err(error) => {
                lost += 1;
                cause = Some(error);
            }
        }
    }
    for (result, count) in [("stored", stored), ("lost", lost)] {
        counter!("vmwatch_hypervisor_samples_total", "hypervisor" => hypervisor.to_owned(), "result" => result)
            .increment(count);
    }
    if let Some(error) = cause {
        warn!(hypervisor, lost, stored, %error, "publishing measures of VMs failed; those of this interval are lost");
    }
}

async fn one(bus: &Bus, sample: HypervisorSample, end: Instant) -> Result<(), PublishError> {
    // The client would keep the sample until it is connected again, although it counts as lost.
    if !bus.is_connected() {
        return Err(PublishError::NotConnected);
    }
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(PublishError::Late);
    }
    let body = serde_json::to_vec(&sample)?.into();
    let subject = hypervisor_sample_subject(&sample.instance_id);
    bus.publish_stored(subject, HeaderMap::new(), body, left).await?;
    Ok(())
}
