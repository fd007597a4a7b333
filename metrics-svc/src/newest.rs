//! The newest row of each VM in memory, for the list of VMs.
//!
//! ```text
//! rows stored by this replica ──────┐
//! live events of other replicas ────┼─> rows in memory
//! database, when a pass finds newer ┘
//! ```
//!
//! Every replica therefore has the newest row of every VM as soon as any replica has stored it. Live events can be lost,
//! so a pass over the collection of VMs compares dates once per [`PASS_INTERVAL`]. It reads only the rows that are newer
//! than those in memory, and removes the VMs that have left the collection.

use std::{
    convert::Infallible,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::{Message, consumer::DeliverPolicy};
use metrics::{counter, gauge};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::{
    InstanceId,
    events::{EVENT_STREAM, LiveEvent, SampleEvent, UnstoredEvent, kind_filter},
    time::unix_millis,
    vms::NewestSample,
};
use vmwatch_bus::{
    Bus,
    vms::{MAX_ROWS, Row, Rows},
};

use crate::{
    MetricsError,
    deadline::Deadline,
    instances::{Instances, LastReport},
    store::RowStore,
};

/// Interval at which the rows in memory are compared with the database.
const PASS_INTERVAL: Duration = Duration::from_mins(1);
/// Time limit for comparing all rows with the database.
const PASS_LIMIT: Duration = Duration::from_secs(30);
/// The rows in memory count as out of date if they have not been compared with the database for this time.
const STALE_AFTER: Duration = Duration::from_mins(3);
/// Maximum number of VMs in a query for the dates of last reports.
const DATES: u16 = 1000;
/// Maximum number of VMs in a query for rows.
const CHUNK: usize = 250;
/// Deadline of a JetStream request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(2);
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The newest rows of all VMs.
pub(crate) struct NewestRows {
    instances: Instances,
    rows: RwLock<Rows>,
    /// A VM that is missing in the database is kept for this time after its last report, because the collection of VMs
    /// is updated only with the rollups.
    grace_ms: u64,
    /// When the last successful pass began, Unix milliseconds; 0 if there was none.
    passed_ms: AtomicU64,
    /// Wakes the task that compares the rows with the database when events may have been missed.
    missed: Notify,
}

impl NewestRows {
    /// Creates an empty table. `rollup_interval` is the interval at which the collection of VMs is updated.
    pub(crate) fn new(store: &RowStore, rollup_interval: Duration) -> Self {
        let grace = rollup_interval * 2 + PASS_INTERVAL;
        Self {
            instances: Instances::new(store),
            rows: RwLock::default(),
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
            passed_ms: AtomicU64::new(0),
            missed: Notify::new(),
        }
    }

    /// Locks the rows for reading.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Rows> {
        self.rows.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Rows> {
        self.rows.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the rows have been compared with the database recently.
    pub(crate) fn is_current(&self) -> bool {
        let passed = self.passed_ms.load(Ordering::Relaxed);
        u128::from(unix_millis().saturating_sub(passed)) <= STALE_AFTER.as_millis()
    }

    /// Notes a row that this replica has stored now.
    pub(crate) fn note_stored(&self, event: &SampleEvent) {
        self.note(event, unix_millis());
    }

    fn note(&self, event: &SampleEvent, reported_ms: u64) {
        let sample = NewestSample {
            at_ms: event.at_ms,
            values: event.values,
            restricted: event.restricted,
        };
        if !self
            .write()
            .note(&event.instance_id, sample, reported_ms, event.sender.as_ref())
        {
            counter!("vmwatch_vms_omitted_total").increment(1);
        }
    }

    /// Notes a sample that was not stored because of its time.
    pub(crate) fn note_unstored(&self, event: &UnstoredEvent) {
        if !self.write().note_unstored(event) {
            counter!("vmwatch_vms_omitted_total").increment(1);
        }
    }

    /// Removes the row of a VM whose history was deleted.
    pub(crate) fn remove(&self, id: &InstanceId) {
        self.write().remove(id);
    }

    /// Reads the row of one VM from the database.
    pub(crate) async fn load(&self, id: &InstanceId, deadline: Deadline) -> Result<(), MetricsError> {
        let found = self.instances.get(id, deadline).await?;
        if let Some((id, row)) = found {
            self.write().merge(&id, row);
        }
        Ok(())
    }

    /// Compares the rows with the database until shutdown: once per interval, and when events may have been missed.
    pub(crate) async fn compare(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            let wait = timeout(PASS_INTERVAL, self.missed.notified());
            if shutdown.run_until_cancelled(wait).await.is_none() {
                return;
            }
            self.pass().await;
        }
    }

    /// Compares the rows with the database once.
    pub(crate) async fn pass(self: &Arc<Self>) {
        // Run in a separate task, because dropping a call of the MongoDB driver half-way is not safe.
        let this = Arc::clone(self);
        let comparing = tokio::spawn(async move { this.compare_once().await });
        match comparing.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let cause = error.cause();
                warn!(cause, "reading the newest rows of VMs failed; retrying");
            }
            Err(error) => warn!(%error, "reading the newest rows of VMs panicked"),
        }
    }

    async fn compare_once(&self) -> Result<(), MetricsError> {
        let begun_ms = unix_millis();
        let deadline = Deadline::after(PASS_LIMIT);
        let mut after = None;
        loop {
            let reports = self
                .instances
                .last_reports(after.as_ref(), DATES, deadline)
                .await?;
            let at_end = reports.len() < usize::from(DATES);
            let last = reports.last().map(|report| report.instance.clone());
            self.remove_missing(
                after.as_ref(),
                last.as_ref().filter(|_| !at_end),
                &reports,
                begun_ms,
            );
            let wanted = self.newer(&reports);
            for ids in wanted.chunks(CHUNK) {
                let rows = self.instances.read(ids, deadline).await?;
                let mut known = self.write();
                for (id, row) in rows {
                    known.merge(&id, row);
                }
            }
            if at_end || self.is_full() {
                break;
            }
            after = last;
        }
        self.passed_ms.store(begun_ms, Ordering::Relaxed);
        gauge!("vmwatch_listed_vms_with_samples").set(u32::try_from(self.read().count()).unwrap_or(u32::MAX));
        Ok(())
    }

    fn is_full(&self) -> bool {
        let is_full = self.read().count() >= MAX_ROWS;
        if is_full {
            warn!(
                most = MAX_ROWS,
                "more VMs report than the list of VMs has room for; the others are listed without samples"
            );
        }
        is_full
    }

    /// The VMs whose reports in the database are newer than those in memory.
    fn newer(&self, reports: &[LastReport]) -> Vec<InstanceId> {
        let rows = self.read();
        let is_newer = |report: &&LastReport| {
            rows.get(&report.instance)
                .is_none_or(|row| row.sample.at_ms < report.at_ms || row.reported_ms < report.reported_ms)
        };
        let newer = reports.iter().filter(is_newer);
        newer.map(|report| report.instance.clone()).collect()
    }

    /// Removes the VMs after `after`, up to `until`, that the database does not have and that have not reported recently.
    fn remove_missing(
        &self,
        after: Option<&InstanceId>,
        until: Option<&InstanceId>,
        reports: &[LastReport],
        begun_ms: u64,
    ) {
        let is_stored = |id: &InstanceId| {
            let found = reports.binary_search_by(|report| report.instance.cmp(id));
            found.is_ok()
        };
        let is_old = |row: &Row| row.reported_ms.saturating_add(self.grace_ms) < begun_ms;
        let gone: Vec<_> = {
            let rows = self.read();
            let between = rows.between(after, until);
            let gone = between.filter(|(id, row)| !is_stored(id) && is_old(row));
            gone.map(|(id, _)| id.clone()).collect()
        };
        let mut rows = self.write();
        for id in gone {
            rows.remove(&id);
        }
    }

    /// Follows the live events that other replicas publish, until shutdown.
    pub(crate) async fn follow(self: Arc<Self>, bus: Bus, shutdown: CancellationToken) {
        let mut reconnections = bus.reconnections();
        let following = async {
            loop {
                tokio::select! {
                    Ok(()) = reconnections.changed() => continue,
                    Err(error) = Box::pin(self.follow_once(&bus)) => {
                        debug!(%error, "following live events of samples failed; retrying");
                    }
                }
                sleep(RETRY_PAUSE).await;
            }
        };
        let _: Option<Infallible> = shutdown.run_until_cancelled(following).await;
    }

    async fn follow_once(&self, bus: &Bus) -> Result<Infallible, async_nats::Error> {
        let (never, ..) = tokio::try_join!(
            self.read_events(bus, "sample"),
            self.read_events(bus, "removed"),
            self.read_events(bus, "unstored")
        )?;
        Ok(never)
    }

    /// Follows the live events of one kind.
    async fn read_events(&self, bus: &Bus, kind: &str) -> Result<Infallible, async_nats::Error> {
        let filter = kind_filter(kind);
        let mut reader = bus
            .read_stream(EVENT_STREAM, &filter, DeliverPolicy::New, DEADLINE)
            .await?;
        // Events that were published after the previous reader stopped are missing.
        self.missed.notify_one();
        loop {
            let message = reader.next().await?;
            let published = message.info()?.published.unix_timestamp_nanos() / 1_000_000;
            match decode(&message) {
                Some(LiveEvent::Sample(event)) => self.note(&event, u64::try_from(published).unwrap_or(0)),
                Some(LiveEvent::Removed(event)) => self.remove(&event.instance_id),
                Some(LiveEvent::Unstored(event)) => self.note_unstored(&event),
                _ => {}
            }
        }
    }
}

fn decode(message: &Message) -> Option<LiveEvent> {
    let read = LiveEvent::read(&message.payload)
        .inspect_err(|error| warn!(%error, subject = %message.subject, "decoding a live event failed"));
    read.ok().flatten()
}
