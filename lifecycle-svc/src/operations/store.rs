//! KV bucket of operation records. Every write is a compare-and-set on the record's revision. If two replicas both
//! believe that they own an operation, only one of them can continue.

use std::time::Duration;

use async_nats::jetstream::kv::{self, CreateErrorKind, UpdateErrorKind};
use vmwatch_api::{
    Service,
    lifecycle::OperationId,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    Bus,
    provision::{Bucket, ProvisionError, ensure_bucket},
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
    Bucket(#[source] async_nats::Error),
    /// JetStream refused the write, because the KV bucket is full or the record is too large.
    #[error("the KV bucket of operation records refused the write")]
    Refused(#[source] async_nats::Error),
    /// JetStream did not answer in time; if the request was a write, it may still take effect.
    #[error("the KV bucket of operation records did not answer in time")]
    Timeout,
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
    bucket: kv::Store,
    events: Events,
}

/// Returns the configuration of the KV bucket of operation records according to the settings.
pub(crate) const fn bucket(settings: &OperationSettings) -> Bucket {
    Bucket {
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
        let bucket = ensure_bucket(bus.jetstream(), Service::Lifecycle, bucket(settings)).await?;
        Ok(Self { bucket, events })
    }

    /// Creates an operation record, unless a record with its id exists.
    pub(super) async fn create(&self, record: &Record) -> Result<Written, StoreError> {
        let value = serde_json::to_vec(record)?.into();
        let created = within(self.bucket.create(record.operation.id.as_str(), value)).await?;
        match created {
            Ok(revision) => {
                self.events.publish_operation(&record.operation).await;
                Ok(Written::At(revision))
            }
            Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(Written::Conflict),
            Err(error) if error.kind() == CreateErrorKind::Other => Err(StoreError::Refused(error.into())),
            Err(error) => Err(StoreError::Bucket(error.into())),
        }
    }

    /// Replaces an operation record if its revision is still the given one.
    pub(super) async fn replace(&self, record: &Record, revision: u64) -> Result<Written, StoreError> {
        let value = serde_json::to_vec(record)?.into();
        let updated = within(self.bucket.update(record.operation.id.as_str(), value, revision)).await?;
        match updated {
            Ok(revision) => {
                self.events.publish_operation(&record.operation).await;
                Ok(Written::At(revision))
            }
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(Written::Conflict),
            Err(error) if error.kind() == UpdateErrorKind::Other => Err(StoreError::Refused(error.into())),
            Err(error) => Err(StoreError::Bucket(error.into())),
        }
    }

    /// Reads the record of an operation.
    pub(super) async fn read(&self, id: &OperationId) -> Result<Option<Stored>, StoreError> {
        let entry = within(self.bucket.entry(id.as_str())).await?;
        let entry = entry.map_err(|error| StoreError::Bucket(error.into()))?;
        entry
            .filter(|entry| entry.operation == kv::Operation::Put)
            .map(|entry| Ok((Record::decode(&entry.value)?, entry.revision)))
            .transpose()
    }

    /// Returns the current size of the KV bucket of operation records.
    pub(super) async fn bytes(&self) -> Result<u64, StoreError> {
        // The KV bucket's `status()` would return the size as of the time at which the bucket was opened.
        let info = within(self.bucket.stream.get_info()).await?;
        Ok(info
            .map_err(|error| StoreError::Bucket(error.into()))?
            .state
            .bytes)
    }
}

impl StoreError {
    /// Whether the error is permanent, so that a retry would fail as well.
    pub(super) const fn is_final(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Codec(_))
    }
}

async fn within<T>(work: impl Future<Output = T>) -> Result<T, StoreError> {
    tokio::time::timeout(DEADLINE, work)
        .await
        .map_err(|_| StoreError::Timeout)
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
