//! The bucket of records: every write is a compare-and-set on the record's revision, so that of two replicas that
//! believe a command is theirs only one can go on.

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

/// The bucket; the key is the command's id.
pub(crate) const OPERATION_BUCKET: &str = "vmwatch_operations";
/// JetStream answers in milliseconds or not at all.
const DEADLINE: Duration = Duration::from_secs(3);

/// The bucket could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    /// JetStream failed. A write may have been taken all the same.
    #[error("the record store failed")]
    Bucket(#[source] async_nats::Error),
    /// JetStream refused the write: the bucket is full, or larger records are not allowed.
    #[error("the record store takes no more")]
    Refused(#[source] async_nats::Error),
    /// It did not answer in time. A write may be taken all the same.
    #[error("the record store did not answer in time")]
    Timeout,
    /// The bucket could not be followed lately, or was rolled back and is being read again.
    #[error("the record store is not followed at the moment")]
    NotFollowed,
    /// A record could not be encoded, or what is stored is none.
    #[error("a record could not be encoded or decoded")]
    Codec(#[from] serde_json::Error),
}

/// The outcome of a compare-and-set.
#[derive(Debug)]
pub(super) enum Written {
    /// At this revision.
    At(u64),
    /// Somebody else wrote since.
    Overtaken,
}

/// A record and its revision.
pub(super) type Stored = (Record, u64);

#[derive(Debug, Clone)]
pub(super) struct Store {
    bucket: kv::Store,
    events: Events,
}

/// The bucket, as the settings have it.
pub(crate) const fn bucket(settings: &OperationSettings) -> Bucket {
    Bucket {
        name: OPERATION_BUCKET,
        description: "records of commands on VMs",
        max_age: settings.keep,
        max_bytes: settings.max_bytes,
        replicas: settings.replicas,
    }
}

impl Store {
    /// Opens the bucket, and makes a missing one.
    pub(super) async fn open(
        bus: &Bus,
        settings: &OperationSettings,
        events: Events,
    ) -> Result<Self, ProvisionError> {
        let bucket = ensure_bucket(bus.jetstream(), Service::Lifecycle, bucket(settings)).await?;
        Ok(Self { bucket, events })
    }

    /// Makes the record, unless there is one with its id.
    pub(super) async fn create(&self, record: &Record) -> Result<Written, StoreError> {
        let value = serde_json::to_vec(record)?.into();
        let created = within(self.bucket.create(record.operation.id.as_str(), value)).await?;
        match created {
            Ok(revision) => {
                self.events.tell_operation(&record.operation).await;
                Ok(Written::At(revision))
            }
            Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(Written::Overtaken),
            Err(error) if error.kind() == CreateErrorKind::Other => Err(StoreError::Refused(error.into())),
            Err(error) => Err(StoreError::Bucket(error.into())),
        }
    }

    /// Replaces the record that was read or written at this revision.
    pub(super) async fn replace(&self, record: &Record, revision: u64) -> Result<Written, StoreError> {
        let value = serde_json::to_vec(record)?.into();
        let updated = within(self.bucket.update(record.operation.id.as_str(), value, revision)).await?;
        match updated {
            Ok(revision) => {
                self.events.tell_operation(&record.operation).await;
                Ok(Written::At(revision))
            }
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(Written::Overtaken),
            Err(error) if error.kind() == UpdateErrorKind::Other => Err(StoreError::Refused(error.into())),
            Err(error) => Err(StoreError::Bucket(error.into())),
        }
    }

    /// The record with this id.
    pub(super) async fn read(&self, id: &OperationId) -> Result<Option<Stored>, StoreError> {
        let entry = within(self.bucket.entry(id.as_str())).await?;
        let entry = entry.map_err(|error| StoreError::Bucket(error.into()))?;
        entry
            .filter(|entry| entry.operation == kv::Operation::Put)
            .map(|entry| Ok((Record::decode(&entry.value)?, entry.revision)))
            .transpose()
    }

    /// The size of all records.
    pub(super) async fn bytes(&self) -> Result<u64, StoreError> {
        // Not the bucket's `status()`, which is as old as the bucket's handle.
        let info = within(self.bucket.stream.get_info()).await?;
        Ok(info
            .map_err(|error| StoreError::Bucket(error.into()))?
            .state
            .bytes)
    }
}

impl StoreError {
    /// Whether another try would fail as well.
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
            "the records of commands cannot be reached at the moment; try again shortly",
        )
        .caused_by(error)
    }
}
