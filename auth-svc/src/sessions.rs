//! The session bucket, as its one writer.

use std::time::Duration;

use async_nats::jetstream::kv::{Operation, Store};
use futures::StreamExt;
use shared::{
    api::{
        Principal, Service,
        auth::{SESSION_BUCKET, Session, SessionRecord, Token},
    },
    bus::{
        Bus,
        provision::{Bucket, ensure_bucket, existing_bucket},
    },
    time::unix_millis,
};

use crate::{AuthError, bucket, config::SessionSettings};

/// About a million sessions: a record takes some 250 bytes. Beyond that logins fail rather than the disk fills.
const BUCKET_BYTES: i64 = 256 << 20;

pub(crate) struct Sessions {
    bucket: Store,
    ttl: Duration,
}

impl Sessions {
    /// The bucket, as the settings have it.
    pub(crate) const fn bucket(settings: &SessionSettings) -> Bucket {
        Bucket {
            name: SESSION_BUCKET,
            description: "live sessions of vmwatch",
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
            ttl: settings.ttl,
        })
    }

    /// The bucket as the service made it, for a command.
    pub(crate) async fn existing(bus: &Bus, settings: &SessionSettings) -> Result<Self, AuthError> {
        let bucket = existing_bucket(bus.jetstream(), SESSION_BUCKET).await?;
        Ok(Self {
            bucket,
            ttl: settings.ttl,
        })
    }

    /// Makes a session.
    pub(crate) async fn create(&self, principal: Principal) -> Result<Session, AuthError> {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits).map_err(AuthError::Random)?;
        let token = Token::from_random(bits);
        let ttl_ms = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        let record = SessionRecord {
            principal: principal.clone(),
            expires_at_ms: unix_millis().saturating_add(ttl_ms),
        };
        let value = serde_json::to_vec(&record)?;
        let written =
            tokio::time::timeout(bucket::DEADLINE, self.bucket.put(token.key(), value.into())).await;
        written
            .map_err(|late| AuthError::Bucket(late.into()))?
            .map_err(|error| AuthError::Bucket(error.into()))?;
        Ok(Session {
            session_id: token,
            expires_at_ms: record.expires_at_ms,
            principal,
        })
    }

    /// Ends a session, on every gateway; one that is none any more is ended as well.
    pub(crate) async fn end(&self, token: &Token) -> Result<(), AuthError> {
        self.end_key(&token.key()).await
    }

    /// As [`Sessions::end`], of the token with this key.
    pub(crate) async fn end_key(&self, key: &str) -> Result<(), AuthError> {
        tokio::time::timeout(bucket::DEADLINE, self.bucket.delete(key))
            .await
            .map_err(AuthError::bucket)?
            .map_err(AuthError::bucket)
    }

    /// Ends every session of the user, on every gateway; how many there were.
    pub(crate) async fn end_all_of(&self, user: &str) -> Result<usize, AuthError> {
        let failed = |error: async_nats::Error| AuthError::Bucket(error);
        // An empty bucket's history never yields a first entry.
        let mut stream = self.bucket.stream.clone();
        if stream
            .info()
            .await
            .map_err(|error| failed(error.into()))?
            .state
            .messages
            == 0
        {
            return Ok(0);
        }
        let mut entries = self
            .bucket
            .watch_with_history(">")
            .await
            .map_err(|error| failed(error.into()))?;
        let mut ended = 0;
        loop {
            let next = tokio::time::timeout(bucket::DEADLINE, entries.next()).await;
            let Some(entry) = next.map_err(|late| failed(late.into()))? else {
                break;
            };
            let entry = entry.map_err(|error| failed(error.into()))?;
            let of_user = entry.operation == Operation::Put
                && serde_json::from_slice::<SessionRecord>(&entry.value)
                    .is_ok_and(|record| record.principal.user == user);
            if of_user {
                self.bucket
                    .delete(&entry.key)
                    .await
                    .map_err(|error| failed(error.into()))?;
                ended += 1;
            }
            if entry.seen_current {
                break;
            }
        }
        Ok(ended)
    }
}
