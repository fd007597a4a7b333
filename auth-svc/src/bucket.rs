//! A JetStream KV bucket of auth-svc: creates the bucket, and reads and changes values that other replicas may change
//! at the same time.

use std::time::Duration;

use async_nats::jetstream::{
    kv::{Entry, Operation},
    stream::Config,
};
use metrics::counter;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Map;
use tracing::warn;
use vmwatch_api::Service;
pub(crate) use vmwatch_bus::provision::BucketConfig as Spec;
use vmwatch_bus::{
    Bus, jetstream,
    provision::{ProvisionError, ensure_stream},
};

use crate::AuthError;

/// JetStream normally answers within milliseconds; after this time it counts as unreachable.
const DEADLINE: Duration = Duration::from_secs(2);
/// Maximum number of attempts to change a value that other replicas change at the same time. Of several concurrent
/// changes, one succeeds and the others retry.
pub(crate) const TRIES: usize = 16;

/// Time for which NATS keeps deletion markers. A copy in memory that missed a marker is read again as a whole.
const MARKER_TTL: &str = "1h";

pub(crate) struct Bucket {
    name: &'static str,
    inner: jetstream::Bucket,
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
        ensure_stream(bus, Service::Auth, &spec.into()).await?;
        Ok(Self::existing(bus, spec.name))
    }

    /// Returns a handle to the KV bucket without creating it. Command-line commands use this, because the running
    /// service has created the KV bucket.
    pub(crate) fn existing(bus: &Bus, name: &'static str) -> Self {
        Self {
            name,
            inner: jetstream::Bucket::new(bus, name, DEADLINE),
        }
    }

    /// Reads the latest entry of a key. A delete marker is returned as well.
    pub(crate) async fn entry(&self, key: &str) -> Result<Option<Entry>, AuthError> {
        Ok(self.inner.entry(key).await?)
    }

    pub(crate) fn decode<T: DeserializeOwned>(&self, entry: Option<&Entry>) -> Value<T> {
        decode(self.name, entry)
    }

    /// Writes a key that has never existed. Returns false if the key exists or was deleted.
    pub(crate) async fn create(&self, key: &str, value: Vec<u8>) -> Result<bool, AuthError> {
        Ok(self.inner.update(key, value.into(), 0).await?.is_some())
    }

    /// Writes the key only if it is unchanged since `read`. Returns false if it was changed in between.
    pub(crate) async fn write_over(
        &self,
        key: &str,
        value: Vec<u8>,
        read: Option<&Entry>,
    ) -> Result<bool, AuthError> {
        let written = match read {
            None => self.inner.create(key, value.into()).await?,
            Some(entry) => self.inner.update(key, value.into(), entry.revision).await?,
        };
        Ok(written.is_some())
    }

    /// Deletes a key, whether or not it exists.
    pub(crate) async fn delete(&self, key: &str) -> Result<(), AuthError> {
        Ok(self.inner.delete(key).await?)
    }

    /// Deletes the key only if it is unchanged since the entry was read. Returns false if it was changed in between.
    pub(crate) async fn delete_read(&self, entry: &Entry) -> Result<bool, AuthError> {
        let deleted = self.inner.delete_revision(&entry.key, entry.revision).await?;
        Ok(deleted.is_some())
    }

    /// Like [`Bucket::delete_read`], with a marker that NATS deletes after [`MARKER_TTL`]. The bucket must be configured by
    /// [`with_marker_ttl`].
    pub(crate) async fn delete_read_with_ttl(&self, entry: &Entry) -> Result<bool, AuthError> {
        let (key, revision) = (&entry.key, entry.revision);
        let deleted = self.inner.delete_revision_for(key, revision, MARKER_TTL).await?;
        Ok(deleted.is_some())
    }
}

/// The configuration of a bucket in which deletion markers expire.
pub(crate) fn with_marker_ttl(spec: Spec) -> Config {
    Config {
        allow_message_ttl: true,
        ..spec.into()
    }
}

/// Creates a bucket if it is missing.
pub(crate) async fn ensure(bus: &Bus, bucket: &Config) -> Result<(), ProvisionError> {
    ensure_stream(bus, Service::Auth, bucket).await.map(drop)
}

/// Decodes an entry of the named KV bucket.
pub(crate) fn decode<T: DeserializeOwned>(bucket: &'static str, entry: Option<&Entry>) -> Value<T> {
    let Some(entry) = entry.filter(|entry| entry.operation == Operation::Put) else {
        return Value::Nothing;
    };
    match serde_json::from_slice(&entry.value) {
        Ok(value) => Value::Whole(value),
        Err(error) => {
            counter!("vmwatch_broken_records_total", "bucket" => bucket).increment(1);
            warn!(%error, bucket, key = entry.key, "a record could not be decoded");
            Value::Broken
        }
    }
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
