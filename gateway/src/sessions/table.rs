//! The table of live sessions.

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

/// A use is reported at most once per this fraction of the idle timeout, within the bounds below.
const REPORTS_PER_TIMEOUT: u64 = 20;
const MIN_REPORT_INTERVAL_MS: u64 = 250;
const MAX_REPORT_INTERVAL_MS: u64 = 60_000;

/// A session in the table.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) record: SessionRecord,
    /// The key of its user.
    pub(super) user: UserHash,
    /// The last use on this gateway that was reported, Unix milliseconds; it counts even if auth-svc did not receive
    /// it.
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

    /// Whether a use at this time must be reported; if so, the caller reports it.
    pub(super) fn is_use_due(&self, now_ms: u64) -> bool {
        let reported = self.reported_ms.load(Ordering::Relaxed);
        let step =
            (self.timeout_ms() / REPORTS_PER_TIMEOUT).clamp(MIN_REPORT_INTERVAL_MS, MAX_REPORT_INTERVAL_MS);
        let due = reported.max(self.record.last_used_at_ms).saturating_add(step);
        // Of concurrent requests, one reports.
        now_ms >= due
            && self
                .reported_ms
                .compare_exchange(reported, now_ms, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// The session's idle timeout.
    const fn timeout_ms(&self) -> u64 {
        self.record
            .idle_ends_at_ms
            .saturating_sub(self.record.last_used_at_ms)
    }
}

/// The live sessions, up to a maximum number.
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

    /// Whether the bucket may hold live sessions that are not in the table.
    pub(super) const fn omits_some(&self) -> bool {
        self.omits_some
    }

    fn insert(&mut self, token: TokenHash, record: SessionRecord) {
        let before = self.sessions.get(&token);
        // A full table still works: missing sessions are read from the bucket.
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
                "ignored a key that is not a hash in the bucket of sessions"
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
        // The bucket's age limit removes entries without an event.
        let now = unix_millis();
        self.sessions.retain(|_, known| known.is_live(now));
        gauge!("vmwatch_sessions").set(u32::try_from(self.sessions.len()).map_or(f64::MAX, f64::from));
    }

    /// Requires a tenth of the table to be free, because rereading the bucket costs more than reading some sessions
    /// individually.
    fn has_room_for_omitted(&self) -> bool {
        self.omits_some && self.sessions.len() < self.most / 10 * 9
    }
}

pub(super) fn decode(entry: &Entry) -> Option<SessionRecord> {
    serde_json::from_slice(&entry.value)
        .inspect_err(|error| {
            counter!("vmwatch_broken_records_total", "bucket" => SESSION_BUCKET).increment(1);
            warn!(%error, "decoding a session failed; refusing it");
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
    fn ends_session_that_was_idle_or_expired() {
        let known = used_at(NOW);
        assert!(known.is_live(NOW + 3_599_999) && !known.is_live(NOW + 3_600_000));
        // A use on this gateway counts even if auth-svc does not know of it.
        assert!(known.is_use_due(NOW + 3_000_000));
        assert!(known.is_live(NOW + 6_599_999) && !known.is_live(NOW + 6_600_000));
        assert!(known.is_use_due(NOW + 6_500_000) && !known.is_live(NOW + 10_000_000));
    }

    #[test]
    fn reports_uses_once_a_minute() {
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
    fn asks_for_omitted_sessions_once_there_is_room() {
        let mut table = table_of(10, 10);
        assert!(!table.omits_some() && !table.has_room_for_omitted());
        table = table_of(10, 11);
        assert!(table.omits_some() && !table.has_room_for_omitted());
        table.sessions.retain(|token, _| token[0] >= 2);
        assert!(table.has_room_for_omitted());
        assert!(!table.emptied().omits_some());
    }
}
