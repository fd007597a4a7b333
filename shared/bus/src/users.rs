//! Keeps a table in memory of the users in the KV bucket of users. Gateways check sessions against the table; auth-svc
//! compares it with the database to repair the bucket.

use std::{collections::HashMap, sync::Arc};

use async_nats::jetstream::kv::{Entry, Operation};
use metrics::counter;
use tracing::warn;
use vmwatch_api::{
    UserHash,
    sessions::{USER_BUCKET, UserRecord},
};

use super::follow::Table;

/// The users in the KV bucket. The size limit of the KV bucket limits the number of users.
#[derive(Debug, Default)]
pub struct UserTable {
    users: HashMap<UserHash, Arc<UserRecord>>,
}

impl UserTable {
    /// The user with this hash; a removed user is returned as well until its sessions are deleted.
    pub fn get(&self, user: &UserHash) -> Option<Arc<UserRecord>> {
        self.users.get(user).cloned()
    }

    /// All users in the KV bucket whose records can be decoded.
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
                "ignored a key of the KV bucket of users that is not a user hash"
            );
            return;
        }
        let record = match entry.operation {
            Operation::Put => serde_json::from_slice(&entry.value)
                .inspect_err(|error| {
                    counter!("vmwatch_broken_records_total", "bucket" => USER_BUCKET).increment(1);
                    warn!(%error, key = entry.key, "a user record could not be decoded; the user's sessions are refused");
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
