//! The session index maps each user to the user's sessions, so a login or a change of a user need not read the
//! whole KV bucket of sessions.
//!
//! The index is a separate KV bucket, which gateways cannot read. A session's key is added to the index before the
//! session is created and removed after the session has ended. Therefore every session is listed, but a listed session
//! may have ended already.

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
/// Size limit of the session index: sufficient for about 10,000 users with the default maximum number of sessions.
const BUCKET_BYTES: i64 = 64 << 20;

/// The sessions of one user: their keys in the KV bucket of sessions, oldest first.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Listed {
    keys: Vec<String>,
}

pub(crate) struct SessionIndex {
    bucket: Bucket,
    /// Maximum number of sessions per user.
    most: usize,
}

impl SessionIndex {
    /// The configuration of the KV bucket of the session index.
    pub(crate) const fn bucket(settings: &SessionSettings) -> Spec {
        Spec {
            name: BUCKET,
            description: "index of each user's sessions",
            max_age: settings.ttl,
            max_bytes: BUCKET_BYTES,
            replicas: settings.replicas,
        }
    }

    /// Opens the session index, and creates its KV bucket if it is missing.
    pub(crate) async fn open(bus: &Bus, settings: &SessionSettings) -> Result<Self, AuthError> {
        Ok(Self {
            bucket: Bucket::open(bus, Self::bucket(settings)).await?,
            most: settings.per_user,
        })
    }

    /// Returns a handle to the session index without creating its KV bucket, for command-line commands.
    pub(crate) fn existing(bus: &Bus, settings: &SessionSettings) -> Self {
        Self {
            bucket: Bucket::existing(bus, BUCKET),
            most: settings.per_user,
        }
    }

    /// Adds a session that is about to be created to the index. Returns the user's oldest sessions beyond the limit,
    /// which the caller must end.
    pub(crate) async fn add(&self, user: &UserKey, key: &str) -> Result<Vec<String>, AuthError> {
        self.change(user, |listed| {
            listed.keys.push(key.to_owned());
            let beyond = listed.keys.len().saturating_sub(self.most);
            listed.keys.iter().take(beyond).cloned().collect()
        })
        .await
    }

    /// Removes ended sessions from the index.
    pub(crate) async fn remove(&self, user: &UserKey, keys: &[String]) -> Result<(), AuthError> {
        self.change(user, |listed| listed.keys.retain(|key| !keys.contains(key)))
            .await
    }

    /// The keys of the user's sessions, oldest first.
    pub(crate) async fn keys(&self, user: &UserKey) -> Result<Vec<String>, AuthError> {
        let entry = self.bucket.entry(&user.bucket_key()).await?;
        Ok(self.listed(entry.as_ref()).known.keys)
    }

    /// Reads, changes and writes the list of a user's sessions; retries if another replica changed the list in between.
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

    /// Decodes a user's list of sessions. A list that cannot be decoded counts as empty, so the user can still log
    /// in. The sessions on that list still expire.
    fn listed(&self, entry: Option<&Entry>) -> Kept<Listed> {
        self.bucket.decode(entry).into_option().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket;

    #[test]
    fn session_list_matches_golden_file() {
        bucket::assert_matches_golden::<Listed>(include_str!("../../tests/golden/forms/user-sessions.json"));
    }
}
