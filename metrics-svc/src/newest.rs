//! The newest rows of each VM in memory, for the list of VMs: the one of its agent and the one of its hypervisor.
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

mod table;

use std::{
    convert::Infallible,
    future::pending,
    sync::{
        Arc, RwLockReadGuard,
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
    events::{
        EVENT_STREAM, HypervisorSampleEvent, LiveEvent, OverLimitEvent, SampleEvent, UnstoredEvent,
        kind_filter,
    },
    time::unix_millis,
    vms::NewestSample,
};
use vmwatch_bus::{Bus, vms::Rows};

use self::table::Table;
use crate::{
    MetricsError,
    deadline::Deadline,
    greatest::GreatestProcesses,
    store::{RowKind, RowStore},
};

/// Interval at which the rows in memory are compared with the database.
const PASS_INTERVAL: Duration = Duration::from_mins(1);
/// Time limit for comparing all rows with the database.
const PASS_LIMIT: Duration = Duration::from_secs(30);
/// The rows in memory count as out of date if they have not been compared with the database for this time.
const STALE_AFTER: Duration = Duration::from_mins(3);
/// Deadline of a JetStream request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(2);
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The newest rows of all VMs.
pub(crate) struct NewestRows {
    /// The rows that agents reported.
    agent: Table,
    /// The rows that hypervisors measured.
    hypervisor: Table,
    greatest: Arc<GreatestProcesses>,
    /// When the last successful pass began, Unix milliseconds; 0 if there was none.
    passed_ms: AtomicU64,
    /// Wakes the task that compares the rows with the database when events may have been missed.
    missed: Notify,
}

impl NewestRows {
    /// Creates an empty table. `rollup_interval` is the interval at which the collection of VMs is updated.
    pub(crate) fn new(
        store: &RowStore,
        greatest: &Arc<GreatestProcesses>,
        rollup_interval: Duration,
    ) -> Self {
        let grace = rollup_interval * 2 + PASS_INTERVAL;
        Self {
            agent: Table::new(store, RowKind::Vm, grace),
            hypervisor: Table::new(store, RowKind::Hypervisor, grace),
            greatest: Arc::clone(greatest),
            passed_ms: AtomicU64::new(0),
            missed: Notify::new(),
        }
    }

    /// Locks the rows of agents for reading.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Rows> {
        self.agent.read()
    }

    /// Locks the rows of hypervisors for reading.
    pub(crate) fn read_measured(&self) -> RwLockReadGuard<'_, Rows> {
        self.hypervisor.read()
    }

    /// Whether live events of process samples have the greatest processes.
    pub(crate) fn lists_processes(&self) -> bool {
        self.greatest.is_on()
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
        self.agent
            .note(&event.instance_id, sample, reported_ms, event.sender.as_ref());
    }

    /// Notes a row of a hypervisor that was stored at this time.
    pub(crate) fn note_measured(&self, event: &HypervisorSampleEvent, reported_ms: u64) {
        let sample = NewestSample {
            at_ms: event.at_ms,
            values: event.values,
            restricted: None,
        };
        self.hypervisor
            .note(&event.instance_id, sample, reported_ms, None);
    }

    /// Notes a sample that was not stored because of its time.
    pub(crate) fn note_unstored(&self, event: &UnstoredEvent) {
        if !self.agent.write().note_unstored(event) {
            counter!("vmwatch_vms_omitted_total").increment(1);
        }
    }

    /// Notes that a VM is above a limit. Returns since when it has been, Unix milliseconds; `None` if too many other VMs are.
    pub(crate) fn note_over_limit(&self, event: &OverLimitEvent) -> Option<u64> {
        let since_ms = self.agent.write().note_over_limit(event);
        if since_ms.is_none() {
            counter!("vmwatch_vms_omitted_total").increment(1);
        }
        since_ms
    }

    /// Removes the rows of a VM whose history was deleted.
    pub(crate) fn remove(&self, id: &InstanceId) {
        for table in [&self.agent, &self.hypervisor] {
            table.write().remove(id);
        }
        self.greatest.remove(id);
    }

    /// Reads the rows of one VM from the database.
    pub(crate) async fn load(&self, id: &InstanceId, deadline: Deadline) -> Result<(), MetricsError> {
        self.agent.load(id, deadline).await?;
        self.hypervisor.load(id, deadline).await
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
        self.agent.compare(begun_ms, deadline).await?;
        self.hypervisor.compare(begun_ms, deadline).await?;
        self.passed_ms.store(begun_ms, Ordering::Relaxed);
        gauge!("vmwatch_listed_vms_with_samples").set(u32::try_from(self.read().count()).unwrap_or(u32::MAX));
        Ok(())
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
            self.read_events(bus, "hypervisor_sample"),
            self.read_events(bus, "removed"),
            self.read_events(bus, "unstored"),
            self.read_events(bus, "over_limit"),
            self.read_processes(bus)
        )?;
        Ok(never)
    }

    /// Follows the live events of process samples, if processes are listed.
    async fn read_processes(&self, bus: &Bus) -> Result<Infallible, async_nats::Error> {
        if self.greatest.is_on() {
            self.read_events(bus, "processes").await
        } else {
            pending().await
        }
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
            let published = u64::try_from(published).unwrap_or(0);
            match decode(&message) {
                Some(LiveEvent::Sample(event)) => self.note(&event, published),
                Some(LiveEvent::HypervisorSample(event)) => self.note_measured(&event, published),
                Some(LiveEvent::Removed(event)) => self.remove(&event.instance_id),
                Some(LiveEvent::Unstored(event)) => self.note_unstored(&event),
                Some(LiveEvent::Processes(event)) => self.greatest.note(&event, published),
                Some(LiveEvent::OverLimit(event)) => {
                    self.note_over_limit(&event);
                }
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
