//! What this replica knows of all commands, by watching the bucket: which are not ended, so that one whose owner died
//! is adopted, and the newest ones, to be listed. Nothing is decided by it: what it says is read again first.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::kv;
use futures::StreamExt;
use shared::api::{
    first_page,
    lifecycle::{Operation, OperationId, OperationPage},
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    record::Record,
    store::{Level, Store, StoreError},
};

/// The commands that can be listed: some 15 MB at the most.
const LISTED: usize = 10_000;
/// What a record takes in the bucket beside its own bytes: subject, headers, and the server's frame.
const OVERHEAD: u64 = 256;
/// A watch that broke looks like a bucket where nothing happens: this often it is asked whether something has.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Before a watch that broke is begun anew.
const AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Known {
    /// When the leases of commands that are not ended run out, Unix milliseconds.
    open: HashMap<OperationId, u64>,
    /// The newest by their last change.
    newest: BTreeMap<u64, Arc<Operation>>,
    revisions: HashMap<OperationId, u64>,
    last_revision: u64,
}

#[derive(Debug, Default)]
pub(super) struct View {
    known: RwLock<Known>,
    /// Of the bucket as it was last measured, and of all that was written since.
    bytes: AtomicU64,
}

impl View {
    /// The commands that are not ended and whose lease has run out by then.
    pub(super) fn orphans(&self, now_ms: u64) -> Vec<OperationId> {
        let known = self.read();
        let expired = known.open.iter().filter(|&(_, &until)| until < now_ms);
        expired.map(|(id, _)| id.clone()).collect()
    }

    /// A page of the newest commands that pass, by when they were asked.
    pub(super) fn newest(&self, most: usize, pass: impl Fn(&Operation) -> bool) -> OperationPage {
        let mut found: Vec<_> = {
            let known = self.read();
            known
                .newest
                .values()
                .filter(|operation| pass(operation))
                .cloned()
                .collect()
        };
        found.sort_by_key(|operation| std::cmp::Reverse((operation.requested_at_ms, operation.id.clone())));
        let (page, more) = first_page(found, most);
        let operations = page.iter().map(|operation| Operation::clone(operation)).collect();
        OperationPage { operations, more }
    }

    /// The size of the bucket, or more: what was written since it was measured may have replaced something.
    pub(super) fn bytes_at_most(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Notes the size of the bucket.
    pub(super) fn measured(&self, level: Level) {
        self.bytes.store(level.bytes, Ordering::Relaxed);
    }

    /// Forgets a command whose record is gone: the bucket lets the oldest go without a word.
    pub(super) fn forget(&self, id: &OperationId) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.replace(id.clone(), 0, None);
    }

    /// Follows the bucket until shutdown.
    pub(super) async fn follow(&self, store: &Store, shutdown: &CancellationToken) {
        let following = async {
            loop {
                if let Err(error) = Box::pin(self.follow_once(store)).await {
                    debug!(%error, "the watch on the bucket of records");
                }
                warn!("the watch on the bucket of records ended; it begins anew");
                sleep(AGAIN).await;
            }
        };
        shutdown.run_until_cancelled(following).await;
    }

    /// Follows the bucket until the watch breaks.
    async fn follow_once(&self, store: &Store) -> Result<(), StoreError> {
        let mut watch = store.watch().await?;
        let mut check_at = Instant::now() + CHECK_INTERVAL;
        let mut behind = None;
        loop {
            tokio::select! {
                next = watch.next() => match next {
                    Some(Ok(entry)) => self.take(&entry),
                    Some(Err(error)) => return Err(StoreError::Bucket(error.into())),
                    None => return Ok(()),
                },
                () = tokio::time::sleep_until(check_at) => {
                    let level = store.level().await?;
                    self.measured(level);
                    let last = level.last_revision;
                    let seen = self.read().last_revision;
                    // Behind twice in a row at the same place: it is not just late.
                    if seen < last && behind == Some(seen) {
                        return Ok(());
                    }
                    behind = (seen < last).then_some(seen);
                    check_at = Instant::now() + CHECK_INTERVAL;
                }
            }
        }
    }

    fn take(&self, entry: &kv::Entry) {
        let size = u64::try_from(entry.value.len()).unwrap_or(u64::MAX);
        self.bytes
            .fetch_add(size.saturating_add(OVERHEAD), Ordering::Relaxed);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.last_revision = known.last_revision.max(entry.revision);
        let Ok(id) = entry.key.parse::<OperationId>() else {
            return;
        };
        let record = match entry.operation {
            kv::Operation::Put => serde_json::from_slice::<Record>(&entry.value)
                .inspect_err(|error| warn!(%error, %id, "a record cannot be read"))
                .ok(),
            kv::Operation::Delete | kv::Operation::Purge => None,
        };
        known.replace(id, entry.revision, record);
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn replace(&mut self, id: OperationId, revision: u64, record: Option<Record>) {
        if let Some(before) = self.revisions.remove(&id) {
            self.newest.remove(&before);
        }
        let Some(record) = record else {
            self.open.remove(&id);
            return;
        };
        if record.operation.state.is_final() {
            self.open.remove(&id);
        } else {
            self.open.insert(id.clone(), record.lease.until_ms);
        }
        self.revisions.insert(id, revision);
        self.newest.insert(revision, Arc::new(record.operation));
        while self.newest.len() > LISTED {
            if let Some((_, oldest)) = self.newest.pop_first() {
                self.revisions.remove(&oldest.id);
            }
        }
    }
}
