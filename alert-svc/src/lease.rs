//! The lease on evaluation and notification, in a KV bucket: only the replica that holds it evaluates rules and sends
//! messages.
//!
//! Its holder renews the lease by compare-and-set. Another replica takes it when its revision has not changed for the
//! length of the lease on that replica's own clock, so the clocks of replicas are never compared. While NATS is
//! unreachable, no replica can take the lease, and its holder continues with what needs no NATS: it reports that no
//! samples arrive.

use std::time::Duration;

use async_nats::jetstream::{
    kv::{Entry, Operation},
    stream::Config,
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tracing::{debug, info, warn};
use vmwatch_bus::{
    Bus,
    jetstream::{Bucket, JetStreamError},
    provision::BucketConfig,
    random_id,
};

use crate::AlertError;

/// Name of the KV bucket.
pub(crate) const LEASE_BUCKET: &str = "vmwatch_alert_lease";
/// The only key of the bucket.
const KEY: &str = "lease";
/// Maximum size of the bucket. An entry has some 100 bytes.
const MAX_BYTES: i64 = 1 << 20;
/// Deadline of a request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(2);
/// Pause between attempts to renew the lease while JetStream fails.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// A lease is renewed this many times within its length.
const RENEWALS: u32 = 4;

/// The configuration of the KV bucket, with this number of replicas in a NATS cluster.
pub(crate) fn bucket(replicas: usize) -> Config {
    BucketConfig {
        name: LEASE_BUCKET,
        description: "replica of alert-svc that evaluates rules and notifies recipients",
        max_age: Duration::ZERO,
        max_bytes: MAX_BYTES,
        replicas,
    }
    .into()
}

/// The stored lease. Its revision changes with each renewal.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Random name of the replica that holds the lease; empty if the lease was released.
    owner: String,
}

/// Takes the lease when it is free.
#[derive(Debug)]
pub(crate) struct Leases {
    bucket: Bucket,
    owner: String,
    length: Duration,
    /// The revision of another replica's lease, and when this replica first saw it.
    seen: Option<(u64, Instant)>,
}

impl Leases {
    pub(crate) fn new(bus: &Bus, length: Duration) -> Self {
        Self {
            bucket: Bucket::new(bus, LEASE_BUCKET, DEADLINE),
            owner: random_id(),
            length,
            seen: None,
        }
    }

    /// Waits until this replica has taken the lease.
    pub(crate) async fn take(&mut self) -> Lease {
        loop {
            match self.try_take().await {
                Ok(Some(lease)) => {
                    info!("took the lease on evaluating rules");
                    return lease;
                }
                Ok(None) => {}
                Err(error) => debug!(%error, "taking the lease on evaluating rules failed; retrying"),
            }
            sleep(self.length / RENEWALS).await;
        }
    }

    async fn try_take(&mut self) -> Result<Option<Lease>, AlertError> {
        let began = Instant::now();
        let taken = match self.bucket.entry(KEY).await? {
            Some(entry) if entry.operation == Operation::Put => {
                if !self.is_free(&entry, began) {
                    return Ok(None);
                }
                let value = record(&self.owner)?.into();
                self.bucket.update(KEY, value, entry.revision).await?
            }
            _ => self.bucket.create(KEY, record(&self.owner)?.into()).await?,
        };
        self.seen = None;
        let (renewed, _) = watch::channel(began);
        Ok(taken.map(|revision| Lease {
            bucket: self.bucket.clone(),
            owner: self.owner.clone(),
            length: self.length,
            revision,
            renewed,
        }))
    }

    /// Whether no replica holds the lease. If the stored lease belongs to this replica, an earlier write took effect
    /// but its acknowledgement was lost. A lease that cannot be decoded expires like any other.
    fn is_free(&mut self, entry: &Entry, now: Instant) -> bool {
        let owner = owner(entry);
        if owner
            .as_ref()
            .is_some_and(|owner| owner.is_empty() || *owner == self.owner)
        {
            return true;
        }
        match self.seen {
            Some((revision, since)) if revision == entry.revision => now.duration_since(since) >= self.length,
            _ => {
                self.seen = Some((entry.revision, now));
                false
            }
        }
    }
}

fn record(owner: &str) -> Result<Vec<u8>, AlertError> {
    let owner = owner.to_owned();
    Ok(serde_json::to_vec(&Record { owner })?)
}

fn owner(entry: &Entry) -> Option<String> {
    let record = serde_json::from_slice::<Record>(&entry.value);
    record.ok().map(|record| record.owner)
}

/// The lease, held by this replica.
#[derive(Debug)]
pub(crate) struct Lease {
    bucket: Bucket,
    owner: String,
    length: Duration,
    revision: u64,
    /// When the last successful renewal began.
    renewed: watch::Sender<Instant>,
}

/// Whether a lease is certainly held at the moment.
#[derive(Debug, Clone)]
pub(crate) struct Freshness {
    renewed: watch::Receiver<Instant>,
    length: Duration,
}

impl Freshness {
    /// The freshness of a lease that has expired.
    #[cfg(test)]
    pub(crate) fn expired() -> Self {
        let (_, renewed) = watch::channel(Instant::now());
        Self {
            renewed,
            length: Duration::ZERO,
        }
    }

    /// Whether no other replica can have taken the lease. While NATS is unreachable, this is unknown after some time.
    pub(crate) fn is_fresh(&self) -> bool {
        self.renewed.borrow().elapsed() < self.length
    }
}

impl Lease {
    pub(crate) fn freshness(&self) -> Freshness {
        Freshness {
            renewed: self.renewed.subscribe(),
            length: self.length,
        }
    }

    /// Renews the lease until another replica has taken it.
    pub(crate) async fn keep(&mut self) {
        let mut is_failing = false;
        loop {
            let pause = if is_failing {
                RETRY_PAUSE
            } else {
                self.length / RENEWALS
            };
            sleep(pause).await;
            match self.renew().await {
                Ok(true) => is_failing = false,
                Ok(false) => {
                    warn!("another replica took the lease on evaluating rules");
                    return;
                }
                Err(error) => {
                    if !is_failing {
                        warn!(%error, "renewing the lease on evaluating rules failed; retrying");
                    }
                    is_failing = true;
                }
            }
        }
    }

    /// Renews the lease; returns `false` if it is no longer this replica's.
    async fn renew(&mut self) -> Result<bool, AlertError> {
        let began = Instant::now();
        if let Some(revision) = self.write(&self.owner).await? {
            self.revision = revision;
            self.renewed.send_replace(began);
            return Ok(true);
        }
        // This replica itself may have written the stored lease without receiving the acknowledgement.
        let entry = self.bucket.entry(KEY).await?;
        let own = entry
            .filter(|entry| entry.operation == Operation::Put && owner(entry).as_ref() == Some(&self.owner));
        let Some(entry) = own else {
            return Ok(false);
        };
        self.revision = entry.revision;
        let renewed = self.write(&self.owner).await?;
        if let Some(revision) = renewed {
            self.revision = revision;
            self.renewed.send_replace(began);
        }
        Ok(renewed.is_some())
    }

    /// Ends the lease, so that another replica can take it at once. If this fails, the lease ends when it expires.
    pub(crate) async fn release(&self) {
        match self.write("").await {
            Ok(_) => info!("released the lease on evaluating rules"),
            Err(error) => debug!(%error, "releasing the lease on evaluating rules failed"),
        }
    }

    /// Writes the lease if its revision is unchanged, and returns the new revision.
    async fn write(&self, owner: &str) -> Result<Option<u64>, AlertError> {
        let value = record(owner)?.into();
        let written: Result<_, JetStreamError> = self.bucket.update(KEY, value, self.revision).await;
        Ok(written?)
    }
}
