//! Stores the status messages of agents in a KV bucket, which every replica follows.
//!
//! Each message goes to one replica. It is written only if it differs from the stored one, because each agent sends its
//! status again after each connection. A message that is lost is only out of date: the agent sends the next one within
//! about an hour.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::{HeaderMap, Message, jetstream::stream::Config};
use bytes::Bytes;
use futures::StreamExt;
use metrics::counter;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::{
    InstanceId, Service,
    agents::{AgentStatus, STATUS_BUCKET, STATUS_SUBJECTS, status_instance},
};
use vmwatch_bus::{
    Bus,
    follow::Follower,
    jetstream::Bucket,
    provision::{BucketConfig, ensure_stream},
    vms::StatusTable,
};

use crate::{MetricsError, config::StreamSettings};

/// Maximum size of the KV bucket. A status takes less than 1 KB.
const BUCKET_BYTES: i64 = 64 << 20;
/// Maximum size of a message. Five texts of 128 bytes, each byte escaped, take less.
const MESSAGE_BYTES: usize = 4096;
/// Deadline of a JetStream request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(3);
/// A copy in memory is stale if the KV bucket was last confirmed to be current longer ago than this.
const STALE_AFTER: Duration = Duration::from_secs(10);
/// Minimum interval between two writes of a VM's status, so that one guest cannot delay those of others.
const MIN_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of VMs whose last write is remembered.
const MAX_RECENT: usize = 10_000;
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Receives and stores the status messages of agents.
pub(crate) struct AgentStatuses {
    bus: Bus,
    bucket: Bucket,
    pub(crate) table: Follower<StatusTable>,
}

/// The configuration of the KV bucket.
pub(crate) fn bucket(settings: &StreamSettings) -> Config {
    BucketConfig {
        name: STATUS_BUCKET,
        description: "status of agents: version and system",
        max_age: Duration::ZERO,
        max_bytes: BUCKET_BYTES,
        replicas: settings.replicas,
    }
    .into()
}

/// Creates the KV bucket if it is missing.
pub(crate) async fn prepare(bus: &Bus, settings: &StreamSettings) -> Result<(), MetricsError> {
    ensure_stream(bus, Service::Metrics, &bucket(settings)).await?;
    Ok(())
}

impl AgentStatuses {
    /// Starts following the KV bucket until shutdown, even if it does not exist yet.
    pub(crate) fn new(bus: &Bus, shutdown: &CancellationToken) -> Self {
        let table = StatusTable::default();
        Self {
            bus: bus.clone(),
            bucket: Bucket::new(bus, STATUS_BUCKET, DEADLINE),
            table: Follower::start(bus, STATUS_BUCKET, STALE_AFTER, table, shutdown.clone()),
        }
    }

    /// Deletes the status of a removed VM.
    pub(crate) async fn forget(&self, id: &InstanceId) {
        let is_known = self.table.read().get(id).is_some();
        if is_known && let Err(error) = self.bucket.delete(id.as_str()).await {
            warn!(%error, %id, "deleting the status of a removed VM's agent failed");
        }
    }

    /// Receives status messages until shutdown.
    pub(crate) async fn receive(self: Arc<Self>, shutdown: CancellationToken) {
        let receiving = async {
            let mut written = HashMap::new();
            loop {
                match self
                    .bus
                    .subscribe_queue(STATUS_SUBJECTS, Service::Metrics.name())
                    .await
                {
                    Ok(mut messages) => {
                        while let Some(message) = messages.next().await {
                            self.take(&message, &mut written).await;
                        }
                    }
                    Err(error) => warn!(%error, "subscribing to the status of agents failed; retrying"),
                }
                sleep(RETRY_PAUSE).await;
            }
        };
        let _: Option<Infallible> = shutdown.run_until_cancelled(receiving).await;
    }

    async fn take(&self, message: &Message, written: &mut HashMap<InstanceId, Instant>) {
        let Some((id, status)) = read(message) else {
            counter!("vmwatch_agent_statuses_refused_total").increment(1);
            debug!(subject = %message.subject, "refused a status message of an agent");
            return;
        };
        let stored = self.store(&id, status, written).await.unwrap_or_else(|error| {
            warn!(cause = error.cause(), %id, "storing the status of an agent failed");
            false
        });
        if !stored {
            counter!("vmwatch_agent_statuses_lost_total").increment(1);
        } else if let Some(reply) = &message.reply {
            let acknowledging = self.bus.publish(reply.clone(), HeaderMap::new(), Bytes::new());
            let _: Result<_, _> = timeout(DEADLINE, acknowledging).await;
        }
    }

    /// Writes the status if it changed. Returns `false` if the last write of the VM's status is too recent.
    async fn store(
        &self,
        id: &InstanceId,
        status: AgentStatus,
        written: &mut HashMap<InstanceId, Instant>,
    ) -> Result<bool, MetricsError> {
        if self.table.read().get(id) == Some(&status) {
            return Ok(true);
        }
        if !is_due(written, id, Instant::now()) {
            return Ok(false);
        }
        let record = serde_json::to_vec(&status)?;
        let written = self.bucket.put(id.as_str(), record.into()).await;
        written.map(|_| true).map_err(MetricsError::jetstream)
    }
}

/// Whether the status of a VM may be written now; notes the time of the write.
fn is_due(written: &mut HashMap<InstanceId, Instant>, id: &InstanceId, now: Instant) -> bool {
    let is_recent = |at: &Instant| now.duration_since(*at) < MIN_INTERVAL;
    if written.get(id).is_some_and(is_recent) {
        return false;
    }
    if written.len() >= MAX_RECENT {
        written.retain(|_, at| is_recent(at));
    }
    if written.len() < MAX_RECENT {
        written.insert(id.clone(), now);
    }
    true
}

/// Decodes a status message; `None` if it is too large or is not a status.
fn read(message: &Message) -> Option<(InstanceId, AgentStatus)> {
    let id = status_instance(&message.subject)?;
    let body = Some(&message.payload).filter(|body| body.len() <= MESSAGE_BYTES)?;
    Some((id, serde_json::from_slice(body).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_of_one_vm_are_limited() {
        let (mut written, now) = (HashMap::new(), Instant::now());
        let (one, other) = ("vm-1".parse().unwrap(), "vm-2".parse().unwrap());
        assert!(is_due(&mut written, &one, now) && is_due(&mut written, &other, now));
        assert!(!is_due(&mut written, &one, now + MIN_INTERVAL / 2));
        assert!(is_due(&mut written, &one, now + MIN_INTERVAL));
    }
}
