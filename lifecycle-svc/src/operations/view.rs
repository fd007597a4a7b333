//! What this replica knows of all commands, by following the bucket: which are not ended, so that one whose owner died
//! is adopted, and the newest ones, to be listed. Nothing is decided by it: what it says is read again first.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use async_nats::jetstream::kv;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::{
    first_page,
    lifecycle::{Operation, OperationId, OperationPage},
};
use vmwatch_bus::{
    Bus,
    follow::{Follower, StreamState, Table},
};

use super::{
    record::Record,
    store::{OPERATION_BUCKET, StoreError},
};

/// The commands that can be listed: some 15 MB at the most.
const LISTED: usize = 10_000;
/// What a record takes in the bucket beside its own bytes: subject, headers, and the server's frame.
const OVERHEAD: u64 = 256;
/// Commands are not listed if the bucket could not be followed for so long.
const STALE_AFTER: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Known {
    /// When the leases of commands that are not ended run out, Unix milliseconds.
    open: HashMap<OperationId, u64>,
    /// The newest by their last change.
    newest: BTreeMap<u64, Arc<Operation>>,
    revisions: HashMap<OperationId, u64>,
    /// The size of the bucket when it was last measured, and of all that was written since.
    bytes: u64,
}

pub(super) struct View {
    follower: Follower<Known>,
}

impl View {
    /// Starts to follow the bucket, until shutdown.
    pub(super) fn follow(bus: &Bus, shutdown: &CancellationToken) -> Self {
        let known = Known::default();
        Self {
            follower: Follower::start(bus, OPERATION_BUCKET, STALE_AFTER, known, shutdown.clone()),
        }
    }

    /// Waits until the bucket was read.
    pub(super) async fn filled(&self) {
        self.follower.filled().await;
    }

    /// The commands that are not ended and whose lease has run out by then.
    pub(super) fn orphans(&self, now_ms: u64) -> Vec<OperationId> {
        let known = self.follower.read();
        let expired = known.open.iter().filter(|&(_, &until)| until < now_ms);
        expired.map(|(id, _)| id.clone()).collect()
    }

    /// A page of the newest commands that pass, by when they were asked.
    pub(super) fn newest(
        &self,
        most: usize,
        pass: impl Fn(&Operation) -> bool,
    ) -> Result<OperationPage, StoreError> {
        if !self.follower.is_current() {
            return Err(StoreError::NotFollowed);
        }
        let mut found: Vec<_> = {
            let known = self.follower.read();
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
        Ok(OperationPage { operations, more })
    }

    /// The size of the bucket, or more: what was written since it was measured may have replaced something.
    pub(super) fn bytes_at_most(&self) -> u64 {
        self.follower.read().bytes
    }

    /// Notes the size of the bucket.
    pub(super) fn measured(&self, bytes: u64) {
        self.follower.write().bytes = bytes;
    }

    /// Forgets a command whose record is gone: the bucket deletes the oldest without an event.
    pub(super) fn forget(&self, id: &OperationId) {
        self.follower.write().replace(id.clone(), 0, None);
    }
}

impl Table for Known {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &kv::Entry) {
        let size = u64::try_from(entry.value.len()).unwrap_or(u64::MAX);
        self.bytes = self.bytes.saturating_add(size.saturating_add(OVERHEAD));
        let Ok(id) = entry.key.parse::<OperationId>() else {
            return;
        };
        let record = match entry.operation {
            kv::Operation::Put => Record::decode(&entry.value)
                .inspect_err(|error| warn!(%error, %id, "a record cannot be read"))
                .ok(),
            kv::Operation::Delete | kv::Operation::Purge => None,
        };
        self.replace(id, entry.revision, record);
    }

    fn confirmed(&mut self, bucket: &StreamState) {
        self.bytes = bucket.bytes;
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
        if record.newer || record.operation.state.is_final() {
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
