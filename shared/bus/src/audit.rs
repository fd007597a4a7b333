//! Appends audit records to the two JetStream streams of the audit.
//!
//! Both streams deny deletion and purging, so an audit record remains unchanged until its age or the stream's size
//! limit evicts it. A tenth of the total size is reserved for records that clients can cause without a session.

mod announced;
mod flood;
mod reader;
mod refusals;

use std::time::Duration;

use async_nats::{
    HeaderMap,
    header::NATS_MESSAGE_ID,
    jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType},
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
use super::{Bus, jetstream::JetStreamError, random_id};

const KEEP: Setting = Setting {
    name: "VMWATCH_AUDIT_KEEP",
    value: Value::Duration("1d", "3650d"),
    default: "365d",
    help: "time after which audit records are deleted",
};
const MAX_BYTES: Setting = Setting {
    name: "VMWATCH_AUDIT_MAX_BYTES",
    value: Value::Size("1MiB", "1024GiB"),
    default: "256MiB",
    help: "maximum size of both audit streams together (about 400 bytes per record); a tenth is reserved for failed logins; beyond it the oldest records are deleted",
};
/// The audit setting of every program that appends audit records.
pub const REQUIRED: Setting = Setting {
    name: "VMWATCH_AUDIT_REQUIRED",
    value: Value::Flag,
    default: "true",
    help: "whether actions that cannot be recorded in the audit are refused; true: VM commands, changes to user accounts and changes by command line fail while the audit is unreachable; false: they proceed unaudited",
};

/// The audit settings of auth-svc, which owns the audit streams.
pub const SETTINGS: &[Setting] = &[KEEP, MAX_BYTES];

/// JetStream normally answers within milliseconds; after this time it counts as unreachable.
const DEADLINE: Duration = Duration::from_secs(3);

/// How long and up to which total size audit records are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditSettings {
    keep: Duration,
    max_bytes: i64,
    replicas: usize,
}

impl AuditSettings {
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

    pub const fn keep(self) -> Duration {
        self.keep
    }

    /// The configurations of both audit streams, for auth-svc, which creates them.
    pub fn streams(self) -> [Config; 2] {
        let tenth = self.max_bytes / 10;
        [
            self.stream(
                AUDIT_STREAM,
                AUDIT_SUBJECT_PREFIX,
                "audit records: user, action, target and result",
                self.max_bytes - tenth,
            ),
            self.stream(
                UNAUTHENTICATED_AUDIT_STREAM,
                UNAUTHENTICATED_AUDIT_SUBJECT_PREFIX,
                "audit records of failed logins and other requests without a session",
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

/// Writing to the audit or reading from it failed.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// JetStream rejected the request or was unreachable.
    #[error("the audit stream rejected the request or is unreachable")]
    Stream(#[source] async_nats::Error),
    #[error("the audit stream did not answer in time")]
    Timeout,
    #[error("an audit record could not be encoded")]
    Encode(#[from] serde_json::Error),
}

/// Appends records to the audit.
#[derive(Debug, Clone)]
pub struct Audit {
    bus: Bus,
    required: bool,
}

impl Audit {
    /// Creates a handle to the audit streams, which auth-svc creates. [`Audit::begin`] explains `required`.
    pub fn new(bus: &Bus, required: bool) -> Self {
        Self {
            bus: bus.clone(),
            required,
        }
    }

    /// Fails if an audit stream does not exist or is unreachable.
    pub async fn check(&self) -> Result<(), AuditError> {
        self.bus.stream_info(AUDIT_STREAM, DEADLINE).await?;
        Ok(())
    }

    /// Appends an audit record that announces an action. If this fails and the audit is required, the caller must not
    /// start the action; if the audit is not required, the record is only logged.
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

    /// Appends an audit record of a completed action. If this fails, the record is only logged.
    pub async fn end(&self, record: &AuditRecord, once: &str) {
        if let Err(error) = self.append(record, once).await {
            lost(record, &error);
        }
    }

    /// Appends an audit record; on success the record is on disk. Records with the same action, target and `once` are
    /// stored only once if they arrive within the stream's duplicate window (two minutes).
    pub async fn append(&self, record: &AuditRecord, once: &str) -> Result<(), AuditError> {
        let body = serde_json::to_vec(record)?;
        // The target is hashed because a target may contain any character, unlike a NATS message id.
        let target = Sha256::digest(record.target.as_deref().unwrap_or_default());
        let id = format!("{}.{once}.{}", record.action, hex::encode(target));
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, id);
        let stored = self
            .bus
            .publish_stored(record.subject(), headers, body.into(), DEADLINE);
        stored.await?;
        Ok(())
    }
}

/// The audit action of something that is not a method, such as `auth.setup` for the `setup` command of vmwatch-auth.
pub(super) fn action(service: Service, what: &str) -> String {
    let name = service.name();
    format!("{}.{what}", name.strip_prefix("vmwatch-").unwrap_or(name))
}

pub fn lost(record: &AuditRecord, cause: &AuditError) {
    counter!("vmwatch_audit_lost_total").increment(1);
    error!(%cause, ?record, "audit append failed; the record is only in this log");
}

impl From<JetStreamError> for AuditError {
    fn from(error: JetStreamError) -> Self {
        match error {
            JetStreamError::Timeout => Self::Timeout,
            error => Self::Stream(error.into()),
        }
    }
}
