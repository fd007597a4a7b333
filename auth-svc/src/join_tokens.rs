//! Join tokens in a JetStream KV bucket, and a copy of them in memory. Only auth-svc writes to the bucket.

use std::{collections::HashMap, hint::black_box, sync::Arc, time::Duration};

use async_nats::jetstream::{kv::Entry, stream::Config};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::{
    PageRoom,
    enrollment::{
        JOIN_TOKEN_BUCKET, JoinToken, JoinTokenId, JoinTokenRecord, JoinTokenSummary, MAX_JOIN_SECONDS,
        NewJoinToken,
    },
    time::unix_millis,
};
use vmwatch_bus::{
    Bus,
    follow::{Follower, Table},
    provision::ProvisionError,
};

use crate::{
    AuthError,
    bucket::{self, Bucket, Kept, Spec, TRIES, Value},
};

/// Maximum number of stored join tokens. The list of all of them must also fit into one reply ([`PageRoom`]).
const MAX_TOKENS: usize = 1000;
/// Size limit of the KV bucket. The stored tokens need at most 2 MiB; the rest is for deletion markers.
const BUCKET_BYTES: i64 = 8 << 20;
/// Time after which a token disappears unless it was used: a week longer than it can be valid, so that the list shows
/// expired tokens for some time.
const MAX_AGE: Duration = Duration::from_secs(MAX_JOIN_SECONDS as u64 + 7 * 24 * 3600);
/// Time without confirmation after which the copy in memory is stale.
const STALE_AFTER: Duration = Duration::from_secs(10);

pub(crate) struct JoinTokens {
    bucket: Bucket,
    table: Follower<TokenTable>,
}

/// The join tokens in the KV bucket. The size limit of the KV bucket limits their number.
#[derive(Debug, Default)]
pub(crate) struct TokenTable {
    tokens: HashMap<JoinTokenId, Arc<JoinTokenRecord>>,
}

impl Table for TokenTable {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        let Ok(id) = entry.key.parse::<JoinTokenId>() else {
            warn!(
                key = entry.key,
                "ignored a key of the KV bucket of join tokens that is not the id of a token"
            );
            return;
        };
        match bucket::decode(JOIN_TOKEN_BUCKET, Some(entry)).into_option() {
            Some(record) => drop(self.tokens.insert(id, Arc::new(record))),
            None => drop(self.tokens.remove(&id)),
        }
    }
}

impl JoinTokens {
    /// The configuration of the KV bucket of join tokens.
    pub(crate) fn bucket(replicas: usize) -> Config {
        let spec = Spec {
            name: JOIN_TOKEN_BUCKET,
            description: "join tokens, with which agents enrol",
            max_age: MAX_AGE,
            max_bytes: BUCKET_BYTES,
            replicas,
        };
        bucket::with_marker_ttl(spec)
    }

    /// Creates the KV bucket if it is missing.
    pub(crate) async fn ensure_bucket(bus: &Bus, replicas: usize) -> Result<(), ProvisionError> {
        bucket::ensure(bus, &Self::bucket(replicas)).await
    }

    /// Starts following the KV bucket until shutdown.
    pub(crate) fn follow(bus: &Bus, shutdown: &CancellationToken) -> Self {
        let table = TokenTable::default();
        Self {
            bucket: Bucket::existing(bus, JOIN_TOKEN_BUCKET),
            table: Follower::start(bus, JOIN_TOKEN_BUCKET, STALE_AFTER, table, shutdown.clone()),
        }
    }

    /// Waits until all join tokens have been read.
    pub(crate) async fn filled(&self) {
        self.table.filled().await;
    }

    /// Stores a new join token. If there is no room for it, the oldest tokens that are expired, revoked or used up are
    /// removed.
    pub(crate) async fn create(
        &self,
        token: &JoinToken,
        record: JoinTokenRecord,
    ) -> Result<JoinTokenSummary, AuthError> {
        let new = summary(&token.id, &record);
        let removable = room_for(&new, self.list().await?, unix_millis());
        for id in removable.ok_or(AuthError::TooManyJoinTokens)? {
            self.remove_finished(&id).await?;
        }
        let value = serde_json::to_vec(&record)?;
        if self.bucket.create(token.id.as_str(), value).await? {
            Ok(new)
        } else {
            // The ids of tokens are random, so this happens only if the random generator is broken.
            Err(AuthError::Contended)
        }
    }

    /// Removes a token unless an agent can still use it.
    async fn remove_finished(&self, id: &JoinTokenId) -> Result<(), AuthError> {
        let entry = self.bucket.entry(id.as_str()).await?;
        let record: Option<JoinTokenRecord> = self.bucket.decode(entry.as_ref()).into_option();
        if let (Some(entry), Some(record)) = (entry, record)
            && is_finished(&summary(id, &record), unix_millis())
        {
            // If the record changed meanwhile, the token was used or revoked, and the next creation removes it.
            self.bucket.delete_read_with_ttl(&entry).await?;
        }
        Ok(())
    }

    /// All stored tokens, newest first.
    pub(crate) async fn list(&self) -> Result<Vec<JoinTokenSummary>, AuthError> {
        self.table.catch_up().await?;
        let table = self.table.read();
        let mut tokens: Vec<_> = table
            .tokens
            .iter()
            .map(|(id, record)| summary(id, record))
            .collect();
        drop(table);
        tokens.sort_unstable_by(|one, other| {
            (other.created_at_ms, &other.id).cmp(&(one.created_at_ms, &one.id))
        });
        Ok(tokens)
    }

    /// Revokes a token. Succeeds as well if the token is revoked already.
    pub(crate) async fn revoke(&self, id: &JoinTokenId) -> Result<(), AuthError> {
        for _ in 0..TRIES {
            let entry = self.entry(id).await?;
            let Value::Whole(mut token) = self.decode(entry.as_ref()) else {
                return Err(AuthError::NoSuchJoinToken);
            };
            token.known.revoked = true;
            if self.replace(id, &token, entry.as_ref()).await? {
                return Ok(());
            }
        }
        Err(AuthError::Contended)
    }

    /// The record of a token, if there is one.
    pub(crate) async fn find(&self, id: &JoinTokenId) -> Result<Option<Arc<JoinTokenRecord>>, AuthError> {
        Ok(self.table.find(|table| table.tokens.get(id).cloned()).await?)
    }

    /// Reads the latest entry of a token.
    pub(crate) async fn entry(&self, id: &JoinTokenId) -> Result<Option<Entry>, AuthError> {
        self.bucket.entry(id.as_str()).await
    }

    pub(crate) fn decode(&self, entry: Option<&Entry>) -> Value<Kept<JoinTokenRecord>> {
        self.bucket.decode(entry)
    }

    /// Writes a changed record only if it is unchanged since `read`. Returns false if it was changed in between.
    pub(crate) async fn replace(
        &self,
        id: &JoinTokenId,
        token: &Kept<JoinTokenRecord>,
        read: Option<&Entry>,
    ) -> Result<bool, AuthError> {
        let value = serde_json::to_vec(token)?;
        self.bucket.write_over(id.as_str(), value, read).await
    }
}

/// Creates a join token with a random id and secret, and its record.
pub(crate) fn generate(
    new: NewJoinToken,
    created_by: &str,
    by_command: bool,
) -> Result<(JoinToken, JoinTokenRecord), AuthError> {
    let (mut id, mut secret) = ([0; 8], [0; 32]);
    getrandom::fill(&mut id).map_err(AuthError::Random)?;
    getrandom::fill(&mut secret).map_err(AuthError::Random)?;
    let token = JoinToken::from_random(id, secret);
    let now = unix_millis();
    let record = JoinTokenRecord {
        secret_hash: token.secret_hash(),
        created_by: created_by.to_owned(),
        by_command,
        created_at_ms: now,
        expires_at_ms: now.saturating_add(u64::from(new.valid_seconds) * 1000),
        uses: new.uses.get(),
        used: 0,
        vms: new.vms,
        replace: new.replace,
        revoked: false,
        last_use: None,
    };
    Ok((token, record))
}

/// The tokens that must be removed so that the new one can be stored; `None` if removing all finished tokens is not
/// enough. The tokens are sorted from the newest to the oldest.
fn room_for(new: &JoinTokenSummary, stored: Vec<JoinTokenSummary>, now_ms: u64) -> Option<Vec<JoinTokenId>> {
    let mut room = PageRoom::new(MAX_TOKENS);
    let (finished, valid): (Vec<_>, Vec<_>) =
        stored.into_iter().partition(|token| is_finished(token, now_ms));
    let fits = room.take_item(new) && valid.iter().all(|token| room.take_item(token));
    let removed = finished.into_iter().filter(|token| !room.take_item(token));
    fits.then(|| removed.map(|token| token.id).collect())
}

/// Whether no agent can use the token any more.
const fn is_finished(token: &JoinTokenSummary, now_ms: u64) -> bool {
    token.revoked || token.used >= token.uses || now_ms >= token.expires_at_ms
}

/// Whether the secret of the token is the one of this record.
pub(crate) fn has_secret_of(token: &JoinToken, record: &JoinTokenRecord) -> bool {
    let hash = token.secret_hash();
    are_equal(record.secret_hash.as_bytes(), hash.as_bytes())
}

/// Compares two hashes in a time that does not depend on where they differ.
fn are_equal(one: &[u8], other: &[u8]) -> bool {
    let pairs = one.iter().zip(other);
    let difference = pairs.fold(0, |difference, (one, other)| {
        black_box(difference | (one ^ other))
    });
    one.len() == other.len() && difference == 0
}

fn summary(id: &JoinTokenId, record: &JoinTokenRecord) -> JoinTokenSummary {
    JoinTokenSummary {
        id: id.clone(),
        created_by: record.created_by.clone(),
        created_at_ms: record.created_at_ms,
        expires_at_ms: record.expires_at_ms,
        uses: record.uses,
        used: record.used,
        vms: record.vms.clone(),
        replace: record.replace,
        revoked: record.revoked,
    }
}

#[cfg(test)]
mod tests {
    use vmwatch_api::enrollment::JoinVms;

    use super::*;

    fn token(number: u64, vms: JoinVms) -> JoinTokenSummary {
        JoinTokenSummary {
            id: format!("{number:016x}").parse().unwrap(),
            created_by: "ann".to_owned(),
            created_at_ms: number,
            expires_at_ms: 10_000,
            uses: 1,
            used: 0,
            vms,
            replace: false,
            revoked: false,
        }
    }

    #[test]
    fn oldest_finished_tokens_are_removed_to_make_room() {
        let new = token(5000, JoinVms::Any);
        let stored: Vec<_> = (0..1000)
            .rev()
            .map(|number| token(number, JoinVms::Any))
            .collect();
        assert_eq!(room_for(&new, stored[1..].to_vec(), 0), Some(Vec::new()));
        assert_eq!(room_for(&new, stored.clone(), 0), None, "all tokens are valid");
        let all: Vec<_> = room_for(&new, stored.clone(), 10_000).unwrap();
        assert_eq!(all, [stored[999].id.clone()]);
        let mut some = stored;
        some[3].revoked = true;
        some[7].used = 1;
        assert_eq!(room_for(&new, some.clone(), 0), Some(vec![some[7].id.clone()]));
    }

    #[test]
    fn stored_tokens_fit_into_one_reply() {
        let vms = (0..100).map(|number| format!("{number:0>64}").parse().unwrap());
        let vms = JoinVms::Only(vms.collect());
        let mut stored: Vec<_> = (0..200).rev().map(|number| token(number, vms.clone())).collect();
        let new = token(5000, vms);
        assert_eq!(room_for(&new, stored.clone(), 0), None);
        for token in stored.iter_mut().take(190) {
            token.revoked = true;
        }
        let removed = room_for(&new, stored.clone(), 0).unwrap();
        stored.retain(|token| !removed.contains(&token.id));
        stored.push(new);
        let bytes = serde_json::to_vec(&stored).unwrap().len();
        assert!((700_000..786_500).contains(&bytes), "{bytes} bytes");
    }

    #[test]
    fn hashes_are_equal_only_if_all_bytes_are() {
        assert!(are_equal(b"abc", b"abc"));
        for other in [&b"abd"[..], b"bbc", b"ab", b"abcd", b""] {
            assert!(!are_equal(b"abc", other));
        }
    }

    #[test]
    fn recording_a_use_preserves_fields_of_newer_version() {
        bucket::assert_matches_golden::<JoinTokenRecord>(include_str!(
            "../../tests/golden/forms/join-token.json"
        ));
    }
}
