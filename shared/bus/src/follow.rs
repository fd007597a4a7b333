//! Keeps a copy of a JetStream KV bucket in memory, follows its changes, and detects when the copy is stale.
//!
//! - Only a KV watch adds entries to the copy (the table), so a delayed read cannot restore a deleted entry.
//! - A broken watch is indistinguishable from a bucket without changes. Therefore the follower requests the bucket's
//!   last sequence number every second. A table that has not been confirmed for too long counts as stale.
//! - After each reconnection the whole bucket is read into a second table, which then replaces the first.
//! - If the store was rolled back (power loss, a restored backup), the bucket is missing, has a different creation
//!   time, or has a lower last sequence number than before. The table then counts as stale until the bucket has been
//!   reread.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::{ErrorCode, kv::Entry, stream::Info};
use metrics::{counter, gauge};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{Bus, jetstream::Bucket};

/// JetStream normally answers within milliseconds; after this time it counts as unreachable.
const DEADLINE: Duration = Duration::from_secs(2);
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum interval between requests to the NATS server about entries that are missing in the table.
const CATCH_UP_INTERVAL: Duration = Duration::from_millis(20);

/// The in-memory copy of a JetStream KV bucket.
pub trait Table: Send + Sync + 'static {
    /// Creates an empty table with the same limits as this one.
    #[must_use]
    fn emptied(&self) -> Self;

    /// Applies a change of the KV bucket to the table.
    fn apply(&mut self, entry: &Entry);

    /// Called about once per second while the table is complete and up to date.
    fn confirmed(&mut self, _bucket: &StreamState) {}

    /// Whether the table has room again for entries that it omitted; if so, the KV bucket is reread.
    fn has_room_for_omitted(&self) -> bool {
        false
    }
}

/// The state of a JetStream stream, as reported by the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamState {
    /// Creation time of the stream, Unix nanoseconds.
    pub created_ns: i128,
    /// The highest sequence number assigned so far.
    pub last_sequence: u64,
    /// Number of stored messages.
    pub messages: u64,
    /// Total size of the stored messages in bytes.
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
    /// Whether the store was rolled back since the stream had the state `before`.
    pub const fn is_rolled_back_from(&self, before: &Self) -> bool {
        self.created_ns != before.created_ns || self.last_sequence < before.last_sequence
    }

    /// The sequence number up to which a reader must have read to have seen all stored messages.
    const fn newest(&self) -> u64 {
        if self.messages == 0 { 0 } else { self.last_sequence }
    }
}

/// The table is stale, or the store was rolled back and the bucket is being reread.
#[derive(Debug, thiserror::Error)]
#[error("the in-memory copy of the KV bucket {bucket} is stale")]
pub struct NotCurrent {
    bucket: &'static str,
    #[source]
    cause: Option<async_nats::Error>,
}

/// Follows a JetStream KV bucket and keeps its content in a table. Clones share the table.
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
    name: &'static str,
    bucket: Bucket,
    stale_after: Duration,
    table: RwLock<T>,
    progress: watch::Sender<Progress>,
    reloads: watch::Sender<()>,
    started: Instant,
    /// Time at which the table was last confirmed to be complete: milliseconds since `started`, plus one; 0 means
    /// never.
    confirmed: AtomicU64,
    /// The latest known state of the KV bucket.
    past: Mutex<Option<StreamState>>,
    /// Wakes the task that follows the bucket when another task has detected that the store was rolled back.
    went_back: Notify,
    catch_ups: tokio::sync::Mutex<CatchUps>,
}

/// How far the table has followed the KV bucket.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// Number of the connection ([`Bus::connections`]) over which the whole KV bucket was read; 0 if it has not been
    /// read yet.
    connection: u64,
    /// The last sequence number whose change is in the table.
    seen: u64,
}

/// When missing entries were last requested from the server, and when the last successful request began.
#[derive(Default)]
struct CatchUps {
    last: Option<Instant>,
    whole: Option<Instant>,
}

/// Why a KV watch ended.
enum Ended {
    /// NATS was reconnected, so the watch may have missed changes.
    Reconnected,
    /// The table has room again for entries that it omitted.
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
    /// Follows the KV bucket until shutdown. The table counts as stale if it has not been confirmed for `stale_after`.
    pub fn start(
        bus: &Bus,
        bucket: &'static str,
        stale_after: Duration,
        table: T,
        shutdown: CancellationToken,
    ) -> Self {
        let shared = Arc::new(Shared {
            bus: bus.clone(),
            name: bucket,
            bucket: Bucket::new(bus, bucket, DEADLINE),
            stale_after,
            table: RwLock::new(table),
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

    /// Whether the table contains the whole KV bucket and was confirmed within `stale_after`.
    pub fn is_current(&self) -> bool {
        self.shared
            .age()
            .is_some_and(|age| age <= self.shared.stale_after)
    }

    /// Waits until the whole KV bucket has been read.
    pub async fn filled(&self) {
        let mut progress = self.shared.progress.subscribe();
        // Waiting fails only if the sender was dropped, but `self` owns the sender.
        let _ = progress.wait_for(|progress| progress.connection != 0).await;
    }

    /// Whether the whole KV bucket has been read.
    pub fn is_filled(&self) -> bool {
        self.shared.progress.borrow().connection != 0
    }

    /// Locks the table for reading, whether it is current or stale.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.shared.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the table for changes that do not come from the KV bucket.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.shared.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A receiver that is notified each time the whole KV bucket has been read.
    pub fn reloads(&self) -> watch::Receiver<()> {
        self.shared.reloads.subscribe()
    }

    /// Waits until the table contains everything that the KV bucket contained at the time of the call. Concurrent callers
    /// share one request to the server, and requests are sent at a minimum interval.
    pub async fn catch_up(&self) -> Result<(), NotCurrent> {
        self.find(|_| None::<()>).await.map(drop)
    }

    /// Looks up an entry in the table. If the entry is missing, the table first catches up with the KV bucket.
    /// Concurrent callers share one request to the server, and requests are sent at a minimum interval.
    pub async fn find<R>(&self, find: impl Fn(&T) -> Option<R>) -> Result<Option<R>, NotCurrent> {
        if !self.is_current() {
            return Err(self.shared.not_current(None));
        }
        if let Some(found) = find(&self.read()) {
            return Ok(Some(found));
        }
        // The future is boxed because this case is rare; otherwise it would enlarge the future of every request.
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
            bucket: self.name,
            cause,
        }
    }

    /// Time since the table was last confirmed; `None` while the table is being filled.
    fn age(&self) -> Option<Duration> {
        let confirmed = self.confirmed.load(Ordering::Relaxed).checked_sub(1)?;
        Some(
            self.started
                .elapsed()
                .saturating_sub(Duration::from_millis(confirmed)),
        )
    }

    /// Requests the current state of the KV bucket and compares it with the state known before the request. A missing
    /// bucket means that the store was rolled back if the bucket existed before.
    async fn request_state(&self) -> Result<StreamState, Ended> {
        let before = self.past();
        let found = self.bus.stream_info(&self.bucket.stream(), DEADLINE).await;
        if let Err(error) = &found
            && error.code() == Some(ErrorCode::STREAM_NOT_FOUND)
        {
            let before = self.past.lock().unwrap_or_else(PoisonError::into_inner).take();
            if before.is_some() {
                self.note_rollback(before, None);
            }
        }
        let state = StreamState::from(&found?);
        self.observe(before, state)?;
        Ok(state)
    }

    fn past(&self) -> Option<StreamState> {
        *self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the bucket state from a server's answer. Answers to concurrent requests can arrive in reverse order;
    /// therefore only a comparison with the state known before the request proves that the store was rolled back.
    fn observe(&self, before: Option<StreamState>, state: StreamState) -> Result<(), Ended> {
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let went_back =
            |known: Option<StreamState>| known.is_some_and(|known| state.is_rolled_back_from(&known));
        // If two tasks detect the same rollback, the second one sees the state that the first one has recorded.
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

    /// Marks the table as stale because the store was rolled back.
    fn note_rollback(&self, before: Option<StreamState>, now: Option<StreamState>) {
        counter!("vmwatch_store_rollbacks_total", "bucket" => self.name).increment(1);
        warn!(
            bucket = self.name,
            last_sequence_before = before.map(|state| state.last_sequence),
            last_sequence = now.map(|state| state.last_sequence),
            "the JetStream store was rolled back; rereading the KV bucket"
        );
        self.confirmed.store(0, Ordering::Relaxed);
        self.progress.send_replace(Progress::default());
    }

    /// Returns when the table contains everything that the KV bucket contained at the time of the call, or when `found`
    /// returns true.
    async fn catch_up(&self, found: impl Fn() -> bool) -> Result<(), async_nats::Error> {
        let called_at = Instant::now();
        let catching_up = async {
            // The previous holder of this lock often catches up on behalf of the waiting callers as well.
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

    /// Returns when the table contains everything that the KV bucket contained at the time of the call.
    async fn catch_up_now(&self) -> Result<(), async_nats::Error> {
        // While NATS is disconnected, a request would wait for the reconnection and keep its caller waiting until the
        // deadline.
        if !self.bus.is_connected() {
            return Err("NATS is unreachable".into());
        }
        let connection = self.bus.connections();
        counter!("vmwatch_bucket_looks_total", "bucket" => self.name).increment(1);
        let state = match self.request_state().await {
            Ok(state) => state,
            Err(Ended::Broken(error)) => return Err(error),
            Err(_) => {
                self.went_back.notify_one();
                return Err("the JetStream store was rolled back".into());
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
            gauge!("vmwatch_bucket_unconfirmed_seconds", "bucket" => self.name).set(age);
            match ended {
                Ended::Reconnected | Ended::RolledBack => continue,
                Ended::RoomForOmitted => debug!(
                    bucket = self.name,
                    "the table has room again; rereading the KV bucket for omitted entries"
                ),
                Ended::Broken(error) => {
                    debug!(%error, bucket = self.name, "the watch of the KV bucket ended; restarting it");
                }
            }
            tokio::time::sleep(CHECK_INTERVAL / 4).await;
        }
    }

    /// Watches the KV bucket, starting with its current content, until the watch ends.
    async fn follow_once(&self) -> Result<Infallible, Ended> {
        let connection = self.bus.connections();
        self.request_state().await?;
        let mut watch = self.bucket.watch().await?;
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
                    let entry = entry?;
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
            self.check(&mut reading, ticked).await?;
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

    /// Requests the KV bucket's last sequence number and confirms the table if it has reached that number.
    async fn check(&self, reading: &mut Reading<T>, ticked: bool) -> Result<(), Ended> {
        let state = self.request_state().await?;
        if reading.seen < state.newest() {
            let stuck = ticked && reading.stuck_at == Some(reading.seen);
            // The newest message may have been removed without a delete marker. In that case no message follows the
            // table's last sequence number, although the stream's last sequence number is higher.
            if !stuck {
                if ticked {
                    reading.stuck_at = Some(reading.seen);
                }
                return Ok(());
            }
            if self.bucket.holds_from(reading.seen + 1).await? {
                warn!(
                    bucket = self.name,
                    "the watch missed changes of the KV bucket; restarting it"
                );
                return Err("the watch missed changes of the KV bucket".into());
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
        gauge!("vmwatch_bucket_unconfirmed_seconds", "bucket" => self.name).set(0.0);
        self.progress.send_replace(Progress {
            connection: reading.connection,
            seen: reading.seen,
        });
        if reloaded {
            info!(
                bucket = self.name,
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

/// The progress of a KV watch.
struct Reading<T> {
    connection: u64,
    /// The table that is being filled; it replaces the table in use when it is complete.
    filling: Option<T>,
    seen: u64,
    /// The table's sequence number at the last check, if the table was behind the KV bucket.
    stuck_at: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rolled_back_store_is_detected() {
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
        // The stream can be empty with an unchanged last sequence number, because all entries have expired.
        let empty = StreamState {
            messages: 0,
            bytes: 0,
            ..before
        };
        assert!(!empty.is_rolled_back_from(&before));
        assert_eq!((empty.newest(), before.newest()), (0, 10));
    }
}
