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
use futures::{StreamExt, TryStreamExt};
use tokio_util::sync::CancellationToken;
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

/// The settings of every program that appends.
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

    fn stream(self) -> Config {
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
    /// Makes the stream where there is none, or fits an older one to the settings; waits for the bus. `None` at
    /// shutdown.
    pub async fn open(bus: &Bus, settings: AuditSettings, shutdown: &CancellationToken) -> Option<Self> {
        loop {
            match bus.jetstream().create_or_update_stream(settings.stream()).await {
                Ok(_) => return Some(Self { bus: bus.clone() }),
                Err(error) => warn!(%error, "waiting for JetStream: the audit stream"),
            }
            tokio::select! {
                () = shutdown.cancelled() => return None,
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
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
        match tokio::time::timeout(DEADLINE, appended).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(AuditError::Stream(error.into())),
            Err(_) => Err(AuditError::Timeout),
        }
    }
}

/// The newest records, oldest first. What cannot be read as a record is left out, with a warning.
pub async fn newest(bus: &Bus, limit: u64) -> Result<Vec<AuditRecord>, AuditError> {
    tokio::time::timeout(DEADLINE * 3, read(bus, limit))
        .await
        .map_err(|_| AuditError::Timeout)?
        .map_err(AuditError::Stream)
}

async fn read(bus: &Bus, limit: u64) -> Result<Vec<AuditRecord>, async_nats::Error> {
    let stream: Stream = bus.jetstream().get_stream(AUDIT_STREAM).await?;
    let state = stream.cached_info().state.clone();
    if state.messages == 0 {
        return Ok(Vec::new());
    }
    // Nothing is ever deleted in between, so that sequence numbers count records.
    let start_sequence = (state.last_sequence + 1)
        .saturating_sub(limit)
        .max(state.first_sequence);
    let count = (state.last_sequence + 1).saturating_sub(start_sequence);
    let consumer = stream
        .create_consumer(OrderedConfig {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence },
            ..OrderedConfig::default()
        })
        .await?;
    let messages = consumer.messages().await?.take(usize::try_from(count)?);
    let messages: Vec<_> = messages.try_collect().await?;
    let records = messages.iter().filter_map(|message| {
        serde_json::from_slice(&message.payload)
            .inspect_err(|error| warn!(%error, subject = %message.subject, "an audit record cannot be read"))
            .ok()
    });
    Ok(records.collect())
}
