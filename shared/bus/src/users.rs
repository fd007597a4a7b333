//! The bucket of users, followed: by gateways, which check sessions, and by auth-svc, which keeps it like the database.

use std::{collections::HashMap, sync::Arc};

use async_nats::jetstream::kv::{Entry, Operation};
use metrics::counter;
use tracing::warn;
use vmwatch_api::{
    UserHash,
    sessions::{USER_BUCKET, UserRecord},
};

use super::follow::Table;

/// The users of the bucket. The bucket's size bounds their number.
#[derive(Debug, Default)]
pub struct UserTable {
    users: HashMap<UserHash, Arc<UserRecord>>,
}

impl UserTable {
    /// The user with this hash, removed or not.
    pub fn get(&self, user: &UserHash) -> Option<Arc<UserRecord>> {
        self.users.get(user).cloned()
    }

    /// All users that can be decoded.
    pub fn all(&self) -> Vec<Arc<UserRecord>> {
        self.users.values().cloned().collect()
    }
}

impl Table for UserTable {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        let mut user: UserHash = [0; 32];
        if hex::decode_to_slice(&entry.key, &mut user).is_err() {
            warn!(
                key = entry.key,
                "ignored a key that is not a hash in the bucket of users"
            );
            return;
        }
        let record = match entry.operation {
            Operation::Put => serde_json::from_slice(&entry.value)
                .inspect_err(|error| {
                    counter!("vmwatch_broken_records_total", "bucket" => USER_BUCKET).increment(1);
                    warn!(%error, key = entry.key, "a user cannot be decoded: its sessions are refused");
                })
                .ok(),
            Operation::Delete | Operation::Purge => None,
        };
        match record {
            Some(record) => drop(self.users.insert(user, Arc::new(record))),
            None => drop(self.users.remove(&user)),
        }
    }
}
