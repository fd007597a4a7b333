//! The JetStream KV bucket of sessions. Only auth-svc writes to it.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use metrics::counter;
use tracing::debug;
use vmwatch_api::{
    Principal, UserKey,
    auth::{Session, Token, TokenHash},
    sessions::{MOST_USED, SESSION_BUCKET, SessionId, SessionRecord, SessionSummary, UsedSession},
    time::unix_millis,
};
use vmwatch_bus::Bus;

use crate::{
    AuthError,
    bucket::{Bucket, Kept, Spec, Value},
    config::SessionSettings,
    session_index::SessionIndex,
};

/// Size limit of the KV bucket: sufficient for about a million sessions of about 250 bytes each. When it is full,
/// logins fail; the limit keeps sessions from filling the disk.
const BUCKET_BYTES: i64 = 256 << 20;
/// Number of sessions that are read or written concurrently for one request.
const AT_ONCE: usize = 16;

pub(crate) struct Sessions {
    bucket: Bucket,
    index: SessionIndex,
    ttl: Duration,
    idle: Duration,
}

/// The user and the client address of a session that is to be created.
pub(crate) struct NewSession {
    pub(crate) user: UserKey,
    pub(crate) principal: Principal,
    pub(crate) began_at_ms: u64,
    pub(crate) source: Option<String>,
}

impl Sessions {
    /// The configuration of the KV bucket of sessions.
    pub(crate) const fn bucket(settings: &SessionSettings) -> Spec {
        Spec {
            name: SESSION_BUCKET,
            description: "valid sessions of users",
            max_age: settings.ttl,
            max_bytes: BUCKET_BYTES,
            replicas: settings.replicas,
        }
    }

    /// Opens the KV bucket of sessions and the session index, and creates them if they are missing.
    pub(crate) async fn open(bus: &Bus, settings: &SessionSettings) -> Result<Self, AuthError> {
        let bucket = Bucket::open(bus, Self::bucket(settings));
        let (bucket, index) = tokio::try_join!(bucket, SessionIndex::open(bus, settings))?;
        Ok(Self {
            bucket,
            index,
            ttl: settings.ttl,
            idle: settings.idle,
        })
    }

    /// Returns handles to the KV buckets without creating them, for command-line commands.
    pub(crate) fn existing(bus: &Bus, settings: &SessionSettings) -> Self {
        Self {
            bucket: Bucket::existing(bus, SESSION_BUCKET),
            index: SessionIndex::existing(bus, settings),
            ttl: settings.ttl,
            idle: settings.idle,
        }
    }

    /// Creates a session and ends the user's oldest sessions beyond the limit.
    pub(crate) async fn create(&self, new: NewSession) -> Result<Session, AuthError> {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits).map_err(AuthError::Random)?;
        let token = Token::from_random(bits);
        let key = token.key();
        let record = SessionRecord {
            user: new.user,
            began_at_ms: new.began_at_ms,
            expires_at_ms: after(new.began_at_ms, self.ttl),
            last_used_at_ms: new.began_at_ms,
            idle_ends_at_ms: after(new.began_at_ms, self.idle),
            source: new.source,
        };
        let value = serde_json::to_vec(&record)?;
        // The session is added to the index before it is created, because a session missing from the index could not be
        // ended together with its user.
        let beyond = self.index.add(&record.user, &key).await?;
        if !beyond.is_empty() {
            self.end_listed(&record.user, beyond).await?;
        }
        // If further logins of the user ended the session in between, its key has a deletion marker. Writing over the marker
        // would leave a valid session that the index does not list.
        if !self.bucket.create(&key, value).await? {
            debug!("a session was ended by later logins of the user before it was created");
        }
        Ok(Session {
            session_id: token,
            expires_at_ms: record.expires_at_ms,
            principal: new.principal,
        })
    }

    /// Ends a session of the user, with effect on every gateway. It succeeds as well if the session has already ended.
    pub(crate) async fn end(&self, user: &UserKey, token: &Token) -> Result<(), AuthError> {
        self.end_listed(user, vec![token.key()]).await
    }

    /// Ends a session of the user, given by its public id. Returns false if the user has no such session.
    pub(crate) async fn end_by_id(&self, user: &UserKey, id: &SessionId) -> Result<bool, AuthError> {
        let keys = self.index.keys(user).await?;
        let Some(key) = keys.into_iter().find(|key| id_of(key).as_ref() == Some(id)) else {
            return Ok(false);
        };
        let live = self.record(&key).await?.is_some();
        self.end_listed(user, vec![key]).await?;
        Ok(live)
    }

    /// Ends the user's sessions that began before the given time, with effect on every gateway. Returns their number.
    pub(crate) async fn end_before(&self, user: &UserKey, not_before_ms: u64) -> Result<usize, AuthError> {
        let mut over = Vec::new();
        let mut ended = 0;
        for (key, record) in self.listed(user).await? {
            match record {
                Some(record) if record.began_at_ms >= not_before_ms => continue,
                Some(_) => ended += 1,
                None => {}
            }
            over.push(key);
        }
        if !over.is_empty() {
            self.end_listed(user, over).await?;
        }
        Ok(ended)
    }

    /// The user's valid sessions that began at or after the given time, newest first.
    pub(crate) async fn valid(
        &self,
        user: &UserKey,
        not_before_ms: u64,
    ) -> Result<Vec<SessionSummary>, AuthError> {
        let now = unix_millis();
        let live = self
            .listed(user)
            .await?
            .into_iter()
            .rev()
            .filter_map(|(key, record)| {
                let record = record.filter(|record| {
                    record.began_at_ms >= not_before_ms
                        && record.expires_at_ms > now
                        && record.idle_ends_at_ms > now
                })?;
                Some(SessionSummary {
                    id: id_of(&key)?,
                    began_at_ms: record.began_at_ms,
                    last_used_at_ms: record.last_used_at_ms,
                    idle_ends_at_ms: record.idle_ends_at_ms,
                    expires_at_ms: record.expires_at_ms,
                    source: record.source,
                })
            });
        Ok(live.collect())
    }

    /// The keys of the user's sessions, oldest first, each with its record unless the session has ended.
    async fn listed(&self, user: &UserKey) -> Result<Vec<(String, Option<SessionRecord>)>, AuthError> {
        stream::iter(self.index.keys(user).await?)
            .map(|key| async move {
                let record = self.record(&key).await?;
                Ok((key, record))
            })
            .buffered(AT_ONCE)
            .try_collect()
            .await
    }

    /// Records when sessions were used, for at most [`MOST_USED`] sessions.
    pub(crate) async fn note_uses(&self, used: Vec<UsedSession>) -> Result<(), AuthError> {
        stream::iter(used.into_iter().take(MOST_USED))
            .map(Ok)
            .try_for_each_concurrent(AT_ONCE, |used| self.note_use(used))
            .await
    }

    /// Updates a session's record only if it is unchanged since it was read, so a session that has ended in
    /// between is not restored.
    async fn note_use(&self, used: UsedSession) -> Result<(), AuthError> {
        if id_of(&used.key).is_none() {
            return Ok(());
        }
        let entry = self.bucket.entry(&used.key).await?;
        let Value::Whole(mut stored) = self.bucket.decode::<Kept<SessionRecord>>(entry.as_ref()) else {
            return Ok(());
        };
        let record = &mut stored.known;
        // A time in the future is replaced by the present. Clocks differ slightly, and a session must not stay valid
        // longer than its actual use justifies.
        let used_at = used.used_at_ms.min(unix_millis());
        if used_at <= record.last_used_at_ms {
            return Ok(());
        }
        record.last_used_at_ms = used_at;
        record.idle_ends_at_ms = after(used_at, self.idle);
        let value = serde_json::to_vec(&stored)?;
        if self.bucket.write_over(&used.key, value, entry.as_ref()).await? {
            counter!("vmwatch_session_uses_noted_total").increment(1);
        } else {
            debug!("did not record the last use of a session, because the session changed meanwhile");
        }
        Ok(())
    }

    async fn record(&self, key: &str) -> Result<Option<SessionRecord>, AuthError> {
        let entry = self.bucket.entry(key).await?;
        Ok(self.bucket.decode(entry.as_ref()).into_option())
    }

    async fn end_listed(&self, user: &UserKey, keys: Vec<String>) -> Result<(), AuthError> {
        self.end_keys(&keys).await?;
        self.index.remove(user, &keys).await
    }

    async fn end_keys(&self, keys: &[String]) -> Result<(), AuthError> {
        stream::iter(keys)
            .map(Ok)
            .try_for_each_concurrent(AT_ONCE, |key| self.bucket.delete(key))
            .await
    }
}

fn after(moment_ms: u64, span: Duration) -> u64 {
    moment_ms.saturating_add(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}

/// The public id of the session with the given key; `None` if the key is invalid.
fn id_of(key: &str) -> Option<SessionId> {
    let mut hash: TokenHash = [0; 32];
    hex::decode_to_slice(key, &mut hash).ok()?;
    Some(SessionId::from_token_hash(&hash))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket;

    #[test]
    fn recording_a_session_use_preserves_fields_of_newer_version() {
        bucket::assert_matches_golden::<SessionRecord>(include_str!(
            "../../tests/golden/forms/session-record.json"
        ));
    }
}
