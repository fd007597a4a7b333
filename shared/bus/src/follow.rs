//! Follows a KV bucket: keeps a copy of the bucket in memory and detects when the copy is stale.
//!
//! - Only a watch fills the table, so that a late read can never restore a deleted entry.
//! - A broken watch looks like one without changes. Each second the follower requests the bucket's last sequence. A
//!   table that was not confirmed for too long is not current.
//! - After each reconnection the whole bucket is read again, into a second table that then replaces the first.
//! - A store that was rolled back (power loss, a restored backup) has a lower last sequence than before, another
//!   creation time, or no such bucket. The table is not current until the bucket has been read again.

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

/// JetStream normally answers within milliseconds, so that a longer wait means that it is unreachable.
const DEADLINE: Duration = Duration::from_secs(2);
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum interval between requests to the server on behalf of entries that are not in the table.
const CATCH_UP_INTERVAL: Duration = Duration::from_millis(20);

/// The in-memory copy of a bucket.
pub trait Table: Send + Sync + 'static {
    /// An empty table with the same limits.
    #[must_use]
    fn emptied(&self) -> Self;

    /// Applies a change of the bucket.
    fn apply(&mut self, entry: &Entry);

    /// Called about once a second while the table is complete.
    fn confirmed(&mut self, _bucket: &StreamState) {}

    /// Whether there is now room for entries that were omitted; the bucket is then read again.
    fn has_room_for_omitted(&self) -> bool {
        false
    }
}

/// The state of a stream, as reported by the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamState {
    /// Creation time of the stream, Unix nanoseconds.
    pub created_ns: i128,
    /// The highest sequence assigned so far.
    pub last_sequence: u64,
    /// Number of stored messages.
    pub messages: u64,
    /// Size of the stored messages.
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
    /// Whether a stream with the state `before` cannot have become this one, because its store was rolled back.
    pub const fn is_rolled_back_from(&self, before: &Self) -> bool {
        self.created_ns != before.created_ns || self.last_sequence < before.last_sequence
    }

    /// The sequence that a reader must have reached to have all stored messages.
    const fn newest(&self) -> u64 {
        if self.messages == 0 { 0 } else { self.last_sequence }
    }
}

/// The table is stale, or its store was rolled back and is being read again.
#[derive(Debug, thiserror::Error)]
#[error("the in-memory copy of the bucket {bucket} is stale")]
pub struct NotCurrent {
    bucket: &'static str,
    #[source]
    cause: Option<async_nats::Error>,
}

/// Follows a bucket into a table. Clones share the table.
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
    /// When the table was last known to be complete: milliseconds after `started`, plus one; 0 for never.
    confirmed: AtomicU64,
    /// The last known state of the bucket.
    past: Mutex<Option<StreamState>>,
    /// Wakes the following task when another task detected a rollback of the store.
    went_back: Notify,
    catch_ups: tokio::sync::Mutex<CatchUps>,
}

/// The progress of the table.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// The connection over which the whole bucket was read; 0 for none.
    connection: u64,
    /// The last sequence contained in the table.
    seen: u64,
}

/// Times of the latest request to the server and of the latest successful one.
#[derive(Default)]
struct CatchUps {
    last: Option<Instant>,
    whole: Option<Instant>,
}

/// Why a watch ended.
enum Ended {
    /// The connection was replaced, so that changes may have been missed.
    Reconnected,
    /// The table has room for entries that it omitted.
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
    /// Follows the bucket until shutdown. Without a confirmation for `stale_after`, the table is not current.
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
            catch_ups: tokio::sync::Mutex::default(),
        });
        let following = Arc::clone(&shared);
        tokio::spawn(async move { shutdown.run_until_cancelled(following.follow_for_ever()).await });
        Self { shared }
    }

    /// Whether the table is filled and was confirmed within `stale_after`.
    pub fn is_current(&self) -> bool {
        self.shared
            .age()
            .is_some_and(|age| age <= self.shared.stale_after)
    }

    /// Waits until the whole bucket was read.
    pub async fn filled(&self) {
        let mut progress = self.shared.progress.subscribe();
        // This fails only if the sender is dropped, but this value holds it.
        let _ = progress.wait_for(|progress| progress.connection != 0).await;
    }

    /// Read access to the table, current or not.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.shared.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Write access to the table, for changes that do not come from the bucket.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.shared.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bucket, for reading entries that the table has no room for; `None` before it was first reached.
    pub fn store(&self) -> Option<Store> {
        let store = self.shared.store.read().unwrap_or_else(PoisonError::into_inner);
        store.clone()
    }

    /// Changes whenever the whole bucket was read.
    pub fn reloads(&self) -> watch::Receiver<()> {
        self.shared.reloads.subscribe()
    }

    /// Looks up an entry in the table. If it is missing, the table first catches up with the bucket. Waiting callers
    /// share one request to the server, and requests have a minimum interval.
    pub async fn find<R>(&self, find: impl Fn(&T) -> Option<R>) -> Result<Option<R>, NotCurrent> {
        if !self.is_current() {
            return Err(self.shared.not_current(None));
        }
        if let Some(found) = find(&self.read()) {
            return Ok(Some(found));
        }
        // Boxed because it is rare; otherwise the future of every request would be as large as this one.
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

    /// Time since the table was last confirmed; `None` while it is being filled.
    fn age(&self) -> Option<Duration> {
        let confirmed = self.confirmed.load(Ordering::Relaxed).checked_sub(1)?;
        Some(
            self.started
                .elapsed()
                .saturating_sub(Duration::from_millis(confirmed)),
        )
    }

    fn stream(&self) -> String {
        format!("KV_{}", self.bucket)
    }

    /// Requests the state of the bucket and compares it with the state known before the request.
    async fn request_state(&self) -> Result<StreamState, Ended> {
        let before = self.past();
        let info = self.bus.stream_info(&self.stream(), DEADLINE).await?;
        let state = StreamState::from(&info);
        self.observe(before, state)?;
        Ok(state)
    }

    fn past(&self) -> Option<StreamState> {
        *self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the state of an answer. Answers of concurrent requests can arrive in reverse order, so that only a
    /// state known before the request proves a rollback of the store.
    fn observe(&self, before: Option<StreamState>, state: StreamState) -> Result<(), Ended> {
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let went_back =
            |known: Option<StreamState>| known.is_some_and(|known| state.is_rolled_back_from(&known));
        // If two tasks detect the rollback, the second finds the state recorded by the first.
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

    /// Marks the table as not current.
    fn note_rollback(&self, before: Option<StreamState>, now: Option<StreamState>) {
        counter!("vmwatch_store_rollbacks_total", "bucket" => self.bucket).increment(1);
        warn!(
            bucket = self.bucket,
            last_sequence_before = before.map(|state| state.last_sequence),
            last_sequence = now.map(|state| state.last_sequence),
            "the store was rolled back; rereading the bucket"
        );
        self.confirmed.store(0, Ordering::Relaxed);
        self.progress.send_replace(Progress::default());
    }

    /// Returns once the table holds everything that the bucket held at the call, or once `found` returns true.
    async fn catch_up(&self, found: impl Fn() -> bool) -> Result<(), async_nats::Error> {
        let called_at = Instant::now();
        let catching_up = async {
            // While this waits for the lock, the previous holder often completes the work.
            let mut catch_ups = self.catch_ups.lock().await;
            if catch_ups.whole.is_some_and(|begun| begun > called_at) || found() {
                return Ok(());
            }
            if let Some(last) = catch_ups.last {
                tokio::time::sleep_until(last + CATCH_UP_INTERVAL).await;
            }
            let begun = Instant::now();
            catch_ups.last = Some(begun);
            self.catch_up_now().await?;
            catch_ups.whole = Some(begun);
            Ok(())
        };
        tokio::time::timeout(DEADLINE, catching_up).await?
    }

    /// Returns once the table holds everything that the bucket held at the call.
    async fn catch_up_now(&self) -> Result<(), async_nats::Error> {
        // A request sent now would wait for the reconnection, and its caller until the deadline.
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
        let state = match self.request_state().await {
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

    /// Opens the bucket, if it exists. A bucket that existed before and does not now was rolled back.
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

    /// Runs one watch from the present content of the bucket until the watch ends.
    async fn follow_once(&self) -> Result<Infallible, Ended> {
        let connection = self.bus.connections();
        let store = self.open().await?;
        self.request_state().await?;
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

    /// Requests the bucket's last sequence and confirms the table if it has reached that sequence.
    async fn check(&self, store: &Store, reading: &mut Reading<T>, ticked: bool) -> Result<(), Ended> {
        let state = self.request_state().await?;
        if reading.seen < state.newest() {
            let stuck = ticked && reading.stuck_at == Some(reading.seen);
            // The newest message may have been removed without a marker; then nothing follows the table's last
            // sequence.
            if !stuck {
                if ticked {
                    reading.stuck_at = Some(reading.seen);
                }
                return Ok(());
            }
            if holds_after(store, reading.seen).await? {
                warn!(
                    bucket = self.bucket,
                    "the watch missed changes of the bucket; restarting it"
                );
                return Err("the watch missed changes of the bucket".into());
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
                "read all records of the KV bucket"
            );
            self.reloads.send_replace(());
        }
        if has_room {
            return Err(Ended::RoomForOmitted);
        }
        Ok(())
    }
}

/// The progress of one watch.
struct Reading<T> {
    connection: u64,
    /// The table being filled, which replaces the one in use when it is complete.
    filling: Option<T>,
    seen: u64,
    /// The sequence of the table at the last check, if it was behind.
    stuck_at: Option<u64>,
}

/// Whether the bucket holds any message after this sequence.
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
    fn detects_rolled_back_store() {
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
        // All entries can have expired.
        let empty = StreamState {
            messages: 0,
            bytes: 0,
            ..before
        };
        assert!(!empty.is_rolled_back_from(&before));
        assert_eq!((empty.newest(), before.newest()), (0, 10));
    }
}
