//! Maintains the KV bucket of users, the gateways' copy of the users in the database. Only auth-svc writes to this
//! bucket.
//!
//! The database is authoritative. A user is copied in this order: read the KV bucket's entry, read the database, then
//! replace the entry only if it is unchanged. If several replicas copy the same user, the last one to succeed has read
//! the database after all others had written, so an older state never replaces a newer one.

use std::time::Duration;

use vmwatch_api::{
    Principal, Role, Scope, UserKey,
    sessions::{USER_BUCKET, UserRecord},
};
use vmwatch_bus::Bus;

use crate::{
    AuthError,
    bucket::{Bucket, Spec, TRIES, Value},
    store::{User, UserStore},
};

/// Size limit of the KV bucket of users: sufficient for about 400,000 users whose scope is all VMs, or 2,000 users with
/// the longest scopes.
const BUCKET_BYTES: i64 = 64 << 20;

pub(crate) struct Mirror {
    bucket: Bucket,
}

impl Mirror {
    /// The configuration of the KV bucket of users.
    pub(crate) const fn bucket(replicas: usize) -> Spec {
        Spec {
            name: USER_BUCKET,
            description: "copies of users, for gateways",
            // The bucket has no age limit, because a user's record must exist as long as the user.
            max_age: Duration::ZERO,
            max_bytes: BUCKET_BYTES,
            replicas,
        }
    }

    /// Opens the KV bucket of users, and creates it if it is missing.
    pub(crate) async fn open(bus: &Bus, replicas: usize) -> Result<Self, AuthError> {
        Ok(Self {
            bucket: Bucket::open(bus, Self::bucket(replicas)).await?,
        })
    }

    /// Returns a handle to the KV bucket without creating it, for command-line commands.
    pub(crate) fn existing(bus: &Bus) -> Self {
        Self {
            bucket: Bucket::existing(bus, USER_BUCKET),
        }
    }

    /// Copies the user from the database to the KV bucket, or marks the user as removed. Returns the new record.
    pub(crate) async fn sync(
        &self,
        users: &UserStore,
        user: &UserKey,
    ) -> Result<Option<UserRecord>, AuthError> {
        let key = user.bucket_key();
        for _ in 0..TRIES {
            // The order of these steps matters; the documentation of this module explains it.
            let entry = self.bucket.entry(&key).await?;
            let stored = users.find(user).await?;
            let held: Value<UserRecord> = self.bucket.decode(entry.as_ref());
            let wanted = match (stored, &held) {
                (Some(stored), _) => record_of(&stored),
                (None, Value::Nothing) => return Ok(None),
                (None, Value::Whole(held)) => removed(&held.principal.user),
                (None, Value::Broken) => removed(user.as_str()),
            };
            let value = serde_json::to_vec(&wanted)?;
            let wanted = Value::Whole(wanted);
            if held == wanted || self.bucket.write_over(&key, value, entry.as_ref()).await? {
                return Ok(wanted.into_option());
            }
        }
        Err(AuthError::Contended)
    }

    /// Whether the user's record in the KV bucket is equal to the database.
    pub(crate) async fn holds(&self, user: &User) -> Result<bool, AuthError> {
        let entry = self.bucket.entry(&user.key.bucket_key()).await?;
        Ok(self.bucket.decode(entry.as_ref()) == Value::Whole(record_of(user)))
    }

    /// Deletes the record of a removed user from the KV bucket, after the user's sessions have ended.
    pub(crate) async fn forget(&self, user: &UserKey) -> Result<(), AuthError> {
        let entry = self.bucket.entry(&user.bucket_key()).await?;
        if let Value::Whole(UserRecord { removed: true, .. }) = self.bucket.decode(entry.as_ref())
            && let Some(entry) = entry
        {
            // If the entry was changed in between, a new user with the same name was created, whose record must remain.
            self.bucket.delete_read(&entry).await?;
        }
        Ok(())
    }
}

/// Builds the record of a user for the KV bucket.
pub(crate) fn record_of(user: &User) -> UserRecord {
    UserRecord {
        principal: user.principal(),
        sessions_not_before_ms: user.sessions_not_before_ms(),
        created_at_ms: user.created_at_ms(),
        removed: false,
    }
}

fn removed(name: &str) -> UserRecord {
    UserRecord {
        principal: Principal {
            user: name.to_owned(),
            role: Role::Viewer,
            scope: Scope::Only(Vec::new()),
        },
        sessions_not_before_ms: u64::MAX,
        created_at_ms: 0,
        removed: true,
    }
}
