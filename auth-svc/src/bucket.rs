//! What the buckets of auth-svc have in common: how a value is changed that others change too.

use std::time::Duration;

use async_nats::jetstream::kv::{CreateErrorKind, Store, UpdateErrorKind};

use crate::AuthError;

/// JetStream answers in milliseconds or not at all.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);

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
