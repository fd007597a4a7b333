//! An operation record on which this replica holds a lease. The lease is renewed during every wait, and every write is
//! a compare-and-set. A replica that was too slow therefore notices that another replica has adopted the operation.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, warn};
use vmwatch_api::time::unix_millis;

use super::{
    record::Record,
    store::{Store, StoreError, Written},
};
use crate::{
    fence::{Fence, LeaseEnd},
    lease::Lease,
};

/// Pause between attempts to write an operation record while JetStream fails.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Why this replica stopped carrying out an operation.
#[derive(Debug, thiserror::Error)]
pub(super) enum Aborted {
    /// Another replica has adopted the operation.
    #[error("another replica has adopted the operation")]
    LeaseLost,
    /// The record could not be written in time. The replica that adopts the operation will end it.
    #[error("the record of the operation could not be written")]
    NotWritten(#[source] StoreError),
}

/// An operation record on which this replica holds a lease.
pub(super) struct Leased {
    store: Store,
    pub(super) record: Record,
    revision: u64,
    lease: Duration,
    /// End of the lease as last written, in Unix milliseconds. It is shared with fences, which must see every renewal.
    lease_end: Arc<LeaseEnd>,
    renew_at: Instant,
}

impl Leased {
    /// Wraps a record that was just written at this revision and has a new lease of this length.
    pub(super) fn new(store: Store, record: Record, revision: u64, lease: Duration) -> Self {
        Self {
            store,
            lease_end: Arc::new(LeaseEnd::at(record.lease.until_ms)),
            record,
            revision,
            lease,
            renew_at: Instant::now() + lease / 3,
        }
    }

    /// Creates a fence that is open until the operation's deadline, as long as the lease is renewed.
    pub(super) fn fence(&self) -> Fence {
        Fence::new(self.record.operation.deadline_ms, Arc::clone(&self.lease_end))
    }

    /// Waits for `work` and renews the lease meanwhile. If JetStream is unreachable, `work` continues: no other replica
    /// can adopt the operation then, and no action begins once the lease has expired.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Aborted> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                () = sleep_until(self.renew_at) => match self.write().await {
                    Ok(()) => {}
                    Err(Aborted::LeaseLost) => return Err(Aborted::LeaseLost),
                    Err(Aborted::NotWritten(error)) => {
                        warn!(operation = %self.record.operation.id, %error, "renewing the lease on an operation failed; retrying");
                        self.renew_at = Instant::now() + RETRY_PAUSE;
                    }
                },
            }
        }
    }

    /// Writes the operation record with a new lease that begins now.
    pub(super) async fn write(&mut self) -> Result<(), Aborted> {
        self.record.lease.until_ms = Lease::until(self.lease);
        let end = LeaseEnd::moment(self.record.lease.until_ms);
        let mut written = self.replace().await?;
        if matches!(written, Written::Conflict) && self.conflicts_with_own_write().await? {
            written = self.replace().await?;
        }
        match written {
            Written::At(revision) => {
                self.revision = revision;
                self.lease_end.renew(end);
                self.renew_at = Instant::now() + self.lease / 3;
                Ok(())
            }
            Written::Conflict => Err(Aborted::LeaseLost),
        }
    }

    /// Writes the record. While JetStream fails, retries until `end_ms` (Unix milliseconds).
    pub(super) async fn write_with_retry(&mut self, end_ms: u64) -> Result<(), Aborted> {
        loop {
            match self.write().await {
                Err(Aborted::NotWritten(error)) if unix_millis() < end_ms => {
                    debug!(operation = %self.record.operation.id, %error, "writing the operation record failed; retrying");
                    sleep(RETRY_PAUSE).await;
                }
                other => return other,
            }
        }
    }

    async fn replace(&self) -> Result<Written, Aborted> {
        let replaced = self.store.replace(&self.record, self.revision).await;
        replaced.map_err(Aborted::NotWritten)
    }

    /// Whether the conflicting write was this replica's own, whose acknowledgement was lost. If so, further writes
    /// continue from its revision.
    async fn conflicts_with_own_write(&mut self) -> Result<bool, Aborted> {
        let id = &self.record.operation.id;
        let stored = self.store.read(id).await.map_err(Aborted::NotWritten)?;
        // A replica that adopts an operation writes its own name into the lease, so an unchanged owner means that this
        // replica wrote it.
        let ours = stored.filter(|(record, _)| record.lease.owner == self.record.lease.owner);
        if let Some((_, revision)) = &ours {
            self.revision = *revision;
        }
        Ok(ours.is_some())
    }
}
