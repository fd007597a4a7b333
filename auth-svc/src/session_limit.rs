//! How many sessions a user may have: a new one ends the oldest beyond that.
//!
//! A bucket of its own, which gateways cannot read, holds for each user the sessions it has made, oldest first, so that
//! a login need not look through everybody's. An entry may name sessions that are over by now; all of them are older
//! than any that lives, but for those that were logged out, which are taken out of it.

use async_nats::jetstream::kv::Store;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use shared::{
    api::Service,
    bus::{
        Bus,
        provision::{Bucket, ensure_bucket},
    },
};

use crate::{AuthError, bucket, config::SessionSettings};

const BUCKET: &str = "vmwatch_user_sessions";
/// Some 10,000 users with as many sessions as they may have by default.
const BUCKET_BYTES: i64 = 64 << 20;
/// Logins of one user at one moment: one of them comes first, the others try again.
const TRIES: usize = 16;

/// Of one user; keys of the session bucket, oldest first.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Made {
    keys: Vec<String>,
}

/// The sessions that each user has made.
pub(crate) struct SessionLimit {
    bucket: Store,
    most: usize,
}

impl SessionLimit {
    /// The bucket, as the settings have it.
    pub(crate) const fn bucket(settings: &SessionSettings) -> Bucket {
        Bucket {
            name: BUCKET,
            description: "which sessions are whose",
            max_age: settings.ttl,
            max_bytes: BUCKET_BYTES,
            replicas: settings.replicas,
        }
    }

    /// Opens the bucket, and makes a missing one.
    pub(crate) async fn open(bus: &Bus, settings: &SessionSettings) -> Result<Self, AuthError> {
        let bucket = ensure_bucket(bus.jetstream(), Service::Auth, Self::bucket(settings)).await?;
        Ok(Self {
            bucket,
            most: settings.per_user,
        })
    }

    /// Puts a new session on record; gives back those that are beyond the limit now.
    pub(crate) async fn add(&self, user: &str, key: &str) -> Result<Vec<String>, AuthError> {
        self.change(user, |made| {
            made.keys.push(key.to_owned());
            let beyond = made.keys.len().saturating_sub(self.most);
            made.keys.drain(..beyond).collect()
        })
        .await
    }

    /// Takes a session that was logged out off the record.
    pub(crate) async fn remove(&self, user: &str, key: &str) -> Result<(), AuthError> {
        self.change(user, |made| made.keys.retain(|made| made != key))
            .await
    }

    /// Reads, changes and writes, again where another replica wrote in between.
    async fn change<T>(&self, user: &str, change: impl Fn(&mut Made) -> T) -> Result<T, AuthError> {
        // A name may hold anything; a key may not.
        let key = hex::encode(Sha256::digest(user.as_bytes()));
        for _ in 0..TRIES {
            let found = tokio::time::timeout(bucket::DEADLINE, self.bucket.entry(&key)).await;
            let found = found.map_err(AuthError::bucket)?.map_err(AuthError::bucket)?;
            let mut made: Made = match &found {
                Some(entry) if !entry.value.is_empty() => serde_json::from_slice(&entry.value)?,
                _ => Made::default(),
            };
            let result = change(&mut made);
            let value = serde_json::to_vec(&made)?;
            let revision = found.map(|entry| entry.revision);
            if bucket::write_over(&self.bucket, &key, value, revision).await? {
                return Ok(result);
            }
        }
        Err(AuthError::Busy)
    }
}
