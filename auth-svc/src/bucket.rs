//! A KV bucket of auth-svc: creating it, and reading and changing values that other replicas change concurrently.

use std::time::Duration;

use async_nats::jetstream::kv::{CreateErrorKind, Entry, Operation, Store, UpdateErrorKind};
use metrics::counter;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Map;
use tokio::sync::OnceCell;
use tracing::warn;
use vmwatch_api::Service;
pub(crate) use vmwatch_bus::provision::Bucket as Spec;
use vmwatch_bus::{
    Bus,
    provision::{ensure_bucket, existing_bucket},
};

use crate::AuthError;

/// JetStream normally answers within milliseconds, so that a longer wait means that it is unreachable.
const DEADLINE: Duration = Duration::from_secs(2);
/// Maximum attempts of a concurrent change. Of several changes of one value at a time, one succeeds and the others
/// retry.
pub(crate) const TRIES: usize = 16;

pub(crate) struct Bucket {
    bus: Bus,
    name: &'static str,
    store: OnceCell<Store>,
}

/// The value of a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Value<T> {
    Nothing,
    /// The value could not be decoded; this was counted and logged.
    Broken,
    Whole(T),
}

/// A record together with fields of a newer version, which are preserved when the record is written.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Kept<T> {
    #[serde(flatten)]
    pub(crate) known: T,
    #[serde(flatten)]
    more: Map<String, serde_json::Value>,
}

impl<T> Kept<T> {
    /// A record of this version.
    pub(crate) fn new(known: T) -> Self {
        Self {
            known,
            more: Map::new(),
        }
    }
}

impl<T> Value<T> {
    /// The value, if it exists and could be decoded.
    pub(crate) fn into_option(self) -> Option<T> {
        match self {
            Self::Whole(value) => Some(value),
            Self::Nothing | Self::Broken => None,
        }
    }
}

impl Bucket {
    /// Opens the bucket and creates it if it is missing.
    pub(crate) async fn open(bus: &Bus, spec: Spec) -> Result<Self, AuthError> {
        let store = ensure_bucket(bus.jetstream(), Service::Auth, spec).await?;
        Ok(Self {
            bus: bus.clone(),
            name: spec.name,
            store: OnceCell::new_with(Some(store)),
        })
    }

    /// The bucket of the running service, for a command. It is opened at its first use.
    pub(crate) fn existing(bus: &Bus, name: &'static str) -> Self {
        Self {
            bus: bus.clone(),
            name,
            store: OnceCell::new(),
        }
    }

    async fn store(&self) -> Result<&Store, AuthError> {
        let open = || existing_bucket(self.bus.jetstream(), self.name);
        Ok(self.store.get_or_try_init(open).await?)
    }

    /// Reads the latest entry of a key, including a deletion marker.
    pub(crate) async fn entry(&self, key: &str) -> Result<Option<Entry>, AuthError> {
        within(self.store().await?.entry(key)).await
    }

    pub(crate) fn decode<T: DeserializeOwned>(&self, entry: Option<&Entry>) -> Value<T> {
        let Some(entry) = entry.filter(|entry| entry.operation == Operation::Put) else {
            return Value::Nothing;
        };
        match serde_json::from_slice(&entry.value) {
            Ok(value) => Value::Whole(value),
            Err(error) => {
                counter!("vmwatch_broken_records_total", "bucket" => self.name).increment(1);
                warn!(%error, bucket = self.name, key = entry.key, "a record could not be decoded");
                Value::Broken
            }
        }
    }

    /// Writes a value unconditionally.
    pub(crate) async fn put(&self, key: &str, value: Vec<u8>) -> Result<(), AuthError> {
        within(self.store().await?.put(key, value.into())).await.map(drop)
    }

    /// Replaces the entry that was read. Returns false if the key was changed in between.
    pub(crate) async fn write_over(
        &self,
        key: &str,
        value: Vec<u8>,
        read: Option<&Entry>,
    ) -> Result<bool, AuthError> {
        let store = self.store().await?;
        let written = async {
            match read {
                None => match store.create(key, value.into()).await {
                    Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(false),
                    other => other.map(|_| true).map_err(AuthError::bucket),
                },
                Some(entry) => match store.update(key, value.into(), entry.revision).await {
                    Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(false),
                    other => other.map(|_| true).map_err(AuthError::bucket),
                },
            }
        };
        let written = tokio::time::timeout(DEADLINE, written).await;
        written.map_err(AuthError::bucket)?
    }

    /// Deletes a key, whether it exists or not.
    pub(crate) async fn delete(&self, key: &str) -> Result<(), AuthError> {
        within(self.store().await?.delete(key)).await
    }

    /// Deletes the entry that was read. Returns false if the key was changed in between.
    pub(crate) async fn delete_read(&self, entry: &Entry) -> Result<bool, AuthError> {
        let store = self.store().await?;
        let deleted = store.delete_expect_revision(&entry.key, Some(entry.revision));
        match tokio::time::timeout(DEADLINE, deleted).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(false),
            Ok(Err(error)) => Err(AuthError::bucket(error)),
            Err(late) => Err(AuthError::bucket(late)),
        }
    }
}

/// Waits for an answer of JetStream until the deadline.
async fn within<T, E: Into<async_nats::Error>>(
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, AuthError> {
    let done = tokio::time::timeout(DEADLINE, work).await;
    done.map_err(AuthError::bucket)?.map_err(AuthError::bucket)
}

/// Asserts that a record decodes from its golden file and encodes to the same JSON, including fields of a newer
/// version.
#[cfg(test)]
pub(crate) fn assert_matches_golden<T: Serialize + DeserializeOwned>(golden: &str) {
    let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
    let record: T = serde_json::from_value(golden.clone()).unwrap();
    assert_eq!(serde_json::to_value(&record).unwrap(), golden);
    let mut newer = golden;
    newer["of_a_newer_version"] = serde_json::json!({ "a": [1] });
    let kept: Kept<T> = serde_json::from_value(newer.clone()).unwrap();
    assert_eq!(serde_json::to_value(&kept).unwrap(), newer);
}
