//! Appending to the audit, and reading it.
//!
//! The stream denies deletion and purging to everybody, so that what was appended stays as it is until its age or the
//! stream's size lets the oldest go.

use std::time::Duration;

use async_nats::{
    HeaderMap,
    header::NATS_MESSAGE_ID,
    jetstream::{
        consumer::{DeliverPolicy, pull::OrderedConfig},
        stream::{Config, DiscardPolicy, RetentionPolicy, StorageType, Stream},
    },
};
use futures::TryStreamExt;
use tracing::warn;

use super::Bus;
use crate::{
    api::audit::{AUDIT_STREAM, AUDIT_SUBJECT_PREFIX, AuditRecord},
    config::{ByteSize, Environment, Invalid, STREAM_REPLICAS, Setting},
};

const KEEP: Setting = Setting {
    name: "VMWATCH_AUDIT_KEEP",
    default: "365d",
    help: "how long audit records are kept",
};
const MAX_BYTES: Setting = Setting {
    name: "VMWATCH_AUDIT_MAX_BYTES",
    default: "256MiB",
    help: "size of the audit; beyond it the oldest records go (about 400 bytes each)",
};

/// The settings of the one program that owns the stream.
pub const SETTINGS: &[Setting] = &[KEEP, MAX_BYTES];

/// JetStream answers in milliseconds or not at all.
const DEADLINE: Duration = Duration::from_secs(3);

/// How long and how much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditSettings {
    keep: Duration,
    max_bytes: i64,
    replicas: usize,
}

impl AuditSettings {
    /// Reads the settings.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let days = |days: u64| Duration::from_hours(24 * days);
        let keep = env.duration(&KEEP, days(1), days(3650));
        let max_bytes = env.within(&MAX_BYTES, ByteSize(1 << 20), ByteSize(1 << 40));
        let replicas = env.within(&STREAM_REPLICAS, 1, 5);
        Ok(Self {
            keep: keep?,
            max_bytes: i64::try_from(max_bytes?.0).unwrap_or(i64::MAX),
            replicas: replicas?,
        })
    }

    /// The stream, for the program that owns it.
    pub fn stream(self) -> Config {
        Config {
            name: AUDIT_STREAM.to_owned(),
            description: Some("who asked vmwatch for what, and what became of it".to_owned()),
            subjects: vec![format!("{AUDIT_SUBJECT_PREFIX}>")],
            retention: RetentionPolicy::Limits,
            storage: StorageType::File,
            discard: DiscardPolicy::Old,
            max_age: self.keep,
            max_bytes: self.max_bytes,
            num_replicas: self.replicas,
            deny_delete: true,
            deny_purge: true,
            ..Config::default()
        }
    }
}

/// The audit could not be appended to or read.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// JetStream refused, or did not answer.
    #[error("the audit stream does not take it")]
    Stream(#[source] async_nats::Error),
    /// JetStream did not answer in time.
    #[error("the audit stream did not answer in time")]
    Timeout,
    /// A record could not be encoded.
    #[error("an audit record could not be encoded")]
    Encode(#[from] serde_json::Error),
}

/// The audit, for who appends.
#[derive(Debug, Clone)]
pub struct Audit {
    bus: Bus,
}

impl Audit {
    /// The audit of this bus, whose stream auth-svc makes.
    pub fn new(bus: &Bus) -> Self {
        Self { bus: bus.clone() }
    }

    /// Fails while there is no stream to append to.
    pub async fn check(&self) -> Result<(), AuditError> {
        within(self.bus.jetstream().get_stream(AUDIT_STREAM))
            .await
            .map(drop)
    }

    /// Appends a record; it is on disk when this answers well. Records with the same `once` within the stream's
    /// window for duplicates (two minutes) are one.
    pub async fn append(&self, record: &AuditRecord, once: &str) -> Result<(), AuditError> {
        let body = serde_json::to_vec(record)?;
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, once);
        let appended = async {
            let stored = self
                .bus
                .jetstream()
                .publish_with_headers(record.subject(), headers, body.into());
            stored.await?.await
        };
        within(appended).await.map(drop)
    }
}

/// The newest records, oldest first. What cannot be read as a record is left out, with a warning.
pub async fn newest(bus: &Bus, limit: u64) -> Result<Vec<AuditRecord>, AuditError> {
    let Some(end) = Reader::open(bus).await? else {
        return Ok(Vec::new());
    };
    let window = end.window(None, limit).await?;
    Ok(window.records.into_iter().map(|(_, record)| record).collect())
}

/// The audit as it is now, for who reads it from its end. Nothing is ever deleted in between, so that the numbers
/// of records follow each other.
#[derive(Debug)]
pub struct Reader {
    stream: Stream,
    first: u64,
    last: u64,
}

/// Some records, one behind the other.
#[derive(Debug, Default)]
pub struct Window {
    /// With their numbers, oldest first. What cannot be read as a record is left out, with a warning.
    pub records: Vec<(u64, AuditRecord)>,
    /// The number of the oldest; there are older ones unless this is `None`.
    pub older_than: Option<u64>,
}

impl Reader {
    /// Looks at the audit; `None` where it is empty.
    pub async fn open(bus: &Bus) -> Result<Option<Self>, AuditError> {
        let stream = within(bus.jetstream().get_stream(AUDIT_STREAM)).await?;
        let state = stream.cached_info().state.clone();
        Ok((state.messages > 0).then_some(Self {
            stream,
            first: state.first_sequence,
            last: state.last_sequence,
        }))
    }

    /// The newest records before this number (before none: the newest of all), at most so many.
    pub async fn window(&self, before: Option<u64>, limit: u64) -> Result<Window, AuditError> {
        let end = before.unwrap_or(u64::MAX).min(self.last.saturating_add(1));
        let start = end.saturating_sub(limit).max(self.first);
        if start >= end {
            return Ok(Window::default());
        }
        let config = OrderedConfig {
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: start,
            },
            ..OrderedConfig::default()
        };
        let consumer = within(self.stream.create_consumer(config)).await?;
        let mut messages = within(consumer.messages()).await?;
        let mut records = Vec::new();
        // By number and not by count: the oldest may go by age while they are read.
        for _ in start..end {
            let Some(message) = within(messages.try_next()).await? else {
                break;
            };
            let number = message.info().map_err(AuditError::Stream)?.stream_sequence;
            if number < end {
                records.extend(decoded(&message.payload).map(|record| (number, record)));
            }
            if number + 1 >= end {
                break;
            }
        }
        Ok(Window {
            records,
            older_than: (start > self.first).then_some(start),
        })
    }

    /// The number behind the last record that was made before this moment, found by halving.
    pub async fn end_at(&self, moment_ms: u64) -> Result<u64, AuditError> {
        let (mut low, mut high) = (self.first, self.last.saturating_add(1));
        while low < high {
            let middle = low + (high - low) / 2;
            let message = within(self.stream.get_raw_message(middle)).await?;
            if decoded(&message.payload).is_some_and(|record| record.at_ms >= moment_ms) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        Ok(low)
    }
}

async fn within<T, E>(work: impl Future<Output = Result<T, E>>) -> Result<T, AuditError>
where
    E: std::error::Error + Send + Sync + 'static,
{
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(AuditError::Stream(error.into())),
        Err(_) => Err(AuditError::Timeout),
    }
}

fn decoded(payload: &[u8]) -> Option<AuditRecord> {
    serde_json::from_slice(payload)
        .inspect_err(|error| warn!(%error, "an audit record cannot be read"))
        .ok()
}
