//! This replica's in-memory copy of all operations, kept current by following the KV bucket. It shows which operations
//! have not ended, so that those with an expired lease are adopted, and it lists the newest operations. Because it may
//! lag behind, decisions are made only on records that are read again from the KV bucket.

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
use crate::fleet::Fleet;

/// Maximum number of operations kept for lists, which then take about 15 MB.
const MAX_LISTED: usize = 10_000;
/// Number of bytes that a message takes in the KV bucket besides its value: subject, headers and the server's framing.
const MESSAGE_OVERHEAD: u64 = 256;
/// Listing operations fails if the in-memory copy has not been confirmed to be current for this long.
const STALE_AFTER: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Known {
    /// The hypervisors. When an operation ends on any replica, its hypervisor is polled at once.
    fleet: Arc<Fleet>,
    /// End of the lease of each operation that has not ended, in Unix milliseconds.
    open: HashMap<OperationId, u64>,
    /// The most recently changed operations, by the revision of their record.
    newest: BTreeMap<u64, Arc<Operation>>,
    revisions: HashMap<OperationId, u64>,
    /// Upper bound of the KV bucket's size: the last measured size plus everything written since.
    bytes: u64,
}

pub(super) struct View {
    follower: Follower<Known>,
}

impl View {
    /// Starts following the KV bucket of operation records until shutdown.
    pub(super) fn follow(bus: &Bus, fleet: Arc<Fleet>, shutdown: &CancellationToken) -> Self {
        let known = Known::new(fleet);
        Self {
            follower: Follower::start(bus, OPERATION_BUCKET, STALE_AFTER, known, shutdown.clone()),
        }
    }

    /// Waits until all operation records have been read once from the KV bucket.
    pub(super) async fn filled(&self) {
        self.follower.filled().await;
    }

    /// Ids of the operations that have not ended and whose lease has expired at this time.
    pub(super) fn orphans(&self, now_ms: u64) -> Vec<OperationId> {
        let known = self.follower.read();
        let expired = known.open.iter().filter(|&(_, &until)| until < now_ms);
        expired.map(|(id, _)| id.clone()).collect()
    }

    /// Returns a page of the newest operations that `pass` accepts, ordered by the time of their request.
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

    /// Upper bound of the KV bucket's size. The true size is smaller if writes since the last measurement replaced
    /// older records.
    pub(super) fn bytes_at_most(&self) -> u64 {
        self.follower.read().bytes
    }

    /// Stores the measured size of the KV bucket of operation records.
    pub(super) fn measured(&self, bytes: u64) {
        self.follower.write().bytes = bytes;
    }

    /// Removes an operation whose record no longer exists. This is needed because the KV bucket expires records without
    /// notifying its followers.
    pub(super) fn forget(&self, id: &OperationId) {
        self.follower.write().replace(id.clone(), 0, None);
    }
}

impl Table for Known {
    fn emptied(&self) -> Self {
        Self::new(Arc::clone(&self.fleet))
    }

    fn apply(&mut self, entry: &kv::Entry) {
        let size = u64::try_from(entry.value.len()).unwrap_or(u64::MAX);
        self.bytes = self.bytes.saturating_add(size.saturating_add(MESSAGE_OVERHEAD));
        let Ok(id) = entry.key.parse::<OperationId>() else {
            return;
        };
        let record = match entry.operation {
            kv::Operation::Put => Record::decode(&entry.value)
                .inspect_err(|error| warn!(%error, %id, "decoding an operation record failed"))
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
    fn new(fleet: Arc<Fleet>) -> Self {
        Self {
            fleet,
            open: HashMap::new(),
            newest: BTreeMap::new(),
            revisions: HashMap::new(),
            bytes: 0,
        }
    }

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
            if let Some(hypervisor) = &record.operation.hypervisor {
                self.fleet.poll_soon(hypervisor);
            }
        } else {
            self.open.insert(id.clone(), record.lease.until_ms);
        }
        self.revisions.insert(id, revision);
        self.newest.insert(revision, Arc::new(record.operation));
        while self.newest.len() > MAX_LISTED {
            if let Some((_, oldest)) = self.newest.pop_first() {
                self.revisions.remove(&oldest.id);
            }
        }
    }
}
