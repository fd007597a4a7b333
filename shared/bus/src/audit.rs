//! Appending to the audit.
//!
//! Both streams deny deletion and purging to everybody, so that what was appended stays as it is until its age or the
//! stream's size lets the oldest go. A tenth of the size is for what anybody can cause without a session.

mod flood;
mod reader;
mod refusals;

use std::time::Duration;

use async_nats::{
    HeaderMap,
    header::NATS_MESSAGE_ID,
    jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType, Stream},
};
use metrics::counter;
use sha2::{Digest, Sha256};
use tracing::error;
use vmwatch_api::{
    Service,
    audit::{
        AUDIT_STREAM, AUDIT_SUBJECT_PREFIX, AuditRecord, UNAUTHENTICATED_AUDIT_STREAM,
        UNAUTHENTICATED_AUDIT_SUBJECT_PREFIX,
    },
};
use vmwatch_service::config::{Environment, Invalid, STREAM_REPLICAS, Setting, Value};

pub use self::{
    flood::Flood,
    reader::{Newest, newest},
    refusals::Refusals,
};
use super::{Bus, random_id, stream_requests::JetStreamError};

const KEEP: Setting = Setting {
    name: "VMWATCH_AUDIT_KEEP",
    value: Value::Duration("1d", "3650d"),
    default: "365d",
    help: "retention of audit records",
};
const MAX_BYTES: Setting = Setting {
    name: "VMWATCH_AUDIT_MAX_BYTES",
    value: Value::Size("1MiB", "1024GiB"),
    default: "256MiB",
    help: "maximum size of the audit (about 400 bytes per record), of which a tenth is for failed logins; the oldest records are dropped",
};
/// Of every program that appends.
pub const REQUIRED: Setting = Setting {
    name: "VMWATCH_AUDIT_REQUIRED",
    value: Value::Flag,
    default: "true",
    help: "true: changes of users and VM commands are refused while they cannot be audited; false: they proceed",
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
        let keep = env.duration(&KEEP);
        let max_bytes = env.size(&MAX_BYTES);
        let replicas = env.number(&STREAM_REPLICAS);
        Ok(Self {
            keep: keep?,
            max_bytes: i64::try_from(max_bytes?.0).unwrap_or(i64::MAX),
            replicas: replicas?,
        })
    }

    /// How long records are kept.
    pub const fn keep(self) -> Duration {
        self.keep
    }

    /// Both streams, for the program that owns them.
    pub fn streams(self) -> [Config; 2] {
        let tenth = self.max_bytes / 10;
        [
            self.stream(
                AUDIT_STREAM,
                AUDIT_SUBJECT_PREFIX,
                "who asked vmwatch for what, and what became of it",
                self.max_bytes - tenth,
            ),
            self.stream(
                UNAUTHENTICATED_AUDIT_STREAM,
                UNAUTHENTICATED_AUDIT_SUBJECT_PREFIX,
                "failed logins and other requests without a session",
                tenth,
            ),
        ]
    }

    fn stream(self, name: &str, prefix: &str, description: &str, max_bytes: i64) -> Config {
        Config {
            name: name.to_owned(),
            description: Some(description.to_owned()),
            subjects: vec![format!("{prefix}>")],
            retention: RetentionPolicy::Limits,
            storage: StorageType::File,
            discard: DiscardPolicy::Old,
            max_age: self.keep,
            max_bytes,
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

/// The audit, for a program that appends.
#[derive(Debug, Clone)]
pub struct Audit {
    bus: Bus,
    required: bool,
}

impl Audit {
    /// The audit of this bus, whose streams auth-svc makes. `required`: see [`Audit::begin`].
    pub fn new(bus: &Bus, required: bool) -> Self {
        Self {
            bus: bus.clone(),
            required,
        }
    }

    /// Fails while there is no stream to append to.
    pub async fn check(&self) -> Result<(), AuditError> {
        self.stream(AUDIT_STREAM).await.map(drop)
    }

    /// One of the streams, with its state.
    pub async fn stream(&self, name: &str) -> Result<Stream, AuditError> {
        within(self.bus.jetstream().get_stream(name)).await
    }

    /// Appends a record before the act that it announces. If that fails and the audit is required, the act must not
    /// begin; else the record is in the log alone.
    pub async fn begin(&self, record: &AuditRecord, once: &str) -> Result<(), AuditError> {
        match self.append(record, once).await {
            Err(error) if self.required => Err(error),
            Err(error) => {
                lost(record, &error);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Appends a record of what has happened. If that fails, the record is in the log alone.
    pub async fn end(&self, record: &AuditRecord, once: &str) {
        if let Err(error) = self.append(record, once).await {
            lost(record, &error);
        }
    }

    /// Appends a record, which is on disk once this succeeds. Records of the same action and target with the same `once`
    /// within the stream's window for duplicates (two minutes) are one.
    pub async fn append(&self, record: &AuditRecord, once: &str) -> Result<(), AuditError> {
        let body = serde_json::to_vec(record)?;
        // A target may hold anything; a message id may not.
        let target = Sha256::digest(record.target.as_deref().unwrap_or_default());
        let id = format!("{}.{once}.{}", record.action, hex::encode(target));
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, id);
        let stored = self
            .bus
            .publish_stored(record.subject(), headers, body.into(), DEADLINE);
        match stored.await {
            Ok(_) => Ok(()),
            Err(JetStreamError::Timeout) => Err(AuditError::Timeout),
            Err(error) => Err(AuditError::Stream(error.into())),
        }
    }
}

/// The action of a record that belongs to no method: `auth.setup` of vmwatch-auth.
pub(super) fn action(service: Service, what: &str) -> String {
    let name = service.name();
    format!("{}.{what}", name.strip_prefix("vmwatch-").unwrap_or(name))
}

/// Counts and logs a record that could not be appended.
pub fn lost(record: &AuditRecord, cause: &AuditError) {
    counter!("vmwatch_audit_lost_total").increment(1);
    error!(%cause, ?record, "a record could not be appended to the audit");
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
