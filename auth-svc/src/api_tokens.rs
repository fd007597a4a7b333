//! API tokens in a JetStream KV bucket that gateways follow, and a copy of them in memory. Only auth-svc writes to the
//! bucket.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_nats::jetstream::{kv::Entry, stream::Config};
use futures::{StreamExt, TryStreamExt, stream};
use metrics::counter;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use vmwatch_api::{
    Scope, UserHash, UserKey,
    api_tokens::{
        API_TOKEN_BUCKET, ApiToken, ApiTokenId, ApiTokenList, ApiTokenPage, ApiTokenRecord, ApiTokenSummary,
        MAX_USED_TOKENS, NewApiToken, UsedApiToken,
    },
    first_page,
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
    store::User,
};

/// Maximum number of stored tokens of one owner, and of all owners. Expired tokens count as long as they are stored.
/// Requests that create tokens at the same time may exceed the limits by a few.
const MAX_TOKENS_PER_OWNER: usize = 100;
const MAX_TOKENS: usize = 5000;
/// Size limit of the KV bucket. The stored tokens need at most 40 MiB; the rest is for deletion markers.
const BUCKET_BYTES: i64 = 64 << 20;
/// Time in milliseconds for which an expired token is still listed.
const LISTED_AFTER_EXPIRY_MS: u64 = 30 * 24 * 3600 * 1000;
/// Time without confirmation after which the copy in memory is stale.
const STALE_AFTER: Duration = Duration::from_secs(10);
/// Number of uses that are written concurrently for one report.
const AT_ONCE: usize = 16;

/// A stored token.
pub(crate) type Stored = (ApiTokenId, Arc<ApiTokenRecord>);

pub(crate) struct ApiTokens {
    bucket: Bucket,
    table: Follower<TokenTable>,
}

/// The API tokens in the KV bucket. The size limit of the KV bucket limits their number.
#[derive(Debug, Default)]
struct TokenTable {
    tokens: HashMap<ApiTokenId, Arc<ApiTokenRecord>>,
}

impl Table for TokenTable {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        let Ok(id) = entry.key.parse::<ApiTokenId>() else {
            warn!(
                key = entry.key,
                "ignored a key of the KV bucket of API tokens that is not the id of a token"
            );
            return;
        };
        match bucket::decode(API_TOKEN_BUCKET, Some(entry)).into_option() {
            Some(record) => drop(self.tokens.insert(id, Arc::new(record))),
            None => drop(self.tokens.remove(&id)),
        }
    }
}

impl ApiTokens {
    /// The configuration of the KV bucket of API tokens. It has no age limit, because each token has its own expiry.
    pub(crate) fn bucket(replicas: usize) -> Config {
        let spec = Spec {
            name: API_TOKEN_BUCKET,
            description: "API tokens, for gateways",
            max_age: Duration::ZERO,
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
            bucket: Bucket::existing(bus, API_TOKEN_BUCKET),
            table: Follower::start(bus, API_TOKEN_BUCKET, STALE_AFTER, table, shutdown.clone()),
        }
    }

    /// Stores a new token unless its owner, or all owners together, have too many.
    pub(crate) async fn create(
        &self,
        id: ApiTokenId,
        record: &ApiTokenRecord,
    ) -> Result<ApiTokenSummary, AuthError> {
        self.table.catch_up().await?;
        let stored = self.stored();
        let owner = UserKey::from_name(&record.owner);
        let of_owner = stored.iter().filter(|(_, token)| is_of(token, &owner));
        if stored.len() >= MAX_TOKENS || of_owner.count() >= MAX_TOKENS_PER_OWNER {
            return Err(AuthError::TooManyApiTokens);
        }
        let value = serde_json::to_vec(record)?;
        if self.bucket.create(&id.to_string(), value).await? {
            Ok(summary(id, record))
        } else {
            // The ids of tokens are random, so this happens only if the random generator is broken.
            Err(AuthError::Contended)
        }
    }

    /// A page of the tokens of one user, or of all users, sorted by id.
    pub(crate) async fn list(
        &self,
        page: &ApiTokenPage,
        owner: Option<&UserKey>,
    ) -> Result<ApiTokenList, AuthError> {
        self.table.catch_up().await?;
        let mut stored = self.stored();
        stored.retain(|(id, token)| {
            page.after.is_none_or(|after| *id > after) && owner.is_none_or(|owner| is_of(token, owner))
        });
        stored.sort_unstable_by_key(|(id, _)| *id);
        let summaries = stored.iter().map(|(id, token)| summary(*id, token));
        let (tokens, more) = first_page(summaries, usize::from(page.limit.get()));
        Ok(ApiTokenList { tokens, more })
    }

    /// All stored tokens, as far as the copy in memory has them.
    pub(crate) fn stored(&self) -> Vec<Stored> {
        let table = self.table.read();
        let tokens = table.tokens.iter();
        tokens.map(|(id, token)| (*id, Arc::clone(token))).collect()
    }

    /// Whether the user owns a token with this id.
    pub(crate) async fn has(&self, id: ApiTokenId, owner: &UserKey) -> Result<bool, AuthError> {
        self.table.catch_up().await?;
        let table = self.table.read();
        Ok(table.tokens.get(&id).is_some_and(|token| is_of(token, owner)))
    }

    /// Revokes a token, with effect on every gateway; `owner` is `None` if the token may be that of any user.
    pub(crate) async fn revoke(&self, id: ApiTokenId, owner: Option<&UserKey>) -> Result<(), AuthError> {
        let may_revoke = |token: &Value<ApiTokenRecord>| match (token, owner) {
            (Value::Nothing, _) | (Value::Broken, Some(_)) => false,
            (_, None) => true,
            (Value::Whole(token), Some(owner)) => is_of(token, owner),
        };
        let deleted = self.delete_if(id, may_revoke).await?;
        deleted.ok_or(AuthError::NoSuchApiToken)
    }

    /// Deletes the tokens that expired long ago and those of removed users, out of tokens that were stored
    /// before the owners were read. The owners are given with the times at which they were created.
    pub(crate) async fn sweep(
        &self,
        stored: &[Stored],
        owners: &HashMap<UserHash, u64>,
    ) -> Result<(), AuthError> {
        let now = unix_millis();
        for (id, token) in stored.iter().filter(|(_, token)| is_over(token, owners, now)) {
            let is_still_over = |token: &Value<ApiTokenRecord>| match token {
                Value::Whole(token) => is_over(token, owners, now),
                Value::Nothing | Value::Broken => false,
            };
            if self.delete_if(*id, is_still_over).await?.is_some() {
                counter!("vmwatch_api_tokens_swept_total").increment(1);
                info!(%id, owner = token.owner, "deleted an API token that has expired or has no owner");
            }
        }
        Ok(())
    }

    /// Deletes a token if its latest record meets the condition; `None` if it does not.
    async fn delete_if(
        &self,
        id: ApiTokenId,
        condition: impl Fn(&Value<ApiTokenRecord>) -> bool,
    ) -> Result<Option<()>, AuthError> {
        for _ in 0..TRIES {
            let entry = self.bucket.entry(&id.to_string()).await?;
            let Some(entry) = entry.filter(|entry| condition(&self.bucket.decode(Some(entry)))) else {
                return Ok(None);
            };
            if self.bucket.delete_read_with_ttl(&entry).await? {
                return Ok(Some(()));
            }
        }
        Err(AuthError::Contended)
    }

    /// Records the latest uses of at most [`MAX_USED_TOKENS`] tokens.
    pub(crate) async fn note_uses(&self, used: Vec<UsedApiToken>) -> Result<(), AuthError> {
        stream::iter(used.into_iter().take(MAX_USED_TOKENS))
            .map(Ok)
            .try_for_each_concurrent(AT_ONCE, |used| self.note_use(used))
            .await
    }

    /// Updates a token's record only if it is unchanged since it was read, so a token that was revoked in between is
    /// not restored.
    async fn note_use(&self, UsedApiToken { id, mut last_use }: UsedApiToken) -> Result<(), AuthError> {
        let key = id.to_string();
        let entry = self.bucket.entry(&key).await?;
        let Value::Whole(mut stored) = self.bucket.decode::<Kept<ApiTokenRecord>>(entry.as_ref()) else {
            return Ok(());
        };
        // Clocks differ slightly; a use in the future would hide later ones.
        last_use.at_ms = last_use.at_ms.min(unix_millis());
        let known = stored.known.last_use.as_ref();
        if known.is_some_and(|known| known.at_ms >= last_use.at_ms) {
            return Ok(());
        }
        stored.known.last_use = Some(last_use);
        let value = serde_json::to_vec(&stored)?;
        if !self.bucket.write_over(&key, value, entry.as_ref()).await? {
            debug!(%id, "did not record the last use of an API token, because its record changed meanwhile");
        }
        Ok(())
    }
}

/// Creates a token with a random id and secret.
pub(crate) fn generate() -> Result<ApiToken, AuthError> {
    let (mut id, mut secret) = ([0; 8], [0; 32]);
    getrandom::fill(&mut id).map_err(AuthError::Random)?;
    getrandom::fill(&mut secret).map_err(AuthError::Random)?;
    Ok(ApiToken::from_random(id, secret))
}

/// The record of a new token, unless it would permit more than its owner may do.
pub(crate) fn record_for(
    token: &ApiToken,
    new: &NewApiToken,
    owner: &User,
    created_by: &str,
) -> Result<ApiTokenRecord, AuthError> {
    if new.role > owner.role {
        let excess = format!("{} has the role {}", owner.name, owner.role);
        return Err(AuthError::TokenBeyondOwner(excess));
    }
    // The scope `all` is that of the owner at the time of each request.
    if let Scope::Only(instances) = &new.scope
        && let Some(outside) = instances.iter().find(|instance| !owner.scope.allows(instance))
    {
        let excess = format!("the VM {outside} is outside the scope of {}", owner.name);
        return Err(AuthError::TokenBeyondOwner(excess));
    }
    let now = unix_millis();
    Ok(ApiTokenRecord {
        secret_hash: token.secret_hash(),
        name: new.name.clone(),
        owner: owner.name.to_string(),
        owner_created_at_ms: owner.created_at_ms(),
        created_by: created_by.to_owned(),
        created_at_ms: now,
        expires_at_ms: now.saturating_add(u64::from(new.valid_seconds) * 1000),
        role: new.role,
        scope: new.scope.clone(),
        access: new.access,
        last_use: None,
    })
}

fn is_of(token: &ApiTokenRecord, owner: &UserKey) -> bool {
    UserKey::from_name(&token.owner) == *owner
}

/// Whether a token expired long ago, or its owner was removed.
fn is_over(token: &ApiTokenRecord, owners: &HashMap<UserHash, u64>, now_ms: u64) -> bool {
    let owner = owners.get(&UserKey::from_name(&token.owner).hash());
    owner != Some(&token.owner_created_at_ms)
        || now_ms > token.expires_at_ms.saturating_add(LISTED_AFTER_EXPIRY_MS)
}

fn summary(id: ApiTokenId, record: &ApiTokenRecord) -> ApiTokenSummary {
    ApiTokenSummary {
        id,
        name: record.name.clone(),
        owner: record.owner.clone(),
        created_by: record.created_by.clone(),
        created_at_ms: record.created_at_ms,
        expires_at_ms: record.expires_at_ms,
        role: record.role,
        scope: record.scope.clone(),
        access: record.access,
        last_use: record.last_use.clone(),
    }
}

#[cfg(test)]
mod tests {
    use mongodb::bson::DateTime;
    use vmwatch_api::{Role, UserName, api_tokens::ApiTokenAccess};

    use super::*;

    fn owner(role: Role, scope: Scope) -> User {
        let name: UserName = "Ann".parse().unwrap();
        User {
            key: name.key(),
            name,
            password_hash: String::new(),
            role,
            scope,
            service: false,
            created: DateTime::from_millis(1000),
            sessions_not_before: DateTime::from_millis(1000),
        }
    }

    fn only(ids: &[&str]) -> Scope {
        Scope::Only(ids.iter().map(|id| id.parse().unwrap()).collect())
    }

    fn record(role: Role, scope: Scope, owner: &User) -> Result<ApiTokenRecord, AuthError> {
        let new = NewApiToken {
            name: "Grafana".parse().unwrap(),
            valid_seconds: 60,
            role,
            scope,
            access: ApiTokenAccess::Full,
            service_account: None,
        };
        record_for(&generate().unwrap(), &new, owner, "Ann")
    }

    #[test]
    fn new_token_cannot_permit_more_than_its_owner_may_do() {
        let operator = owner(Role::Operator, only(&["vm-1", "vm-2"]));
        let token = record(Role::Operator, only(&["vm-2"]), &operator).unwrap();
        assert_eq!((token.owner.as_str(), token.owner_created_at_ms), ("Ann", 1000));
        assert!(record(Role::Viewer, Scope::All, &operator).is_ok());
        for (role, scope) in [(Role::Admin, Scope::All), (Role::Viewer, only(&["vm-2", "vm-3"]))] {
            let refused = record(role, scope, &operator);
            assert!(
                matches!(refused, Err(AuthError::TokenBeyondOwner(_))),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn tokens_without_owner_and_tokens_that_expired_long_ago_are_swept() {
        let ann = owner(Role::Viewer, Scope::All);
        let mut token = record(Role::Viewer, Scope::All, &ann).unwrap();
        token.expires_at_ms = 5000;
        let owners = |created_ms| HashMap::from([(ann.key.hash(), created_ms)]);
        assert!(!is_over(&token, &owners(1000), 5000 + LISTED_AFTER_EXPIRY_MS));
        assert!(is_over(&token, &owners(1000), 5001 + LISTED_AFTER_EXPIRY_MS));
        assert!(is_over(&token, &owners(2000), 0), "another user got the name");
        assert!(is_over(&token, &HashMap::new(), 0));
    }

    #[test]
    fn recording_a_use_preserves_fields_of_newer_version() {
        bucket::assert_matches_golden::<ApiTokenRecord>(include_str!(
            "../../tests/golden/forms/api-token.json"
        ));
    }
}
