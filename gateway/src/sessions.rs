//! Resolves a session token to its session and user from in-memory tables, without a request to auth-svc.
//!
//! The tables follow two KV buckets ([`vmwatch_bus::follow`]). One holds the live sessions. The other holds each user's
//! current role and scope, and the time since which the user's sessions are valid. While either table is stale, all
//! requests are refused. Because a new session may not have arrived yet, the check of an unknown token waits until the
//! table has caught up with its KV bucket.

mod table;

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::kv::Operation;
use metrics::counter;
use moka::sync::Cache;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    Principal,
    auth::{Token, TokenHash},
    sessions::{
        MOST_USED, SESSION_BUCKET, SessionRecord, SessionsUsed, USER_BUCKET, UsedSession, UsedSessions,
        UserRecord,
    },
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Bus, follow::Follower, jetstream::Bucket, users::UserTable};

use self::table::{Known, SessionTable, decode};
use crate::uses::{Reports, Uses};

/// Deadline of a KV read. JetStream normally answers within milliseconds.
const BUCKET_DEADLINE: Duration = Duration::from_secs(2);
/// Retention and maximum number of tokens that are remembered as unknown, so that they are not read from the KV bucket
/// again. Used only while the bucket holds more sessions than the table can hold.
const MISS_MEMORY: Duration = Duration::from_secs(5);
const MISSES: u64 = 100_000;
/// Maximum number of concurrent reads of the KV bucket of sessions; further checks fail with "try again".
const READS: usize = 64;

/// Reports of uses, without which sessions in use would expire as idle. A session is used often enough that a dropped
/// use is followed by another one well before it expires.
const REPORTS: Reports<SessionsUsed, UsedSession> = Reports {
    most: MOST_USED,
    params: |sessions| UsedSessions { sessions },
    dropped: "vmwatch_session_uses_dropped_total",
};

/// Size and staleness limits of the tables of sessions and users.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionSettings {
    pub(crate) most: usize,
    pub(crate) stale_after: Duration,
}

/// Tables of the live sessions and of all users.
#[derive(Clone)]
pub(crate) struct Sessions {
    bus: Bus,
    /// The session bucket itself.
    bucket: Bucket,
    live: Follower<SessionTable>,
    users: Follower<UserTable>,
    uses: Uses<UsedSession>,
    misses: Cache<TokenHash, ()>,
    reads: Arc<Semaphore>,
}

/// A valid session and the user to whom it belongs.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    known: Arc<Known>,
    user: Arc<UserRecord>,
}

impl Session {
    /// The session as stored in the KV bucket.
    pub(crate) fn record(&self) -> &SessionRecord {
        &self.known.record
    }

    /// The session's user, with current role and scope.
    pub(crate) fn principal(&self) -> &Principal {
        &self.user.principal
    }
}

impl Sessions {
    /// Starts the tasks that follow the KV buckets of sessions and users until shutdown.
    pub(crate) fn follow(bus: &Bus, settings: SessionSettings, shutdown: &CancellationToken) -> Self {
        let stale_after = settings.stale_after;
        let table = SessionTable::new(settings.most);
        let live = Follower::start(bus, SESSION_BUCKET, stale_after, table, shutdown.clone());
        let table = UserTable::default();
        let users = Follower::start(bus, USER_BUCKET, stale_after, table, shutdown.clone());
        Self {
            bus: bus.clone(),
            bucket: Bucket::new(bus, SESSION_BUCKET, BUCKET_DEADLINE),
            live,
            users,
            uses: Uses::report(bus, REPORTS, shutdown.clone()),
            misses: Cache::builder()
                .max_capacity(MISSES)
                .time_to_live(MISS_MEMORY)
                .build(),
            reads: Arc::new(Semaphore::new(READS)),
        }
    }

    /// The table of users, which API tokens need too.
    pub(crate) fn users(&self) -> Follower<UserTable> {
        self.users.clone()
    }

    /// Whether the tables of sessions and users are both up to date.
    pub(crate) fn is_current(&self) -> bool {
        self.live.is_current() && self.users.is_current()
    }

    /// Returns the valid session of a token, or `None`. The check counts as a use of the session.
    pub(crate) async fn check(&self, token: &Token) -> Result<Option<Session>, Fault> {
        let hash = token.hash();
        let found = self.live.find(|table| table.get(&hash)).await;
        let found = match found.map_err(|error| unavailable().caused_by(error))? {
            None if self.live.read().omits_some() => Box::pin(self.read_through(token, hash)).await?,
            found => found,
        };
        let now = unix_millis();
        let Some(known) = found.filter(|known| known.is_live(now)) else {
            return Ok(None);
        };
        let user = self.users.find(|table| table.get(&known.user)).await;
        let user = user.map_err(|error| unavailable().caused_by(error))?;
        let Some(user) = user.filter(|user| user.allows_session_of(known.record.began_at_ms)) else {
            return Ok(None);
        };
        if known.is_use_due(now) {
            self.uses.note(UsedSession {
                key: token.key(),
                used_at_ms: now,
            });
        }
        Ok(Some(Session { known, user }))
    }

    /// Reads a session from the KV bucket instead of the table. The number of concurrent reads is bounded.
    async fn read_through(&self, token: &Token, hash: TokenHash) -> Result<Option<Arc<Known>>, Fault> {
        if self.misses.contains_key(&hash) {
            return Ok(None);
        }
        // Fail early: while the bus is disconnected, the read would block until the caller's deadline.
        if !self.bus.is_connected() {
            return Err(unavailable());
        }
        let _permit = self.reads.try_acquire().map_err(|_| unavailable())?;
        counter!("vmwatch_session_bucket_reads_total").increment(1);
        let entry = self.bucket.entry(&token.key()).await;
        let entry = entry.map_err(|error| unavailable().caused_by(error))?;
        let record = entry
            .filter(|entry| entry.operation == Operation::Put)
            .and_then(|entry| decode(&entry));
        if record.is_none() {
            self.misses.insert(hash, ());
        }
        Ok(record.map(|record| Arc::new(Known::new(record, 0))))
    }
}

fn unavailable() -> Fault {
    Fault::new(
        FaultKind::Unavailable,
        "sessions cannot be checked now; try again shortly",
    )
}
