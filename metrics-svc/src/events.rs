//! Publishes live events about stored rows, at most once and without ever delaying the storing of rows.

use std::{sync::Arc, time::Duration};

use async_nats::{
    HeaderMap,
    header::NATS_MESSAGE_ID,
    jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType},
};
use bson::{RawDocument, RawDocumentBuf};
use futures::StreamExt;
use metrics::counter;
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tracing::{debug, warn};
use vmwatch_api::{
    InstanceId, Service,
    agents::{Sender, VmLimit},
    current::ProcessUse,
    events::{
        EVENT_STREAM, HypervisorSampleEvent, LiveEvent, OverLimitEvent, ProcessesEvent, RemovedEvent,
        SampleEvent, UnstoredEvent, event_filter,
    },
    time::unix_millis,
};
use vmwatch_bus::{Bus, provision::ensure_stream};

use crate::{
    MetricsError, config::EventSettings, documents::SAMPLED_AT, greatest::sum_by_name, newest::NewestRows,
    vm_row::VmRow,
};

/// Maximum number of queued events. While the bus is unreachable the queue fills, and further events are dropped.
const QUEUE_LENGTH: usize = 4096;
/// Maximum number of published events that JetStream has not acknowledged yet.
const MAX_UNACKNOWLEDGED: usize = 64;
/// Deadline of a JetStream request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(2);
/// If an event is published again within this time because its sample was redelivered, JetStream stores it only once.
const DUPLICATE_WINDOW: Duration = Duration::from_mins(2);

/// Queues live events for publication.
#[derive(Clone)]
pub(crate) struct Events {
    queue: mpsc::Sender<QueuedEvent>,
    newest: Arc<NewestRows>,
}

struct QueuedEvent {
    event: LiveEvent,
    /// Message id for JetStream's duplicate detection. Events about equal rows have equal ids.
    id: String,
}

/// Configuration of the stream of live events according to the settings.
pub(crate) fn stream(settings: &EventSettings) -> Config {
    Config {
        name: EVENT_STREAM.to_owned(),
        description: Some("live events".to_owned()),
        subjects: vec![event_filter(None)],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        max_age: settings.max_age,
        max_bytes: settings.bytes,
        duplicate_window: DUPLICATE_WINDOW.min(settings.max_age),
        storage: StorageType::File,
        num_replicas: settings.replicas,
        ..Config::default()
    }
}

/// Creates the stream of live events if it is missing.
pub(crate) async fn prepare(bus: &Bus, settings: &EventSettings) -> Result<(), MetricsError> {
    ensure_stream(bus, Service::Metrics, &stream(settings)).await?;
    Ok(())
}

impl Events {
    /// Starts the task that publishes live events. The task ends when the last handle is dropped and all events have
    /// been sent or dropped.
    pub(crate) fn start(
        bus: Bus,
        settings: EventSettings,
        newest: Arc<NewestRows>,
    ) -> (Self, JoinHandle<()>) {
        let (queue, queued) = mpsc::channel(QUEUE_LENGTH);
        let sending = tokio::spawn(send_all(bus, settings, queued));
        (Self { queue, newest }, sending)
    }

    /// Publishes a live event about a VM row that was just stored, and updates the VM in the list of VMs.
    pub(crate) fn publish_sample(&self, row: &RawDocument, sender: Option<Sender>) {
        let queued = sample(row, sender);
        if let Some(LiveEvent::Sample(event)) = queued.as_ref().map(|queued| &queued.event) {
            self.newest.note_stored(event);
        }
        self.enqueue(queued);
    }

    /// Publishes a live event about a row of a hypervisor like [`Events::publish_sample`].
    pub(crate) fn publish_hypervisor_sample(&self, row: &RawDocument) {
        let queued = hypervisor_sample(row);
        if let Some(LiveEvent::HypervisorSample(event)) = queued.as_ref().map(|queued| &queued.event) {
            self.newest.note_measured(event, unix_millis());
        }
        self.enqueue(queued);
    }

    /// Publishes a live event about the process rows of one message.
    pub(crate) fn publish_processes(&self, rows: &[RawDocumentBuf]) {
        let greatest = if self.newest.lists_processes() {
            sum_by_name(rows)
        } else {
            (Vec::new(), 0)
        };
        self.enqueue(processes(rows, greatest));
    }

    /// Publishes a live event about a sample that was not stored because of its time, and updates the VM in the list of
    /// VMs.
    pub(crate) fn publish_unstored(&self, event: UnstoredEvent) {
        self.newest.note_unstored(&event);
        let id = format!("unstored:{}:{}", event.instance_id, event.arrived_ms);
        let event = LiveEvent::Unstored(event);
        self.enqueue(Some(QueuedEvent { event, id }));
    }

    /// Publishes a live event about a VM that is above a limit now, and updates the VM in the list of VMs.
    pub(crate) fn publish_over_limit(&self, instance_id: InstanceId, limit: VmLimit) {
        let at_ms = unix_millis();
        let mut event = OverLimitEvent {
            instance_id,
            limit,
            since_ms: at_ms,
            at_ms,
        };
        let Some(since_ms) = self.newest.note_over_limit(&event) else {
            return;
        };
        event.since_ms = since_ms;
        let id = format!("over_limit:{}:{limit:?}:{at_ms}", event.instance_id);
        let event = LiveEvent::OverLimit(event);
        self.enqueue(Some(QueuedEvent { event, id }));
    }

    /// Publishes a live event about a VM whose history was deleted.
    pub(crate) fn publish_removed(&self, instance_id: &InstanceId) {
        let at_ms = unix_millis();
        let event = LiveEvent::Removed(RemovedEvent {
            instance_id: instance_id.clone(),
            at_ms,
        });
        let id = format!("{}:{instance_id}:{at_ms}", event.kind());
        self.enqueue(Some(QueuedEvent { event, id }));
    }

    fn enqueue(&self, event: Option<QueuedEvent>) {
        if event.is_none_or(|event| self.queue.try_send(event).is_err()) {
            lost();
        }
    }
}

fn lost() {
    counter!("vmwatch_events_lost_total").increment(1);
}

async fn send_all(bus: Bus, settings: EventSettings, queued: mpsc::Receiver<QueuedEvent>) {
    let events = futures::stream::unfold(queued, async |mut queued| Some((queued.recv().await?, queued)));
    let sent = events.map(|event| send(&bus, event)).buffered(MAX_UNACKNOWLEDGED);
    tokio::pin!(sent);
    let mut prepared = Instant::now();
    while let Some(sent) = sent.next().await {
        let error = match sent {
            Ok(()) => {
                counter!("vmwatch_events_sent_total").increment(1);
                continue;
            }
            Err(error) => error.cause(),
        };
        lost();
        debug!(error, "publishing a live event failed; the event was dropped");
        // Recreate the stream if it was deleted or if the NATS server lost its data.
        if prepared.elapsed() > DEADLINE {
            prepared = Instant::now();
            warn!(
                error,
                "publishing live events failed; recreating the stream if it is missing"
            );
            if let Ok(Err(error)) = timeout(DEADLINE, prepare(&bus, &settings)).await {
                warn!(cause = error.cause(), "creating the stream of live events failed");
            }
        }
    }
}

async fn send(bus: &Bus, queued: QueuedEvent) -> Result<(), MetricsError> {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_MESSAGE_ID, queued.id);
    let body = serde_json::to_vec(&queued.event)?;
    let stored = bus.publish_stored(queued.event.subject(), headers, body.into(), DEADLINE);
    stored.await.map(drop).map_err(MetricsError::jetstream)
}

/// Creates the live event of a VM row, or returns `None` if the row has no VM or no internal date.
fn sample(row: &RawDocument, sender: Option<Sender>) -> Option<QueuedEvent> {
    let read = VmRow::from_document(row).ok()?;
    let event = SampleEvent {
        instance_id: instance(row)?,
        at_ms: at_ms(row)?,
        values: read.values.into(),
        restricted: read.restricted,
        sender,
    };
    queued(LiveEvent::Sample(event), row)
}

fn hypervisor_sample(row: &RawDocument) -> Option<QueuedEvent> {
    let event = HypervisorSampleEvent {
        instance_id: instance(row)?,
        at_ms: at_ms(row)?,
        values: VmRow::from_document(row).ok()?.values.into(),
    };
    queued(LiveEvent::HypervisorSample(event), row)
}

fn processes(
    rows: &[RawDocumentBuf],
    (greatest, names_left_out): (Vec<ProcessUse>, u32),
) -> Option<QueuedEvent> {
    let first = rows.first()?;
    let event = ProcessesEvent {
        instance_id: instance(first)?,
        at_ms: at_ms(first)?,
        rows: rows.len() as u64,
        greatest,
        names_left_out,
    };
    queued(LiveEvent::Processes(event), first)
}

fn queued(event: LiveEvent, row: &RawDocument) -> Option<QueuedEvent> {
    let id = format!("{}:{}", event.kind(), row.get_object_id("_id").ok()?.to_hex());
    Some(QueuedEvent { event, id })
}

fn instance(row: &RawDocument) -> Option<InstanceId> {
    row.get_str("instance_id").ok()?.parse().ok()
}

fn at_ms(row: &RawDocument) -> Option<u64> {
    u64::try_from(row.get_datetime(SAMPLED_AT).ok()?.timestamp_millis()).ok()
}
