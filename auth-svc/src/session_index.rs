//! Which sessions are whose, so that no login and no change of a user needs to read the whole bucket of sessions.
//!
//! A bucket of its own, which gateways cannot read, holds the keys of each user's sessions. A key is added before its
//! session is made and taken out after it was ended: every session is listed, and a listed one may be over.

use async_nats::jetstream::kv::Entry;
use serde::{Deserialize, Serialize};
use vmwatch_api::UserKey;
use vmwatch_bus::Bus;

use crate::{
    AuthError,
    bucket::{Bucket, Kept, Spec, TRIES},
    config::SessionSettings,
};

const BUCKET: &str = "vmwatch_user_sessions";
/// Some 10,000 users with as many sessions as they may have by default.
const BUCKET_BYTES: i64 = 64 << 20;

/// Of one user; keys of the session bucket, oldest first.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Listed {
    keys: Vec<String>,
}

/// The sessions of each user.
pub(crate) struct SessionIndex {
    bucket: Bucket,
    /// Sessions that a user may have.
    most: usize,
}

impl SessionIndex {
    /// The bucket, as the settings have it.
    pub(crate) const fn bucket(settings: &SessionSettings) -> Spec {
        Spec {
            name: BUCKET,
            description: "which sessions are whose",
            max_age: settings.ttl,
            max_bytes: BUCKET_BYTES,
            replicas: settings.replicas,
        }
    }

    /// Opens the bucket, and makes a missing one.
    pub(crate) async fn open(bus: &Bus, settings: &SessionSettings) -> Result<Self, AuthError> {
        Ok(Self {
            bucket: Bucket::open(bus, Self::bucket(settings)).await?,
            most: settings.per_user,
        })
    }

    /// The bucket as the service made it.
    pub(crate) fn existing(bus: &Bus, settings: &SessionSettings) -> Self {
        Self {
            bucket: Bucket::existing(bus, BUCKET),
            most: settings.per_user,
        }
    }

    /// Lists a session that is about to be made; gives back the oldest ones beyond the limit, which are to be ended.
    pub(crate) async fn add(&self, user: &UserKey, key: &str) -> Result<Vec<String>, AuthError> {
        self.change(user, |listed| {
            listed.keys.push(key.to_owned());
            let beyond = listed.keys.len().saturating_sub(self.most);
            listed.keys.iter().take(beyond).cloned().collect()
        })
        .await
    }

    /// Takes sessions out that were ended.
    pub(crate) async fn remove(&self, user: &UserKey, keys: &[String]) -> Result<(), AuthError> {
        self.change(user, |listed| listed.keys.retain(|key| !keys.contains(key)))
            .await
    }

    /// The keys of the user's sessions, oldest first.
    pub(crate) async fn of(&self, user: &UserKey) -> Result<Vec<String>, AuthError> {
        let entry = self.bucket.entry(&user.bucket_key()).await?;
        Ok(self.listed(entry.as_ref()).known.keys)
    }

    /// Reads, changes and writes, again if another replica wrote in between.
    async fn change<T>(&self, user: &UserKey, change: impl Fn(&mut Listed) -> T) -> Result<T, AuthError> {
        let key = user.bucket_key();
        for _ in 0..TRIES {
            let entry = self.bucket.entry(&key).await?;
            let mut listed = self.listed(entry.as_ref());
            let result = change(&mut listed.known);
            let value = serde_json::to_vec(&listed)?;
            if self.bucket.write_over(&key, value, entry.as_ref()).await? {
                return Ok(result);
            }
        }
        Err(AuthError::Contended)
    }

    /// A broken list counts as empty: it must not keep its user out. Sessions that it named still end by their dates.
    fn listed(&self, entry: Option<&Entry>) -> Kept<Listed> {
        self.bucket.decode(entry).into_option().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket;

    #[test]
    fn list_is_its_golden_file() {
        bucket::holds_golden::<Listed>(include_str!("../../tests/golden/forms/user-sessions.json"));
    }
}
