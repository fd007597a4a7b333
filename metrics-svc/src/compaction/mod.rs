//! Merges the blocks of closed hours: the small blocks of each VM, kind and hour (level 0) become one block of level 1,
//! or several for many rows.
//!
//! ```text
//! queue of hours ─> group: one VM, kind and hour ─> merge, confirm, wait, delete
//! ```
//!
//! Each change leaves the rows readable: a merged block is deleted only after a confirmed generation with all of its rows
//! has been stored for longer than any read takes. A generation is confirmed only if its sources existed after it was
//! stored, so the rows of a removed VM do not return. Every step may be repeated, or be continued by another replica.
//! Neither clocks nor the lease decide whether a step is correct.

mod contained;
mod found;
mod group;
mod lease;
mod merge;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures::{StreamExt, stream};
use metrics::gauge;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_blocks::Encoder;

pub(crate) use self::lease::progress;
use self::{
    found::Group,
    group::{Known, Next},
    lease::Lease,
};
use crate::{
    MetricsError,
    blocks::{CLOSED_AFTER, HOUR_MICROS, QueuedHour, hour_of},
    config::CompactionSettings,
    documents::micros_of,
    store::{RowKind, RowStore},
};

/// Number of hours that are compacted at the same time.
const CONCURRENT: usize = 2;
/// Number of entries of the queue that are read together.
const PAGE: u32 = 1000;
/// Number of entries after which the lease is renewed.
const CHUNK: usize = 32;
/// Hours that closed within this time are compacted before all older ones.
const RECENT_MICROS: i64 = 3 * HOUR_MICROS;
/// Number of intervals without a renewal after which another replica takes the lease.
const LEASE_INTERVALS: u32 = 3;
/// Minimum time without a renewal after which another replica takes the lease.
const LEASE_MIN: Duration = Duration::from_secs(2);
/// Pause between checks whether ingestion and requests are busy, and maximum number of such pauses per hour, so that
/// compaction always progresses.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
const MAX_BUSY_PAUSES: u32 = 10;
/// Pause before an hour that failed is tried again.
const FAILED_PAUSE: Duration = Duration::from_mins(10);
/// Maximum number of groups that this replica remembers. Beyond that it forgets all, which only delays deletions.
const MAX_KNOWN: usize = 262_144;

/// Compacts the blocks of closed hours.
pub(crate) struct Compaction {
    store: Arc<RowStore>,
    settings: CompactionSettings,
    encoders: Mutex<Vec<Encoder>>,
    known: Mutex<HashMap<Group, Known>>,
    turn: tokio::sync::Mutex<Turn>,
    shutdown: CancellationToken,
}

/// The state that passes hand on.
struct Turn {
    lease: Lease,
    /// The last old hour that was compacted.
    older: Option<QueuedHour>,
}

/// The result of a part of a pass.
#[derive(Debug, Default)]
struct Outcome {
    /// End of the oldest hour whose blocks were not all merged.
    unmerged: Option<i64>,
    /// The database error that ended the pass.
    error: Option<MetricsError>,
}

impl Compaction {
    pub(crate) fn new(
        store: &Arc<RowStore>,
        settings: CompactionSettings,
        shutdown: CancellationToken,
    ) -> Self {
        let patience = (settings.interval * LEASE_INTERVALS).max(LEASE_MIN);
        let lease = Lease::new(store, patience);
        Self {
            store: Arc::clone(store),
            settings,
            encoders: Mutex::default(),
            known: Mutex::default(),
            turn: tokio::sync::Mutex::new(Turn { lease, older: None }),
            shutdown,
        }
    }

    /// Compacts until shutdown.
    pub(crate) async fn follow(self: Arc<Self>) {
        let mut pause = self.settings.interval;
        while self.shutdown.run_until_cancelled(sleep(pause)).await.is_some() {
            // Run in a separate task, because dropping a call of the MongoDB driver half-way is not safe.
            let compaction = Arc::clone(&self);
            let pass = tokio::spawn(async move { compaction.pass().await });
            let Some(passed) = self.shutdown.run_until_cancelled(pass).await else {
                break;
            };
            pause = self.settings.interval;
            match passed {
                Ok(Ok(true)) => pause = Duration::ZERO,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => warn!(cause = error.cause(), "compaction failed; retrying"),
                Err(error) => warn!(%error, "compaction panicked; retrying"),
            }
        }
        let releasing = tokio::spawn(async move { self.turn.lock().await.lease.release().await });
        // A lease that is not released ends by its age.
        let _ = tokio::time::timeout(Duration::from_secs(1), releasing).await;
    }

    /// Compacts the recently closed hours and some older ones. Returns whether more older ones wait.
    async fn pass(&self) -> Result<bool, MetricsError> {
        let mut turn = self.turn.lock().await;
        if !turn.lease.hold().await? {
            gauge!("vmwatch_compaction_lag_seconds").set(0.0);
            return Ok(false);
        }
        let closed = SystemTime::now().checked_sub(CLOSED_AFTER).map_or(0, micros_of);
        let end = hour_of(closed);
        let recent = end.saturating_sub(RECENT_MICROS);
        let mut all = Outcome::default();
        let mut last = None;
        loop {
            let entries = self.store.hours.read(recent..end, last.as_ref(), PAGE).await?;
            let Some(entry) = entries.last().cloned() else {
                break;
            };
            last = Some(entry);
            all.add(self.entries(&mut turn.lease, &entries).await?)?;
        }
        let older = self
            .store
            .hours
            .read(i64::MIN..recent, turn.older.as_ref(), PAGE)
            .await?;
        all.add(self.entries(&mut turn.lease, &older).await?)?;
        let more = older.len() >= PAGE as usize;
        turn.older = older.into_iter().next_back().filter(|_| more);
        let lag = all
            .unmerged
            .map_or(0, |hour| micros_of(SystemTime::now()).saturating_sub(hour));
        #[expect(clippy::cast_precision_loss, reason = "a metric does not need microseconds")]
        gauge!("vmwatch_compaction_lag_seconds").set(lag as f64 / 1e6);
        let lag = Duration::from_micros(u64::try_from(lag).unwrap_or(0));
        turn.lease.note_progress(lag).await?;
        self.forget();
        Ok(more)
    }

    /// Compacts the hours of queue entries while this replica holds the lease.
    async fn entries(&self, lease: &mut Lease, entries: &[QueuedHour]) -> Result<Outcome, MetricsError> {
        let outcome = Mutex::new(Outcome::default());
        for chunk in entries.chunks(CHUNK) {
            if self.shutdown.is_cancelled() || !lease.hold().await? {
                break;
            }
            let compacting = stream::iter(chunk).for_each_concurrent(CONCURRENT, async |entry| {
                let failed = lock(&outcome).error.is_some();
                if failed || self.shutdown.is_cancelled() {
                    return;
                }
                let result = self.vm_hour(entry).await;
                let mut outcome = lock(&outcome);
                match result {
                    Ok(false) => {}
                    Ok(true) => outcome.note_unmerged(entry.of.end()),
                    Err(error) => outcome.error = Some(error),
                }
            });
            compacting.await;
            if lock(&outcome).error.is_some() {
                break;
            }
        }
        Ok(outcome.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Compacts all kinds of rows of a VM and hour. Returns whether blocks remain to be merged.
    async fn vm_hour(&self, entry: &QueuedHour) -> Result<bool, MetricsError> {
        let (mut done, mut unmerged) = (true, false);
        for kind in RowKind::ALL {
            let group = Group {
                kind,
                of: entry.of.clone(),
            };
            let mut known = lock(&self.known).get(&group).copied().unwrap_or_default();
            if known.next.is_some_and(|next| Instant::now() < next) {
                (done, unmerged) = (false, unmerged || known.unmerged);
                continue;
            }
            self.give_way().await;
            let next = match self.work(&group, &mut known).await {
                Ok(next) => next,
                Err(error @ MetricsError::Store(_)) => return Err(error),
                Err(error) => {
                    warn!(
                        instance_id = entry.of.instance,
                        kind = kind.name(),
                        hour = entry.of.hour_text(),
                        cause = error.cause(),
                        "compaction of an hour failed; retrying later"
                    );
                    Next::At(Instant::now() + FAILED_PAUSE, true)
                }
            };
            if let Next::At(at, remains) = next {
                (done, unmerged) = (false, unmerged || remains);
                (known.next, known.unmerged) = (Some(at), remains);
            } else {
                known.next = None;
            }
            lock(&self.known).insert(group, known);
        }
        if done {
            self.store.hours.remove(entry).await?;
        }
        Ok(unmerged)
    }

    /// Waits while ingestion or requests are busy, for a limited time.
    async fn give_way(&self) {
        for _ in 0..MAX_BUSY_PAUSES {
            if !self.store.is_busy() {
                return;
            }
            sleep(BUSY_PAUSE).await;
        }
    }

    /// Drops what this replica no longer needs to know.
    fn forget(&self) {
        let mut known = lock(&self.known);
        known.retain(|_, known| !known.is_over(self));
        if known.len() > MAX_KNOWN {
            known.clear();
        }
    }

    fn encoder(&self) -> io::Result<Encoder> {
        lock(&self.encoders).pop().map_or_else(Encoder::new, Ok)
    }

    fn keep(&self, encoder: Encoder) {
        lock(&self.encoders).push(encoder);
    }
}

impl Outcome {
    fn note_unmerged(&mut self, end: i64) {
        self.unmerged = Some(self.unmerged.map_or(end, |oldest| oldest.min(end)));
    }

    fn add(&mut self, other: Self) -> Result<(), MetricsError> {
        if let Some(end) = other.unmerged {
            self.note_unmerged(end);
        }
        other.error.map_or(Ok(()), Err)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs work that takes long on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, MetricsError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|panic| MetricsError::Io(panic.into()))
}
