//! The process names that rules are about. alert-svc writes them into a KV bucket, which metrics-svc follows.

use std::{collections::HashMap, time::Duration};

use async_nats::jetstream::{kv::Operation, stream::Config};
use vmwatch_api::{
    alerts::evaluation::{WATCHED_BUCKET, WATCHED_KEY, WatchedNames},
    processes::ProcessName,
};
use vmwatch_bus::{Bus, jetstream::Bucket, provision::BucketConfig};

use crate::AlertError;

/// Deadline of a request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(2);
/// Maximum size of the bucket: at most 1,000 names of 256 bytes, and the value that replaces them.
const MAX_BYTES: i64 = 4 << 20;

/// The configuration of the KV bucket, with this number of replicas in a NATS cluster.
pub(crate) fn bucket(replicas: usize) -> Config {
    BucketConfig {
        name: WATCHED_BUCKET,
        description: "process names that alert rules are about",
        max_age: Duration::ZERO,
        max_bytes: MAX_BYTES,
        replicas,
    }
    .into()
}

/// The names in the KV bucket, each with the first revision since which the bucket has had it.
#[derive(Debug, Default)]
pub(super) struct Watched {
    since: HashMap<ProcessName, u64>,
}

impl Watched {
    pub(super) fn contains(&self, name: &ProcessName) -> bool {
        self.since.contains_key(name)
    }

    /// Whether the list of this revision has the name, so that a sample without it has no such process. A later
    /// revision has it as well.
    pub(super) fn has_since(&self, name: &ProcessName, revision: u64) -> bool {
        let since = self.since.get(name);
        revision != 0 && since.is_some_and(|since| *since <= revision)
    }

    /// Replaces the names after they were written.
    pub(super) fn set(&mut self, names: &WatchedNames, revision: u64) {
        let since = names.names.iter().map(|name| {
            let since = self.since.get(name).copied();
            (name.clone(), since.unwrap_or(revision))
        });
        self.since = since.collect();
    }
}

/// Writes the names if the KV bucket has others, and returns the revision of the list.
pub(super) async fn write(bus: &Bus, names: &WatchedNames) -> Result<u64, AlertError> {
    let bucket = Bucket::new(bus, WATCHED_BUCKET, DEADLINE);
    let entry = bucket.entry(WATCHED_KEY).await?;
    let entry = entry.filter(|entry| entry.operation == Operation::Put);
    if let Some(entry) = entry {
        let stored = serde_json::from_slice::<WatchedNames>(&entry.value);
        if stored.is_ok_and(|stored| stored == *names) {
            return Ok(entry.revision);
        }
    }
    // Only the holder of the lease writes, and it repeats the comparison, so the last writer need not be detected.
    Ok(bucket.put(WATCHED_KEY, serde_json::to_vec(names)?.into()).await?)
}
