//! What the buckets of auth-svc have in common: how they are made, and how a value is changed that others change too.

use std::time::Duration;

use async_nats::jetstream::{
    kv::{Config, CreateErrorKind, Store, UpdateErrorKind},
    stream::StorageType,
};
use shared::bus::Bus;

use crate::AuthError;

/// JetStream answers in milliseconds or not at all.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);

/// What a bucket is to be like. Only the newest value of a key is kept.
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) description: &'static str,
    pub(crate) max_age: Duration,
    pub(crate) max_bytes: i64,
    pub(crate) replicas: usize,
}

/// Makes the bucket, or fits an older one to what it is to be like.
pub(crate) async fn open(bus: &Bus, spec: Spec) -> Result<Store, AuthError> {
    let config = Config {
        bucket: spec.name.to_owned(),
        description: spec.description.to_owned(),
        history: 1,
        max_age: spec.max_age,
        max_bytes: spec.max_bytes,
        storage: StorageType::File,
        num_replicas: spec.replicas,
        ..Config::default()
    };
    let made = bus.jetstream().create_or_update_key_value(config);
    let made = tokio::time::timeout(DEADLINE, made).await;
    made.map_err(AuthError::bucket)?.map_err(AuthError::bucket)
}

/// Writes over what was read at this revision, or where nothing was; whether nobody else had written in between.
pub(crate) async fn write_over(
    bucket: &Store,
    key: &str,
    value: Vec<u8>,
    read: Option<u64>,
) -> Result<bool, AuthError> {
    let written = async {
        match read {
            None => match bucket.create(key, value.into()).await {
                Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(false),
                other => other.map(|_| true).map_err(AuthError::bucket),
            },
            Some(revision) => match bucket.update(key, value.into(), revision).await {
                Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(false),
                other => other.map(|_| true).map_err(AuthError::bucket),
            },
        }
    };
    let written = tokio::time::timeout(DEADLINE, written).await;
    written.map_err(AuthError::bucket)?
}
