//! Who is behind a token, known without a round trip: a table that follows the session bucket.
//!
//! The table is filled by a watch alone: a late read can never bring a revoked session back. A fresh login may not have
//! arrived yet, so that whoever brings a token that is not there waits until the table holds all that the bucket held
//! when he came. All who wait share one look at the bucket, and looks have a least distance in time: however many
//! tokens are guessed, the bucket is read a bounded number of times. A broken watch looks like a quiet one: each second the bucket is asked whether it holds anything
//! newer than what was seen, and a table that could not be confirmed for too long answers nobody.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::{
    kv::{Entry, Operation, Store},
    stream::DirectGetErrorKind,
};
use futures::StreamExt;
use metrics::{counter, gauge};
use moka::sync::Cache;
use shared::{
    api::auth::{SESSION_BUCKET, SessionRecord, Token, TokenHash},
    bus::Bus,
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use tokio::{
    sync::{Mutex, OnceCell, Semaphore, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// JetStream answers in milliseconds or not at all.
const BUCKET_DEADLINE: Duration = Duration::from_secs(2);
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Between two looks at the bucket on behalf of tokens that are not in the table.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Reads in one look. Each shows one session that the watch has not brought yet; between two of them it brings more.
const LOOK_READS: usize = 16;
/// Only where the bucket holds more than the table may: a token that was not found is not looked up again for so long,
/// nor are more than so many remembered.
const MISS_MEMORY: Duration = Duration::from_secs(5);
const MISSES: u64 = 100_000;
/// Reads of the bucket at once; more misses than this are answered "try again".
const READS: usize = 64;

/// The bounds of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionSettings {
    pub(crate) most: usize,
    pub(crate) stale_after: Duration,
}

/// The table of live sessions.
#[derive(Clone)]
pub(crate) struct Sessions {
    shared: Arc<Shared>,
}

struct Shared {
    bus: Bus,
    settings: SessionSettings,
    bucket: OnceCell<Store>,
    table: RwLock<HashMap<TokenHash, Arc<SessionRecord>>>,
    /// When the table was last known to hold all that the bucket holds, Unix milliseconds.
    confirmed_ms: AtomicU64,
    following: AtomicBool,
    /// The last entry that the watch brought.
    seen: watch::Sender<u64>,
    looks: Mutex<Looks>,
    /// Whether an entry found no place in the table.
    overflowed: AtomicBool,
    misses: Cache<TokenHash, ()>,
    reads: Semaphore,
}

/// When the bucket was looked at last, and when for the last time with success.
#[derive(Default)]
struct Looks {
    last: Option<Instant>,
    whole: Option<Instant>,
}

impl Sessions {
    /// Starts to follow the bucket, until shutdown.
    pub(crate) fn follow(bus: &Bus, settings: SessionSettings, shutdown: CancellationToken) -> Self {
        let shared = Arc::new(Shared {
            bus: bus.clone(),
            settings,
            bucket: OnceCell::new(),
            table: RwLock::default(),
            confirmed_ms: AtomicU64::new(0),
            following: AtomicBool::new(false),
            seen: watch::Sender::new(0),
            looks: Mutex::default(),
            overflowed: AtomicBool::new(false),
            misses: Cache::builder()
                .max_capacity(MISSES)
                .time_to_live(MISS_MEMORY)
                .build(),
            reads: Semaphore::new(READS),
        });
        let follower = Arc::clone(&shared);
        tokio::spawn(async move { shutdown.run_until_cancelled(follower.follow_for_ever()).await });
        Self { shared }
    }

    /// Whether the table was filled once and is confirmed still.
    pub(crate) fn is_current(&self) -> bool {
        let age = unix_millis().saturating_sub(self.shared.confirmed_ms.load(Ordering::Relaxed));
        self.shared.following.load(Ordering::Relaxed)
            && u128::from(age) <= self.shared.settings.stale_after.as_millis()
    }

    /// The live session of a token, or `None`.
    pub(crate) async fn check(&self, token: &Token) -> Result<Option<Arc<SessionRecord>>, Fault> {
        if !self.is_current() {
            return Err(Fault::new(
                FaultKind::Unavailable,
                "sessions cannot be checked now; try again shortly",
            ));
        }
        let hash = token.hash();
        let shared = &self.shared;
        let found = match shared.known(&hash) {
            Some(record) => Some(record),
            // Boxed, as it is rare: every request's future would be as large as this one's.
            None => match Box::pin(shared.look_for(&hash)).await? {
                None if shared.overflowed.load(Ordering::Relaxed) => {
                    Box::pin(shared.read_through(token, hash)).await?
                }
                found => found,
            },
        };
        Ok(found.filter(|record| record.expires_at_ms > unix_millis()))
    }
}

fn unavailable() -> Fault {
    Fault::new(
        FaultKind::Unavailable,
        "the session cannot be checked now; try again shortly",
    )
}

impl Shared {
    fn known(&self, hash: &TokenHash) -> Option<Arc<SessionRecord>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.get(hash).cloned()
    }

    /// The session, once the table holds all that the bucket holds now.
    async fn look_for(&self, hash: &TokenHash) -> Result<Option<Arc<SessionRecord>>, Fault> {
        let came = Instant::now();
        let looking = async {
            // Who waits here while another looks finds, more often than not, that nothing is left to do.
            let mut looks = self.looks.lock().await;
            if looks.whole.is_some_and(|begun| begun > came) || self.known(hash).is_some() {
                return Ok(());
            }
            if let Some(last) = looks.last {
                tokio::time::sleep_until(last + LOOK_INTERVAL).await;
            }
            let begun = Instant::now();
            looks.last = Some(begun);
            self.look().await?;
            looks.whole = Some(begun);
            drop(looks);
            Ok(())
        };
        let looked = tokio::time::timeout(BUCKET_DEADLINE, looking).await;
        looked.map_err(|late| unavailable().caused_by(late))??;
        Ok(self.known(hash))
    }

    /// Returns once the watch has brought all that the bucket held at the call.
    async fn look(&self) -> Result<(), Fault> {
        // A read sent now would wait for the reconnect, and its caller for the deadline.
        if !self.bus.is_connected() {
            return Err(unavailable());
        }
        let bucket = self.bucket.get().ok_or_else(unavailable)?;
        let mut seen = self.seen.subscribe();
        for _ in 0..LOOK_READS {
            let before = *seen.borrow_and_update();
            counter!("vmwatch_session_bucket_reads_total").increment(1);
            let newer = newer_than(bucket, before).await.map_err(|error| {
                debug!(%error, "the session bucket could not be read");
                unavailable()
            })?;
            let Some(newer) = newer else {
                return Ok(());
            };
            let brought = seen.wait_for(|seen| *seen >= newer).await;
            brought.map_err(|closed| unavailable().caused_by(closed))?;
        }
        // Sessions come faster than the watch brings them.
        Err(unavailable())
    }

    /// Asks the bucket itself, a bounded number at once.
    async fn read_through(
        &self,
        token: &Token,
        hash: TokenHash,
    ) -> Result<Option<Arc<SessionRecord>>, Fault> {
        if self.misses.contains_key(&hash) {
            return Ok(None);
        }
        // A read sent now would wait for the reconnect, and its caller for the deadline.
        if !self.bus.is_connected() {
            return Err(unavailable());
        }
        let _permit = self.reads.try_acquire().map_err(|_| unavailable())?;
        counter!("vmwatch_session_bucket_reads_total").increment(1);
        let bucket = self.bucket.get().ok_or_else(unavailable)?;
        let entry = tokio::time::timeout(BUCKET_DEADLINE, bucket.entry(token.key()))
            .await
            .map_err(|late| unavailable().caused_by(late))?
            .map_err(|error| unavailable().caused_by(error))?;
        let record = entry
            .filter(|entry| entry.operation == Operation::Put)
            .and_then(|entry| decode(&entry));
        if record.is_none() {
            self.misses.insert(hash, ());
        }
        Ok(record.map(Arc::new))
    }

    async fn follow_for_ever(&self) {
        loop {
            if let Err(error) = self.follow_once().await {
                debug!(%error, "the session watch ended");
            }
            tokio::time::sleep(CHECK_INTERVAL / 4).await;
        }
    }

    /// One watch, from the bucket's present content on, until it is found broken.
    async fn follow_once(&self) -> Result<(), async_nats::Error> {
        let open = self
            .bucket
            .get_or_try_init(|| self.bus.jetstream().get_key_value(SESSION_BUCKET));
        let bucket = tokio::time::timeout(BUCKET_DEADLINE, open).await??;
        let mut watch = tokio::time::timeout(BUCKET_DEADLINE, bucket.watch_with_history(">")).await??;
        // Filled aside, so that the old table serves until the new one is whole.
        let mut filling = Some(HashMap::new());
        let (mut seen, mut seen_at_last_check, mut lag) = (0, 0, false);
        let mut checks = tokio::time::interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let check_now = tokio::select! {
                entry = watch.next() => {
                    let entry = entry.ok_or("the watch ended")??;
                    match &mut filling {
                        Some(table) => self.apply(table, &entry),
                        None => self.apply(&mut self.table.write().unwrap_or_else(PoisonError::into_inner), &entry),
                    }
                    seen = entry.revision;
                    if filling.is_none() {
                        self.seen.send_replace(seen);
                    }
                    filling.is_some() && entry.seen_current
                }
                _ = checks.tick() => true,
            };
            if !check_now {
                continue;
            }
            let newer = newer_than(bucket, seen).await?.is_some();
            if newer && lag && seen == seen_at_last_check {
                warn!("the session watch is broken: the bucket moved on without it");
                return Ok(());
            }
            (lag, seen_at_last_check) = (newer, seen);
            if !newer {
                self.confirm(&mut filling);
                self.seen.send_replace(seen);
            }
        }
    }

    fn confirm(&self, filling: &mut Option<HashMap<TokenHash, Arc<SessionRecord>>>) {
        let now = unix_millis();
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(filled) = filling.take() {
            info!(sessions = filled.len(), "the session table is whole");
            *table = filled;
        }
        // The bucket's own age limit removes entries without an event.
        table.retain(|_, record| record.expires_at_ms > now);
        gauge!("vmwatch_sessions").set(u32::try_from(table.len()).map_or(f64::MAX, f64::from));
        drop(table);
        self.confirmed_ms.store(now, Ordering::Relaxed);
        self.following.store(true, Ordering::Relaxed);
    }

    fn apply(&self, table: &mut HashMap<TokenHash, Arc<SessionRecord>>, entry: &Entry) {
        let mut hash: TokenHash = [0; 32];
        if hex::decode_to_slice(&entry.key, &mut hash).is_err() {
            warn!(key = entry.key, "the session bucket holds a key that is no hash");
            return;
        }
        let record = (entry.operation == Operation::Put)
            .then(|| decode(entry))
            .flatten();
        match record {
            None => drop(table.remove(&hash)),
            // A full table still works: what is not in it is read from the bucket.
            Some(_) if table.len() >= self.settings.most && !table.contains_key(&hash) => {
                counter!("vmwatch_sessions_beyond_table_total").increment(1);
                self.overflowed.store(true, Ordering::Relaxed);
            }
            Some(record) => drop(table.insert(hash, Arc::new(record))),
        }
    }
}

/// The revision of the first that the bucket holds after this one, if any.
async fn newer_than(bucket: &Store, seen: u64) -> Result<Option<u64>, async_nats::Error> {
    let all = format!("{}>", bucket.prefix);
    let next = bucket.stream.direct_get_next_for_subject(all, Some(seen + 1));
    match tokio::time::timeout(BUCKET_DEADLINE, next).await? {
        Ok(message) => Ok(Some(message.sequence)),
        Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn decode(entry: &Entry) -> Option<SessionRecord> {
    serde_json::from_slice(&entry.value)
        .inspect_err(|error| warn!(%error, "the session bucket holds an unreadable record"))
        .ok()
}
