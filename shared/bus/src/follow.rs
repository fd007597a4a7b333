//! Following a bucket: a table in memory that holds what the bucket holds, and knows when it cannot be trusted.
//!
//! - A watch alone fills the table: a late read can never bring a deleted entry back.
//! - A broken watch looks like a quiet one. Each second the server is asked for the bucket's last sequence; a table that
//!   could not be confirmed for too long is not current.
//! - After each reconnection the whole bucket is read again, into a table beside the one in use.
//! - A store that went back (power loss, a restored backup) has a lower last sequence than before, another creation time,
//!   or no such bucket. Until the bucket has been read again the table is not current.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::{
    ErrorCode,
    context::GetStreamErrorKind,
    kv::{Entry, Store},
    stream::{DirectGetErrorKind, Info},
};
use futures::StreamExt;
use metrics::{counter, gauge};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::Bus;

/// JetStream answers in milliseconds or not at all.
const DEADLINE: Duration = Duration::from_secs(2);
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The least time between two questions on behalf of entries that are not in the table.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What a bucket is followed into.
pub trait Table: Send + Sync + 'static {
    /// A table with the same bounds and no entries.
    #[must_use]
    fn emptied(&self) -> Self;

    /// Takes in a change of the bucket.
    fn apply(&mut self, entry: &Entry);

    /// Called about once a second while the table holds all that the bucket holds.
    fn confirmed(&mut self, _bucket: &StreamState) {}

    /// Whether entries were left out for which there is room by now: the bucket is then read again.
    fn has_room_for_omitted(&self) -> bool {
        false
    }
}

/// What the server says of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamState {
    /// When the stream was created, Unix nanoseconds.
    pub created_ns: i128,
    /// The highest sequence that was ever given to a message.
    pub last_sequence: u64,
    /// Messages that are still there.
    pub messages: u64,
    /// Their size.
    pub bytes: u64,
}

impl From<&Info> for StreamState {
    fn from(info: &Info) -> Self {
        Self {
            created_ns: info.created.unix_timestamp_nanos(),
            last_sequence: info.state.last_sequence,
            messages: info.state.messages,
            bytes: info.state.bytes,
        }
    }
}

impl StreamState {
    /// Whether a stream that was seen like `before` cannot have become this one: its store went back.
    pub const fn is_rolled_back_from(&self, before: &Self) -> bool {
        self.created_ns != before.created_ns || self.last_sequence < before.last_sequence
    }

    /// The sequence up to which a reader must have come to have all that is there.
    const fn newest(&self) -> u64 {
        if self.messages == 0 { 0 } else { self.last_sequence }
    }
}

/// The table is stale, or its store went back and is being read again.
#[derive(Debug, thiserror::Error)]
#[error("the copy of the bucket {bucket} is not current")]
pub struct NotCurrent {
    bucket: &'static str,
    #[source]
    cause: Option<async_nats::Error>,
}

/// Follows a bucket into a table; clones share it.
pub struct Follower<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Clone for Follower<T> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

struct Shared<T> {
    bus: Bus,
    bucket: &'static str,
    stale_after: Duration,
    table: RwLock<T>,
    store: RwLock<Option<Store>>,
    progress: watch::Sender<Progress>,
    reloads: watch::Sender<()>,
    started: Instant,
    /// When the table was last known to hold all that the bucket holds: milliseconds after `started`, plus one; 0 for
    /// never.
    confirmed: AtomicU64,
    /// The bucket as it was last seen.
    past: Mutex<Option<StreamState>>,
    /// Tells the task that follows that somebody else saw the store go back.
    went_back: Notify,
    looks: tokio::sync::Mutex<Looks>,
}

/// How far the table has come.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// The connection over which it was read as a whole; 0 for none.
    connection: u64,
    /// The last sequence that it holds.
    seen: u64,
}

/// When the bucket was asked last, and when for the last time with success.
#[derive(Default)]
struct Looks {
    last: Option<Instant>,
    whole: Option<Instant>,
}

/// Why one watch ended.
enum Ended {
    /// The connection is another: what was missed is unknown.
    Reconnected,
    /// The table has room for entries that it left out.
    RoomForOmitted,
    RolledBack,
    Broken(async_nats::Error),
}

impl<E: Into<async_nats::Error>> From<E> for Ended {
    fn from(error: E) -> Self {
        Self::Broken(error.into())
    }
}

impl<T: Table> Follower<T> {
    /// Starts to follow the bucket, until shutdown. Without a confirmation for `stale_after` the table is not current.
    pub fn start(
        bus: &Bus,
        bucket: &'static str,
        stale_after: Duration,
        table: T,
        shutdown: CancellationToken,
    ) -> Self {
        let shared = Arc::new(Shared {
            bus: bus.clone(),
            bucket,
            stale_after,
            table: RwLock::new(table),
            store: RwLock::new(None),
            progress: watch::Sender::new(Progress::default()),
            reloads: watch::Sender::new(()),
            started: Instant::now(),
            confirmed: AtomicU64::new(0),
            past: Mutex::new(None),
            went_back: Notify::new(),
            looks: tokio::sync::Mutex::default(),
        });
        let following = Arc::clone(&shared);
        tokio::spawn(async move { shutdown.run_until_cancelled(following.follow_for_ever()).await });
        Self { shared }
    }

    /// Whether the table was filled, and was confirmed lately.
    pub fn is_current(&self) -> bool {
        self.shared
            .age()
            .is_some_and(|age| age <= self.shared.stale_after)
    }

    /// Waits until the bucket was read as a whole.
    pub async fn filled(&self) {
        let mut progress = self.shared.progress.subscribe();
        // Fails only if the sender is gone, and this holds it.
        let _ = progress.wait_for(|progress| progress.connection != 0).await;
    }

    /// The table, current or not.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.shared.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table, for changes that the bucket does not tell.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.shared.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bucket, for reads of what the table has no room for; `None` before it was first reached.
    pub fn store(&self) -> Option<Store> {
        let store = self.shared.store.read().unwrap_or_else(PoisonError::into_inner);
        store.clone()
    }

    /// Changes whenever the bucket was read as a whole.
    pub fn reloads(&self) -> watch::Receiver<()> {
        self.shared.reloads.subscribe()
    }

    /// Finds something in the table. If it is not there, the table first catches up with the bucket: callers that wait
    /// share one question to the server, and questions have a least distance in time.
    pub async fn find<R>(&self, find: impl Fn(&T) -> Option<R>) -> Result<Option<R>, NotCurrent> {
        if !self.is_current() {
            return Err(self.shared.not_current(None));
        }
        if let Some(found) = find(&self.read()) {
            return Ok(Some(found));
        }
        // Boxed, as it is rare: every request's future would be as large as this one's.
        let caught_up = Box::pin(self.shared.catch_up(|| find(&self.read()).is_some())).await;
        caught_up.map_err(|cause| self.shared.not_current(Some(cause)))?;
        if !self.is_current() {
            return Err(self.shared.not_current(None));
        }
        Ok(find(&self.read()))
    }
}

impl<T> Shared<T> {
    const fn not_current(&self, cause: Option<async_nats::Error>) -> NotCurrent {
        NotCurrent {
            bucket: self.bucket,
            cause,
        }
    }

    /// The time since the table was confirmed; `None` if it is being filled.
    fn age(&self) -> Option<Duration> {
        let confirmed = self.confirmed.load(Ordering::Relaxed).checked_sub(1)?;
        Some(
            self.started
                .elapsed()
                .saturating_sub(Duration::from_millis(confirmed)),
        )
    }

    /// The name of the bucket's stream.
    fn stream(&self) -> String {
        format!("KV_{}", self.bucket)
    }

    /// Asks the server for the state of the bucket, and compares it with what was known before the question.
    async fn ask(&self) -> Result<StreamState, Ended> {
        let before = self.past();
        let info = self.bus.stream_info(&self.stream(), DEADLINE).await?;
        let state = StreamState::from(&info);
        self.observe(before, state)?;
        Ok(state)
    }

    fn past(&self) -> Option<StreamState> {
        *self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an answer. Of two questions at once the later answer may be the older one, so that only what was
    /// known before the question proves that the store went back.
    fn observe(&self, before: Option<StreamState>, state: StreamState) -> Result<(), Ended> {
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let went_back =
            |known: Option<StreamState>| known.is_some_and(|known| state.is_rolled_back_from(&known));
        // The second of two who see it finds what the first one noted.
        let rolled_back = went_back(before) && went_back(*past);
        if rolled_back || !went_back(*past) {
            *past = Some(state);
        }
        drop(past);
        if rolled_back {
            self.note_rollback(before, Some(state));
            return Err(Ended::RolledBack);
        }
        Ok(())
    }

    /// Stops trusting the table.
    fn note_rollback(&self, before: Option<StreamState>, now: Option<StreamState>) {
        counter!("vmwatch_store_rollbacks_total", "bucket" => self.bucket).increment(1);
        warn!(
            bucket = self.bucket,
            last_sequence_before = before.map(|state| state.last_sequence),
            last_sequence = now.map(|state| state.last_sequence),
            "the store was rolled back; reading the bucket again"
        );
        self.confirmed.store(0, Ordering::Relaxed);
        self.progress.send_replace(Progress::default());
    }

    /// Returns once the table holds all that the bucket held at the call, or once `found` says that it is not needed.
    async fn catch_up(&self, found: impl Fn() -> bool) -> Result<(), async_nats::Error> {
        let came = Instant::now();
        let looking = async {
            // While this waits, the one before often does the work.
            let mut looks = self.looks.lock().await;
            if looks.whole.is_some_and(|begun| begun > came) || found() {
                return Ok(());
            }
            if let Some(last) = looks.last {
                tokio::time::sleep_until(last + LOOK_INTERVAL).await;
            }
            let begun = Instant::now();
            looks.last = Some(begun);
            self.look().await?;
            looks.whole = Some(begun);
            Ok(())
        };
        tokio::time::timeout(DEADLINE, looking).await?
    }

    /// Returns once the table holds all that the bucket held at the call.
    async fn look(&self) -> Result<(), async_nats::Error> {
        // A question asked now would wait for the reconnection, and its caller for the deadline.
        if !self.bus.is_connected() {
            return Err("the bus is unreachable".into());
        }
        let connection = self.bus.connections();
        if self
            .store
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none()
        {
            return Err("the bucket was not read yet".into());
        }
        counter!("vmwatch_bucket_looks_total", "bucket" => self.bucket).increment(1);
        let state = match self.ask().await {
            Ok(state) => state,
            Err(Ended::Broken(error)) => return Err(error),
            Err(_) => {
                self.went_back.notify_one();
                return Err("the store was rolled back".into());
            }
        };
        let mut progress = self.progress.subscribe();
        progress
            .wait_for(|progress| progress.connection >= connection && progress.seen >= state.newest())
            .await?;
        Ok(())
    }
}

impl<T: Table> Shared<T> {
    async fn follow_for_ever(&self) {
        let mut reconnections = self.bus.reconnections();
        loop {
            let ended = tokio::select! {
                Ok(()) = reconnections.changed() => Ended::Reconnected,
                () = self.went_back.notified() => Ended::RolledBack,
                Err(ended) = Box::pin(self.follow_once()) => ended,
            };
            let age = self.age().map_or(f64::INFINITY, |age| age.as_secs_f64());
            gauge!("vmwatch_bucket_unconfirmed_seconds", "bucket" => self.bucket).set(age);
            match ended {
                Ended::Reconnected | Ended::RolledBack => continue,
                Ended::RoomForOmitted => debug!(bucket = self.bucket, "reading omitted entries"),
                Ended::Broken(error) => debug!(%error, bucket = self.bucket, "the watch ended"),
            }
            tokio::time::sleep(CHECK_INTERVAL / 4).await;
        }
    }

    /// The bucket, if it is there. One that was there before and is not any more went back.
    async fn open(&self) -> Result<Store, Ended> {
        let found = tokio::time::timeout(DEADLINE, self.bus.jetstream().get_stream(self.stream())).await?;
        if let Err(error) = &found
            && let GetStreamErrorKind::JetStream(refused) = error.kind()
            && refused.error_code() == ErrorCode::STREAM_NOT_FOUND
        {
            let before = self.past.lock().unwrap_or_else(PoisonError::into_inner).take();
            if before.is_some() {
                self.note_rollback(before, None);
            }
        }
        found?;
        let store = self.bus.jetstream().get_key_value(self.bucket);
        let store = tokio::time::timeout(DEADLINE, store).await??;
        let mut opened = self.store.write().unwrap_or_else(PoisonError::into_inner);
        *opened = Some(store.clone());
        drop(opened);
        Ok(store)
    }

    /// One watch, from the bucket's present content on, until it ends.
    async fn follow_once(&self) -> Result<Infallible, Ended> {
        let connection = self.bus.connections();
        let store = self.open().await?;
        self.ask().await?;
        let mut watch = tokio::time::timeout(DEADLINE, store.watch_with_history(">")).await??;
        let empty = self
            .table
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .emptied();
        let mut reading = Reading {
            connection,
            filling: Some(empty),
            seen: 0,
            stuck_at: None,
        };
        let mut checks = tokio::time::interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let ticked = tokio::select! {
                entry = watch.next() => {
                    let entry = entry.ok_or("the watch ended")??;
                    let filled = reading.filling.is_some() && entry.seen_current;
                    self.apply(&mut reading, &entry);
                    if !filled {
                        continue;
                    }
                    false
                }
                _ = checks.tick() => true,
            };
            if self.bus.connections() != connection {
                return Err(Ended::Reconnected);
            }
            self.check(&store, &mut reading, ticked).await?;
        }
    }

    fn apply(&self, reading: &mut Reading<T>, entry: &Entry) {
        reading.seen = entry.revision;
        if let Some(table) = &mut reading.filling {
            table.apply(entry);
            return;
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.apply(entry);
        drop(table);
        self.progress
            .send_modify(|progress| progress.seen = entry.revision);
        if let Some(past) = &mut *self.past.lock().unwrap_or_else(PoisonError::into_inner) {
            past.last_sequence = past.last_sequence.max(entry.revision);
        }
    }

    /// Asks the server how far the bucket is, and confirms the table if it is as far.
    async fn check(&self, store: &Store, reading: &mut Reading<T>, ticked: bool) -> Result<(), Ended> {
        let state = self.ask().await?;
        if reading.seen < state.newest() {
            let stuck = ticked && reading.stuck_at == Some(reading.seen);
            // What came last may have been removed without a trace: then nothing comes after what was seen.
            if !stuck {
                if ticked {
                    reading.stuck_at = Some(reading.seen);
                }
                return Ok(());
            }
            if holds_after(store, reading.seen).await? {
                warn!(
                    bucket = self.bucket,
                    "the watch is broken: the bucket moved on without it"
                );
                return Err("the bucket moved on without the watch".into());
            }
        }
        reading.stuck_at = None;
        reading.seen = reading.seen.max(state.last_sequence);
        self.confirm(reading, &state)
    }

    fn confirm(&self, reading: &mut Reading<T>, state: &StreamState) -> Result<(), Ended> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let filled = reading.filling.take();
        let reloaded = filled.is_some();
        if let Some(filled) = filled {
            *table = filled;
        }
        table.confirmed(state);
        let has_room = table.has_room_for_omitted();
        drop(table);
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.confirmed.store(millis.saturating_add(1), Ordering::Relaxed);
        gauge!("vmwatch_bucket_unconfirmed_seconds", "bucket" => self.bucket).set(0.0);
        self.progress.send_replace(Progress {
            connection: reading.connection,
            seen: reading.seen,
        });
        if reloaded {
            info!(
                bucket = self.bucket,
                messages = state.messages,
                "the bucket was read"
            );
            self.reloads.send_replace(());
        }
        if has_room {
            return Err(Ended::RoomForOmitted);
        }
        Ok(())
    }
}

/// How far one watch has come.
struct Reading<T> {
    connection: u64,
    /// The table that is filled beside the one in use, until it is whole.
    filling: Option<T>,
    seen: u64,
    /// Where it was at the last check, if it was behind.
    stuck_at: Option<u64>,
}

/// Whether the bucket holds anything after this sequence.
async fn holds_after(store: &Store, sequence: u64) -> Result<bool, async_nats::Error> {
    let all = format!("{}>", store.prefix);
    let next = store.stream.direct_get_next_for_subject(all, Some(sequence + 1));
    match tokio::time::timeout(DEADLINE, next).await? {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detects_store_that_went_back() {
        let before = StreamState {
            created_ns: 1,
            last_sequence: 10,
            messages: 3,
            bytes: 300,
        };
        let later = StreamState {
            last_sequence: 11,
            ..before
        };
        assert!(!later.is_rolled_back_from(&before) && !before.is_rolled_back_from(&before));
        assert!(before.is_rolled_back_from(&later));
        let another = StreamState {
            created_ns: 2,
            last_sequence: 20,
            ..before
        };
        assert!(another.is_rolled_back_from(&before));
        // All entries may have expired.
        let empty = StreamState {
            messages: 0,
            bytes: 0,
            ..before
        };
        assert!(!empty.is_rolled_back_from(&before));
        assert_eq!((empty.newest(), before.newest()), (0, 10));
    }
}
