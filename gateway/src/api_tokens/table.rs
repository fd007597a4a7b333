//! In-memory table of the API tokens.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use async_nats::jetstream::kv::{Entry, Operation};
use metrics::{counter, gauge};
use tracing::warn;
use vmwatch_api::{
    Principal, UserHash, UserKey,
    api_tokens::{API_TOKEN_BUCKET, ApiTokenId, ApiTokenRecord},
    sessions::UserRecord,
};
use vmwatch_bus::follow::{StreamState, Table};

/// Minimum interval between two reports of this gateway that a token was used.
const REPORT_INTERVAL_MS: u64 = 60_000;

/// An API token in the gateway's table.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) record: ApiTokenRecord,
    /// Key of the token's owner in the KV bucket of users.
    pub(super) owner: UserHash,
    /// What the token permits, computed for this version of the owner. Intersecting two scopes at each request would
    /// cost more than all other checks.
    permitted: Mutex<Option<(Arc<UserRecord>, Arc<Principal>)>>,
    /// Time of the last use that this gateway has reported, in Unix milliseconds.
    reported_ms: AtomicU64,
}

impl Known {
    fn new(record: ApiTokenRecord, reported_ms: u64) -> Self {
        Self {
            owner: UserKey::from_name(&record.owner).hash(),
            record,
            permitted: Mutex::default(),
            reported_ms: AtomicU64::new(reported_ms),
        }
    }

    /// The principal of requests with the token; `None` if the owner was removed.
    pub(super) fn principal(&self, owner: &Arc<UserRecord>) -> Option<Arc<Principal>> {
        let mut permitted = self.permitted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, principal)) = &*permitted
            && Arc::ptr_eq(known, owner)
        {
            return Some(Arc::clone(principal));
        }
        let principal = Arc::new(self.record.principal(owner)?);
        *permitted = Some((Arc::clone(owner), Arc::clone(&principal)));
        Some(principal)
    }

    /// Whether a use of the token at this time must be reported. If so, it is marked as reported, and the caller must
    /// report it.
    pub(super) fn is_use_due(&self, now_ms: u64) -> bool {
        let reported = self.reported_ms.load(Ordering::Relaxed);
        // Of several concurrent requests with a token, only one reports that the token was used.
        now_ms >= reported.saturating_add(REPORT_INTERVAL_MS)
            && self
                .reported_ms
                .compare_exchange(reported, now_ms, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
}

/// Table of the API tokens. auth-svc limits their number.
#[derive(Debug, Default)]
pub(super) struct TokenTable {
    tokens: HashMap<ApiTokenId, Arc<Known>>,
}

impl TokenTable {
    pub(super) fn get(&self, id: ApiTokenId) -> Option<Arc<Known>> {
        self.tokens.get(&id).cloned()
    }

    fn insert(&mut self, id: ApiTokenId, record: ApiTokenRecord) {
        let before = self.tokens.get(&id);
        let reported = before.map_or(0, |known| known.reported_ms.load(Ordering::Relaxed));
        self.tokens.insert(id, Arc::new(Known::new(record, reported)));
    }
}

impl Table for TokenTable {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        let Ok(id) = entry.key.parse::<ApiTokenId>() else {
            warn!(
                key = entry.key,
                "ignored an entry in the KV bucket of API tokens: its key is not the id of a token"
            );
            return;
        };
        let record = match entry.operation {
            Operation::Put => decode(entry),
            Operation::Delete | Operation::Purge => None,
        };
        match record {
            Some(record) => self.insert(id, record),
            None => drop(self.tokens.remove(&id)),
        }
    }

    fn confirmed(&mut self, _bucket: &StreamState) {
        gauge!("vmwatch_api_tokens").set(u32::try_from(self.tokens.len()).map_or(f64::MAX, f64::from));
    }
}

fn decode(entry: &Entry) -> Option<ApiTokenRecord> {
    serde_json::from_slice(&entry.value)
        .inspect_err(|error| {
            counter!("vmwatch_broken_records_total", "bucket" => API_TOKEN_BUCKET).increment(1);
            warn!(%error, key = entry.key, "decoding a stored API token failed; requests with this token are refused");
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use vmwatch_api::{Role, Scope, api_tokens::ApiToken};

    use super::*;

    fn record() -> ApiTokenRecord {
        serde_json::from_str(include_str!("../../../tests/golden/forms/api-token.json")).unwrap()
    }

    fn owner(role: Role) -> Arc<UserRecord> {
        Arc::new(UserRecord {
            principal: Principal {
                user: "Ann".to_owned(),
                role,
                scope: Scope::All,
            },
            sessions_not_before_ms: 0,
            created_at_ms: record().owner_created_at_ms,
            removed: false,
        })
    }

    #[test]
    fn principal_follows_each_change_of_the_owner() {
        let known = Known::new(
            ApiTokenRecord {
                role: Role::Operator,
                ..record()
            },
            0,
        );
        let admin = owner(Role::Admin);
        let first = known.principal(&admin).unwrap();
        assert_eq!(first.role, Role::Operator);
        assert!(Arc::ptr_eq(&first, &known.principal(&admin).unwrap()));
        assert_eq!(known.principal(&owner(Role::Viewer)).unwrap().role, Role::Viewer);
        let mut removed = (*admin).clone();
        removed.removed = true;
        assert!(known.principal(&Arc::new(removed)).is_none());
    }

    #[test]
    fn use_of_token_is_reported_at_most_once_a_minute_even_after_its_record_changes() {
        let id = ApiToken::from_random([1; 8], [2; 32]).id;
        let mut table = TokenTable::default();
        table.insert(id, record());
        let known = table.get(id).unwrap();
        assert!(known.is_use_due(REPORT_INTERVAL_MS) && !known.is_use_due(2 * REPORT_INTERVAL_MS - 1));
        table.insert(id, record());
        let known = table.get(id).unwrap();
        assert!(!known.is_use_due(2 * REPORT_INTERVAL_MS - 1) && known.is_use_due(2 * REPORT_INTERVAL_MS));
    }
}
