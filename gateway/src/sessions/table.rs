//! In-memory table of the live sessions.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_nats::jetstream::kv::{Entry, Operation};
use metrics::{counter, gauge};
use tracing::warn;
use vmwatch_api::{
    UserHash,
    auth::TokenHash,
    sessions::{SESSION_BUCKET, SessionRecord},
    time::unix_millis,
};
use vmwatch_bus::follow::{StreamState, Table};

/// Maximum number of reports, per idle timeout, that a session was used; the interval between two reports is kept
/// within the bounds below.
const REPORTS_PER_TIMEOUT: u64 = 20;
const MIN_REPORT_INTERVAL_MS: u64 = 250;
const MAX_REPORT_INTERVAL_MS: u64 = 60_000;

/// A session in the gateway's table of live sessions.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) record: SessionRecord,
    /// Key of the session's user in the KV bucket of users.
    pub(super) user: UserHash,
    /// Time of the last use of the session that this gateway has reported, in Unix milliseconds. This use keeps the
    /// session alive even if auth-svc did not receive the report.
    reported_ms: AtomicU64,
}

impl Known {
    pub(super) fn new(record: SessionRecord, reported_ms: u64) -> Self {
        Self {
            user: record.user.hash(),
            record,
            reported_ms: AtomicU64::new(reported_ms),
        }
    }

    /// Whether the session has neither expired nor been idle for too long.
    pub(super) fn is_live(&self, now_ms: u64) -> bool {
        let reported = self.reported_ms.load(Ordering::Relaxed);
        let idle_end = self
            .record
            .idle_ends_at_ms
            .max(reported.saturating_add(self.timeout_ms()));
        now_ms < self.record.expires_at_ms && now_ms < idle_end
    }

    /// Whether a use of the session at this time must be reported. If so, it is marked as reported, and the caller must
    /// report it.
    pub(super) fn is_use_due(&self, now_ms: u64) -> bool {
        let reported = self.reported_ms.load(Ordering::Relaxed);
        let step =
            (self.timeout_ms() / REPORTS_PER_TIMEOUT).clamp(MIN_REPORT_INTERVAL_MS, MAX_REPORT_INTERVAL_MS);
        let due = reported.max(self.record.last_used_at_ms).saturating_add(step);
        // Of several concurrent requests of a session, only one reports that the session was used.
        now_ms >= due
            && self
                .reported_ms
                .compare_exchange(reported, now_ms, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Idle timeout of the session, in milliseconds.
    const fn timeout_ms(&self) -> u64 {
        self.record
            .idle_ends_at_ms
            .saturating_sub(self.record.last_used_at_ms)
    }
}

/// Table of the live sessions, up to a maximum number.
#[derive(Debug)]
pub(super) struct SessionTable {
    most: usize,
    sessions: HashMap<TokenHash, Arc<Known>>,
    /// Whether a session was left out because the table was full.
    omits_some: bool,
}

impl SessionTable {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            sessions: HashMap::new(),
            omits_some: false,
        }
    }

    pub(super) fn get(&self, token: &TokenHash) -> Option<Arc<Known>> {
        self.sessions.get(token).cloned()
    }

    /// Whether the KV bucket may hold live sessions that are not in the table.
    pub(super) const fn omits_some(&self) -> bool {
        self.omits_some
    }

    fn insert(&mut self, token: TokenHash, record: SessionRecord) {
        let before = self.sessions.get(&token);
        // Requests still work when the table is full: sessions that are not in it are read from the KV bucket.
        if before.is_none() && self.sessions.len() >= self.most {
            counter!("vmwatch_sessions_beyond_table_total").increment(1);
            self.omits_some = true;
            return;
        }
        let reported = before.map_or(0, |known| known.reported_ms.load(Ordering::Relaxed));
        self.sessions
            .insert(token, Arc::new(Known::new(record, reported)));
    }
}

impl Table for SessionTable {
    fn emptied(&self) -> Self {
        Self::new(self.most)
    }

    fn apply(&mut self, entry: &Entry) {
        let mut token: TokenHash = [0; 32];
        if hex::decode_to_slice(&entry.key, &mut token).is_err() {
            warn!(
                key = entry.key,
                "ignored an entry in the KV bucket of sessions: its key is not a token hash"
            );
            return;
        }
        let record = (entry.operation == Operation::Put)
            .then(|| decode(entry))
            .flatten()
            .filter(|record| record.expires_at_ms > unix_millis());
        match record {
            Some(record) => self.insert(token, record),
            None => drop(self.sessions.remove(&token)),
        }
    }

    fn confirmed(&mut self, _bucket: &StreamState) {
        // The KV bucket's age limit deletes entries without notifying its followers, so expired sessions are removed
        // here.
        let now = unix_millis();
        self.sessions.retain(|_, known| known.is_live(now));
        gauge!("vmwatch_sessions").set(u32::try_from(self.sessions.len()).map_or(f64::MAX, f64::from));
    }

    /// Whether at least a tenth of the table is free. Rereading the whole KV bucket for fewer sessions would cost more
    /// than reading those sessions one by one.
    fn has_room_for_omitted(&self) -> bool {
        self.omits_some && self.sessions.len() < self.most / 10 * 9
    }
}

pub(super) fn decode(entry: &Entry) -> Option<SessionRecord> {
    serde_json::from_slice(&entry.value)
        .inspect_err(|error| {
            counter!("vmwatch_broken_records_total", "bucket" => SESSION_BUCKET).increment(1);
            warn!(%error, "decoding a stored session failed; requests with this session are refused");
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use vmwatch_api::UserKey;

    use super::*;

    const NOW: u64 = 1_000_000_000;

    fn used_at(last_used_at_ms: u64) -> Known {
        let record = SessionRecord {
            user: UserKey::from_name("eve"),
            began_at_ms: NOW,
            expires_at_ms: NOW + 10_000_000,
            last_used_at_ms,
            idle_ends_at_ms: last_used_at_ms + 3_600_000,
            source: None,
        };
        Known::new(record, 0)
    }

    #[test]
    fn idle_or_expired_session_is_not_live() {
        let known = used_at(NOW);
        assert!(known.is_live(NOW + 3_599_999) && !known.is_live(NOW + 3_600_000));
        // A use on this gateway keeps the session alive even if auth-svc does not know of the use.
        assert!(known.is_use_due(NOW + 3_000_000));
        assert!(known.is_live(NOW + 6_599_999) && !known.is_live(NOW + 6_600_000));
        assert!(known.is_use_due(NOW + 6_500_000) && !known.is_live(NOW + 10_000_000));
    }

    #[test]
    fn use_of_session_is_reported_at_most_once_a_minute() {
        let known = used_at(NOW);
        assert!(!known.is_use_due(NOW + 59_999));
        assert!(known.is_use_due(NOW + 60_000) && !known.is_use_due(NOW + 60_001));
        assert!(!known.is_use_due(NOW + 119_999) && known.is_use_due(NOW + 120_000));
    }

    fn table_of(most: usize, count: u8) -> SessionTable {
        let mut table = SessionTable::new(most);
        for token in 0..count {
            let mut record = used_at(0).record;
            record.expires_at_ms = u64::MAX;
            record.idle_ends_at_ms = u64::MAX;
            table.insert([token; 32], record);
        }
        table
    }

    #[test]
    fn full_session_table_is_reloaded_once_it_has_room() {
        let mut table = table_of(10, 10);
        assert!(!table.omits_some() && !table.has_room_for_omitted());
        table = table_of(10, 11);
        assert!(table.omits_some() && !table.has_room_for_omitted());
        table.sessions.retain(|token, _| token[0] >= 2);
        assert!(table.has_room_for_omitted());
        assert!(!table.emptied().omits_some());
    }
}
