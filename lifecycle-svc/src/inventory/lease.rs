//! Leases on polling: only the replica that holds the lease on a hypervisor polls it. Each replica follows the KV
//! bucket of leases; a lease is taken, renewed and released by compare-and-set.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_nats::jetstream::kv::{Entry, Operation};
use tokio::time::sleep;
use tracing::{debug, info, warn};
use vmwatch_api::time::unix_millis;
use vmwatch_bus::follow::Table;

use super::{Inventory, WriteError};
use crate::{fence::LeaseEnd, lease::Lease};

/// Name of the KV bucket. Its keys are names of hypervisors. The leases of hypervisors that are no longer configured
/// are kept.
pub(super) const LEASE_BUCKET: &str = "vmwatch_hypervisor_leases";
/// Pause between attempts to renew a lease while JetStream fails.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// The stored leases and their revisions.
#[derive(Debug, Default)]
pub(super) struct Leases(HashMap<String, (Option<Lease>, u64)>);

impl Leases {
    /// End of the lease on this hypervisor in Unix milliseconds; 0 if there is none.
    pub(super) fn until_ms(&self, hypervisor: &str) -> u64 {
        self.get(hypervisor).0.map_or(0, |lease| lease.until_ms)
    }

    fn get(&self, hypervisor: &str) -> (Option<&Lease>, u64) {
        let known = self.0.get(hypervisor);
        known.map_or((None, 0), |(lease, revision)| (lease.as_ref(), *revision))
    }
}

impl Table for Leases {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        // A lease that cannot be decoded counts as expired.
        let lease = (entry.operation == Operation::Put)
            .then(|| serde_json::from_slice(&entry.value).ok())
            .flatten();
        self.0.insert(entry.key.clone(), (lease, entry.revision));
    }
}

/// A lease that this replica holds.
pub(super) struct Held<'a> {
    inventory: &'a Inventory,
    hypervisor: &'a str,
    owner: &'a str,
    length: Duration,
    revision: u64,
    pub(super) end: Arc<LeaseEnd>,
}

impl Inventory {
    /// Takes the lease on a hypervisor, if no other replica holds it.
    pub(super) async fn take_lease<'a>(
        &'a self,
        hypervisor: &'a str,
        owner: &'a str,
        length: Duration,
    ) -> Option<Held<'a>> {
        if !self.leases.is_current() {
            return None;
        }
        let revision = {
            let leases = self.leases.read();
            let (lease, revision) = leases.get(hypervisor);
            // If the stored lease belongs to this replica, an earlier write took effect but its acknowledgement was
            // lost.
            let is_free = lease.is_none_or(|lease| lease.owner == owner || lease.until_ms < unix_millis());
            is_free.then_some(revision)?
        };
        let mut held = Held {
            inventory: self,
            hypervisor,
            owner,
            length,
            revision,
            end: Arc::new(LeaseEnd::at(0)),
        };
        match held.renew().await {
            Ok(true) => {
                info!(hypervisor, "took the lease on polling a hypervisor");
                Some(held)
            }
            Ok(false) => None,
            Err(error) => {
                debug!(hypervisor, %error, "taking the lease on polling a hypervisor failed; retrying");
                None
            }
        }
    }
}

impl Held<'_> {
    /// Renews the lease until it is lost.
    pub(super) async fn keep(&mut self) {
        let mut pause = self.length / 3;
        loop {
            sleep(pause).await;
            pause = match self.renew().await {
                Ok(true) => self.length / 3,
                Ok(false) if !self.continue_from_own_write() => {
                    warn!(
                        hypervisor = self.hypervisor,
                        "another replica took the lease on polling a hypervisor"
                    );
                    return;
                }
                Ok(false) => Duration::ZERO,
                Err(error) => {
                    warn!(hypervisor = self.hypervisor, %error, "renewing the lease on polling a hypervisor failed; retrying");
                    RETRY_PAUSE
                }
            };
            if self.end.has_passed() {
                warn!(
                    hypervisor = self.hypervisor,
                    "the lease on polling a hypervisor has expired"
                );
                return;
            }
        }
    }

    /// Ends the lease, so that another replica can take it at once. If this fails, the lease ends when it expires.
    pub(super) async fn release(&self) {
        if let Err(error) = self.write(0).await {
            debug!(hypervisor = self.hypervisor, %error, "releasing the lease on polling a hypervisor failed");
        }
    }

    /// Writes the lease with a new end, counted from now; returns `false` if another write has changed the stored
    /// lease.
    async fn renew(&mut self) -> Result<bool, WriteError> {
        let until_ms = Lease::until(self.length);
        let end = LeaseEnd::moment(until_ms);
        let Some(revision) = self.write(until_ms).await? else {
            return Ok(false);
        };
        self.revision = revision;
        self.end.renew(end);
        Ok(true)
    }

    /// Whether this replica itself wrote the stored lease but did not receive the acknowledgement. If so, further
    /// writes continue from the revision of that write.
    fn continue_from_own_write(&mut self) -> bool {
        let leases = self.inventory.leases.read();
        let (lease, revision) = leases.get(self.hypervisor);
        let is_own = revision != self.revision && lease.is_some_and(|lease| lease.owner == self.owner);
        if is_own {
            self.revision = revision;
        }
        is_own
    }

    /// Writes the lease if the stored revision is unchanged, and returns the new revision; otherwise returns `None`.
    async fn write(&self, until_ms: u64) -> Result<Option<u64>, WriteError> {
        let lease = Lease {
            owner: self.owner.to_owned(),
            until_ms,
        };
        let value = serde_json::to_vec(&lease)?.into();
        let bucket = &self.inventory.lease_bucket;
        Ok(bucket.update(self.hypervisor, value, self.revision).await?)
    }
}
