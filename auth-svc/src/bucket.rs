//! A JetStream KV bucket of auth-svc: creates the bucket, and reads and changes values that other replicas may change
//! at the same time.

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

/// JetStream normally answers within milliseconds; after this time it counts as unreachable.
const DEADLINE: Duration = Duration::from_secs(2);
/// Maximum number of attempts to change a value that other replicas change at the same time. Of several concurrent
/// changes, one succeeds and the others retry.
pub(crate) const TRIES: usize = 16;

pub(crate) struct Bucket {
    bus: Bus,
    name: &'static str,
    store: OnceCell<Store>,
}

/// The value of a key in a KV bucket.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Value<T> {
    Nothing,
    /// The value could not be decoded, which was counted and logged.
    Broken,
    Whole(T),
}

/// A record together with its unknown fields. Fields that a newer version of vmwatch added are preserved when the
/// record is written.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Kept<T> {
    #[serde(flatten)]
    pub(crate) known: T,
    #[serde(flatten)]
    more: Map<String, serde_json::Value>,
}

impl<T> Kept<T> {
    /// Creates a record that has only fields known to this version.
    pub(crate) fn new(known: T) -> Self {
        Self {
            known,
            more: Map::new(),
        }
    }
}

impl<T> Value<T> {
    /// Returns the value if it exists and could be decoded.
    pub(crate) fn into_option(self) -> Option<T> {
        match self {
            Self::Whole(value) => Some(value),
            Self::Nothing | Self::Broken => None,
        }
    }
}

impl Bucket {
    /// Opens the KV bucket, and creates it if it is missing.
    pub(crate) async fn open(bus: &Bus, spec: Spec) -> Result<Self, AuthError> {
        let store = ensure_bucket(bus.jetstream(), Service::Auth, spec).await?;
        Ok(Self {
            bus: bus.clone(),
            name: spec.name,
            store: OnceCell::new_with(Some(store)),
        })
    }

    /// A handle for command-line commands to the KV bucket that the running service created. It is opened when it is
    /// first used.
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

    /// Reads the latest entry of a key. A delete marker is returned as well.
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

    /// Writes a value whether or not the key exists.
    pub(crate) async fn put(&self, key: &str, value: Vec<u8>) -> Result<(), AuthError> {
        within(self.store().await?.put(key, value.into())).await.map(drop)
    }

    /// Writes the key only if it is unchanged since `read`. Returns false if it was changed in between.
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

    /// Deletes a key, whether or not it exists.
    pub(crate) async fn delete(&self, key: &str) -> Result<(), AuthError> {
        within(self.store().await?.delete(key)).await
    }

    /// Deletes the key only if it is unchanged since the entry was read. Returns false if it was changed in between.
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

/// Waits for JetStream's answer until the deadline.
async fn within<T, E: Into<async_nats::Error>>(
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, AuthError> {
    let done = tokio::time::timeout(DEADLINE, work).await;
    done.map_err(AuthError::bucket)?.map_err(AuthError::bucket)
}

/// Asserts that a record from its golden file is unchanged after decoding and encoding, including fields that a newer
/// version added.
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
