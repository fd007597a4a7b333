//! Finds the VMs whose share of the stream of samples is full, so that NATS refuses their further samples, and reports them
//! as being above that limit.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use vmwatch_api::{
    agents::VmLimit,
    metrics::{SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX},
};
use vmwatch_bus::{
    Bus,
    jetstream::{JetStreamError, StreamSubjects},
};

use crate::events::Events;

/// Interval at which the shares are read.
const INTERVAL: Duration = Duration::from_secs(10);
/// Deadline of the request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(3);

/// Reports VMs with a full share until shutdown.
pub(crate) async fn follow(bus: Bus, events: Events, shutdown: CancellationToken) {
    loop {
        match shutdown.run_until_cancelled(read(&bus)).await {
            None => return,
            Some(Ok(subjects)) => full(&subjects)
                .filter_map(|subject| subject.strip_prefix(SAMPLE_SUBJECT_PREFIX)?.parse().ok())
                .for_each(|id| events.publish_over_limit(id, VmLimit::Waiting)),
            Some(Err(error)) => {
                debug!(%error, "reading the shares of VMs in the stream of samples failed; retrying");
            }
        }
        if shutdown.run_until_cancelled(sleep(INTERVAL)).await.is_none() {
            return;
        }
    }
}

async fn read(bus: &Bus) -> Result<StreamSubjects, JetStreamError> {
    let filter = format!("{SAMPLE_SUBJECT_PREFIX}*");
    bus.stream_subjects(SAMPLE_STREAM, &filter, DEADLINE).await
}

/// The subjects whose share is full. It counts as full from nine tenths on, because an agent whose samples are refused
/// pauses between its attempts.
fn full(subjects: &StreamSubjects) -> impl Iterator<Item = &str> {
    let most = subjects.most();
    let is_full = move |count: i64| most > 0 && count.saturating_mul(10) >= most.saturating_mul(9);
    let counts = subjects.counts();
    counts.filter_map(move |(subject, count)| is_full(count).then_some(subject))
}
