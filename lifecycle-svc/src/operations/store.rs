//! KV bucket of operation records. Every write is a compare-and-set on the record's revision. If two replicas both
//! believe that they own an operation, only one of them can continue.

use std::time::Duration;

use async_nats::jetstream::kv::Operation;
use vmwatch_api::{
    Service,
    lifecycle::OperationId,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    Bus,
    jetstream::{Bucket, JetStreamError},
    provision::{BucketConfig, ProvisionError, ensure_stream},
};

use super::record::Record;
use crate::{config::OperationSettings, events::Events};

/// Name of the KV bucket of operation records. Its keys are operation ids.
pub(crate) const OPERATION_BUCKET: &str = "vmwatch_operations";
/// Deadline of a JetStream request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(3);

/// Why the KV bucket of operation records could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    /// JetStream failed; if the request was a write, it may still have taken effect.
    #[error("the KV bucket of operation records failed")]
    Bucket(#[from] JetStreamError),
    /// This replica's in-memory copy of the KV bucket is out of date.
    #[error("the in-memory copy of the operation records is out of date")]
    NotFollowed,
    /// An operation record could not be encoded or decoded.
    #[error("an operation record could not be encoded or decoded")]
    Codec(#[from] serde_json::Error),
}

/// Outcome of a compare-and-set write.
#[derive(Debug)]
pub(super) enum Written {
    /// The operation record was written and has this revision.
    At(u64),
    /// Another write has changed the operation record since it was read.
    Conflict,
}

/// An operation record and its revision.
pub(super) type Stored = (Record, u64);

#[derive(Debug, Clone)]
pub(super) struct Store {
    bucket: Bucket,
    events: Events,
}

/// Returns the configuration of the KV bucket of operation records according to the settings.
pub(crate) const fn bucket(settings: &OperationSettings) -> BucketConfig {
    BucketConfig {
        name: OPERATION_BUCKET,
        description: "operations on VMs",
        max_age: settings.keep,
        max_bytes: settings.max_bytes,
        replicas: settings.replicas,
    }
}

impl Store {
    /// Opens the KV bucket of operation records, and creates it if it is missing.
    pub(super) async fn open(
        bus: &Bus,
        settings: &OperationSettings,
        events: Events,
    ) -> Result<Self, ProvisionError> {
        ensure_stream(bus, Service::Lifecycle, &bucket(settings).into()).await?;
        let bucket = Bucket::new(bus, OPERATION_BUCKET, DEADLINE);
        Ok(Self { bucket, events })
    }

    /// Creates an operation record, unless a record with its id exists.
    pub(super) async fn create(&self, record: &Record) -> Result<Written, StoreError> {
        let value = serde_json::to_vec(record)?.into();
        let created = self.bucket.create(record.operation.id.as_str(), value).await?;
        Ok(self.written(record, created).await)
    }

    /// Replaces an operation record if its revision is still the given one.
    pub(super) async fn replace(&self, record: &Record, revision: u64) -> Result<Written, StoreError> {
        let value = serde_json::to_vec(record)?.into();
        let key = record.operation.id.as_str();
        let updated = self.bucket.update(key, value, revision).await?;
        Ok(self.written(record, updated).await)
    }

    async fn written(&self, record: &Record, revision: Option<u64>) -> Written {
        let Some(revision) = revision else {
            return Written::Conflict;
        };
        self.events.publish_operation(&record.operation).await;
        Written::At(revision)
    }

    /// Reads the record of an operation.
    pub(super) async fn read(&self, id: &OperationId) -> Result<Option<Stored>, StoreError> {
        let entry = self.bucket.entry(id.as_str()).await?;
        entry
            .filter(|entry| entry.operation == Operation::Put)
            .map(|entry| Ok((Record::decode(&entry.value)?, entry.revision)))
            .transpose()
    }

    /// Returns the current size of the KV bucket of operation records.
    pub(super) async fn bytes(&self) -> Result<u64, StoreError> {
        Ok(self.bucket.bytes().await?)
    }
}

impl StoreError {
    /// Whether the error is permanent, so that a retry would fail as well.
    pub(super) const fn is_final(&self) -> bool {
        match self {
            Self::Bucket(error) => error.is_final(),
            Self::NotFollowed => false,
            Self::Codec(_) => true,
        }
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let kind = match error {
            StoreError::NotFollowed => FaultKind::Unavailable,
            _ => FaultKind::Backend,
        };
        Self::new(
            kind,
            "the storage for operation records is unreachable; try again shortly",
        )
        .caused_by(error)
    }
}
