//! Live events: told after the rows are stored, at most once, and never in the way of the rows.

use std::time::Duration;

use async_nats::{
    HeaderMap,
    header::NATS_MESSAGE_ID,
    jetstream::{
        Context,
        stream::{Config, DiscardPolicy, RetentionPolicy, StorageType},
    },
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
    events::{EVENT_STREAM, LiveEvent, ProcessesEvent, SampleEvent, event_filter},
};
use vmwatch_bus::provision::ensure_stream;

use crate::{MetricsError, config::EventSettings, documents::SAMPLED_AT};

/// Events that wait to be sent; a bus that is away fills it, and then they are lost.
const WAITING: usize = 4096;
/// Events sent and not yet acknowledged.
const UNACKNOWLEDGED: usize = 64;
/// JetStream answers in milliseconds or not at all.
const DEADLINE: Duration = Duration::from_secs(2);
/// An event that is told again within this time, by a sample that was delivered again, is told once.
const DUPLICATE_WINDOW: Duration = Duration::from_mins(2);

/// Where events are told.
#[derive(Clone)]
pub(crate) struct Events {
    waiting: mpsc::Sender<Told>,
}

struct Told {
    event: LiveEvent,
    /// The same for the same rows.
    id: String,
}

/// The stream, as the settings have it.
pub(crate) fn stream(settings: &EventSettings) -> Config {
    Config {
        name: EVENT_STREAM.to_owned(),
        description: Some("what just happened, for live readers".to_owned()),
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

/// Makes the stream if it is missing.
pub(crate) async fn prepare(jetstream: &Context, settings: &EventSettings) -> Result<(), MetricsError> {
    ensure_stream(jetstream, Service::Metrics, &stream(settings)).await?;
    Ok(())
}

impl Events {
    /// Starts the task that sends them; it ends when the last handle is dropped and all are sent or given up.
    pub(crate) fn start(jetstream: Context, settings: EventSettings) -> (Self, JoinHandle<()>) {
        let (waiting, told) = mpsc::channel(WAITING);
        let sending = tokio::spawn(send_all(jetstream, settings, told));
        (Self { waiting }, sending)
    }

    /// Tells of a stored VM row.
    pub(crate) fn tell_sample(&self, row: &RawDocument) {
        self.tell(sample(row));
    }

    /// Tells of stored process rows of one message.
    pub(crate) fn tell_processes(&self, rows: &[RawDocumentBuf]) {
        self.tell(processes(rows));
    }

    fn tell(&self, told: Option<Told>) {
        if told.is_none_or(|told| self.waiting.try_send(told).is_err()) {
            lost();
        }
    }
}

fn lost() {
    counter!("vmwatch_events_lost_total").increment(1);
}

async fn send_all(jetstream: Context, settings: EventSettings, told: mpsc::Receiver<Told>) {
    let told = futures::stream::unfold(told, async |mut told| Some((told.recv().await?, told)));
    let sent = told
        .map(|told| timeout(DEADLINE, send(&jetstream, told)))
        .buffered(UNACKNOWLEDGED);
    tokio::pin!(sent);
    let mut prepared = Instant::now();
    while let Some(sent) = sent.next().await {
        let error = match sent {
            Ok(Ok(())) => {
                counter!("vmwatch_events_sent_total").increment(1);
                continue;
            }
            Ok(Err(error)) => error.cause(),
            Err(_) => "it was not acknowledged in time".to_owned(),
        };
        lost();
        debug!(error, "a live event is lost");
        // A stream that was deleted, or a server that lost its store, is no reason for a restart.
        if prepared.elapsed() > DEADLINE {
            prepared = Instant::now();
            warn!(error, "live events are lost at the moment");
            if let Ok(Err(error)) = timeout(DEADLINE, prepare(&jetstream, &settings)).await {
                warn!(
                    cause = error.cause(),
                    "the stream of live events cannot be prepared"
                );
            }
        }
    }
}

async fn send(jetstream: &Context, told: Told) -> Result<(), MetricsError> {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_MESSAGE_ID, told.id);
    let body = serde_json::to_vec(&told.event)?;
    let sent = jetstream
        .publish_with_headers(told.event.subject(), headers, body.into())
        .await;
    let acknowledged = sent.map_err(MetricsError::jetstream)?.await;
    acknowledged.map(drop).map_err(MetricsError::jetstream)
}

/// The event of a VM row as ingestion made it; anything else is none.
fn sample(row: &RawDocument) -> Option<Told> {
    let event = SampleEvent {
        instance_id: instance(row)?,
        at_ms: at_ms(row)?,
        cpu_util: row.get_f64("cpu_util").ok()?,
        mem: row.get_f64("mem").ok()?,
        disk_read: row.get_f64("disk_read").ok()?,
        disk_write: row.get_f64("disk_write").ok()?,
        net_incoming: row.get_f64("net_incoming").ok()?,
        net_outgoing: row.get_f64("net_outgoing").ok()?,
        proc: u32::try_from(row.get_i32("proc").ok()?).ok()?,
    };
    told(LiveEvent::Sample(event), row)
}

fn processes(rows: &[RawDocumentBuf]) -> Option<Told> {
    let first = rows.first()?;
    let event = ProcessesEvent {
        instance_id: instance(first)?,
        at_ms: at_ms(first)?,
        rows: rows.len() as u64,
    };
    told(LiveEvent::Processes(event), first)
}

fn told(event: LiveEvent, row: &RawDocument) -> Option<Told> {
    let id = format!("{}:{}", event.kind(), row.get_object_id("_id").ok()?.to_hex());
    Some(Told { event, id })
}

fn instance(row: &RawDocument) -> Option<InstanceId> {
    row.get_str("instance_id").ok()?.parse().ok()
}

fn at_ms(row: &RawDocument) -> Option<u64> {
    u64::try_from(row.get_datetime(SAMPLED_AT).ok()?.timestamp_millis()).ok()
}
