//! The sessions of this process. The process checks them as the gateway does: it looks them up in a table in its own
//! memory.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use vmwatch_api::{
    UserKey,
    auth::{Token, TokenHash},
    sessions::SessionRecord,
    time::unix_millis,
};

const LIFETIME: Duration = Duration::from_hours(12);

pub(crate) struct Sessions {
    table: RwLock<HashMap<TokenHash, Arc<SessionRecord>>>,
    checked: bool,
}

impl Sessions {
    /// Creates a table with this session and `others` further sessions.
    pub(crate) fn with(session: &str, others: u32, checked: bool) -> anyhow::Result<Self> {
        let sessions = Self {
            table: RwLock::default(),
            checked,
        };
        sessions.add(session.parse()?, "bench");
        for other in 0..others {
            sessions.add(Token::from_random(u128::from(other).to_be_bytes()), "other");
        }
        Ok(sessions)
    }

    /// Adds a session to the table.
    pub(crate) fn add(&self, token: Token, user: &str) {
        let lifetime = u64::try_from(LIFETIME.as_millis()).unwrap_or(u64::MAX);
        let now = unix_millis();
        let record = SessionRecord {
            user: UserKey::from_name(user),
            began_at_ms: now,
            expires_at_ms: now + lifetime,
            last_used_at_ms: now,
            idle_ends_at_ms: now + lifetime,
            source: None,
        };
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.insert(token.hash(), Arc::new(record));
    }

    /// Returns whether the session exists and has not expired.
    pub(crate) fn knows(&self, session: &str) -> bool {
        if !self.checked {
            return true;
        }
        let Ok(token) = session.parse::<Token>() else {
            return false;
        };
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let found = table.get(&token.hash()).cloned();
        found.is_some_and(|record| record.expires_at_ms > unix_millis())
    }
}
