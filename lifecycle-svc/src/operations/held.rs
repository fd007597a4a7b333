//! A record under this replica's lease. The lease is renewed while anything is waited for, and every write is a
//! compare-and-set, so that a replica that was too slow notices that its command was taken over.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, warn};
use vmwatch_api::time::unix_millis;

use super::{
    record::{Lease, Record},
    store::{Store, StoreError, Written},
};
use crate::fence::Fence;

/// Between tries to write a record while the store is away.
const AGAIN: Duration = Duration::from_millis(500);

/// Why a command is carried out no further here.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stopped {
    /// Another replica has taken it over.
    #[error("another replica has taken the command over")]
    Overtaken,
    /// Its record could not be written in time; whoever adopts it ends it.
    #[error("the record of the command could not be written")]
    Unwritten(#[source] StoreError),
}

/// A record under this replica's lease.
pub(super) struct Held {
    store: Store,
    pub(super) record: Record,
    revision: u64,
    lease: Duration,
    /// When the lease that was last written runs out, Unix milliseconds; fences read it while it is renewed.
    until_ms: Arc<AtomicU64>,
    renew_at: Instant,
}

impl Held {
    /// Holds a record that was just written, with a lease of this length, at this revision.
    pub(super) fn new(store: Store, record: Record, revision: u64, lease: Duration) -> Self {
        Self {
            store,
            until_ms: Arc::new(AtomicU64::new(record.lease.until_ms)),
            record,
            revision,
            lease,
            renew_at: Instant::now() + lease / 3,
        }
    }

    /// Open until the command's deadline, for as long as the lease is renewed.
    pub(super) fn fence(&self) -> Fence {
        Fence::new(self.record.operation.deadline_ms, Arc::clone(&self.until_ms))
    }

    /// Waits for `work` and renews the lease meanwhile. While the store is unreachable `work` goes on: no other replica
    /// can adopt the command, and no act begins once the lease has run out.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Stopped> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                () = sleep_until(self.renew_at) => match self.write().await {
                    Ok(()) => {}
                    Err(Stopped::Overtaken) => return Err(Stopped::Overtaken),
                    Err(Stopped::Unwritten(error)) => {
                        warn!(operation = %self.record.operation.id, %error, "the lease is not renewed");
                        self.renew_at = Instant::now() + AGAIN;
                    }
                },
            }
        }
    }

    /// Writes the record, with a lease from now on.
    pub(super) async fn write(&mut self) -> Result<(), Stopped> {
        self.record.lease.until_ms = Lease::until(self.lease);
        let mut written = self.replace().await?;
        if matches!(written, Written::Overtaken) && self.wrote_it_itself().await? {
            written = self.replace().await?;
        }
        match written {
            Written::At(revision) => {
                self.revision = revision;
                self.until_ms.store(self.record.lease.until_ms, Ordering::Relaxed);
                self.renew_at = Instant::now() + self.lease / 3;
                Ok(())
            }
            Written::Overtaken => Err(Stopped::Overtaken),
        }
    }

    /// Writes the record, again and again until this moment (Unix milliseconds) while the store is away.
    pub(super) async fn write_until(&mut self, end_ms: u64) -> Result<(), Stopped> {
        loop {
            match self.write().await {
                Err(Stopped::Unwritten(error)) if unix_millis() < end_ms => {
                    debug!(operation = %self.record.operation.id, %error, "its record is written again");
                    sleep(AGAIN).await;
                }
                other => return other,
            }
        }
    }

    async fn replace(&self) -> Result<Written, Stopped> {
        let replaced = self.store.replace(&self.record, self.revision).await;
        replaced.map_err(Stopped::Unwritten)
    }

    /// Whether the write that overtook was one of ours whose acknowledgement was lost. Then it goes on from there.
    async fn wrote_it_itself(&mut self) -> Result<bool, Stopped> {
        let id = &self.record.operation.id;
        let stored = self.store.read(id).await.map_err(Stopped::Unwritten)?;
        // Whoever adopts a command writes its own name.
        let ours = stored.filter(|(record, _)| record.lease.owner == self.record.lease.owner);
        if let Some((_, revision)) = &ours {
            self.revision = *revision;
        }
        Ok(ours.is_some())
    }
}
