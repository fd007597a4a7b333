//! The command `rekey`: seals all secrets of channels again, with the first key of the key file.

use futures::TryStreamExt;
use mongodb::bson::doc;
use vmwatch_api::alerts::RecordId;

use crate::{
    AlertError,
    seal::{Keys, SealError},
    store::{Store, StoredChannel},
};

/// What came of sealing the secrets again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rekeyed {
    /// Number of secrets that were sealed again.
    pub sealed: u64,
    /// Number of secrets that were sealed with the first key already.
    pub current: u64,
    /// The channels whose secrets could not be opened, with the reason.
    pub failed: Vec<(String, SealError)>,
    /// The channels that were changed meanwhile; the command must be repeated.
    pub changed: Vec<String>,
}

/// Seals the secrets of all channels with the first key. Can be repeated.
pub(crate) async fn run(store: &Store, keys: &Keys) -> Result<Rekeyed, AlertError> {
    if !keys.are_known() {
        return Err(SealError::NoKey.into());
    }
    let channels: Vec<StoredChannel> = store.channels.find(doc! {}).await?.try_collect().await?;
    let mut rekeyed = Rekeyed::default();
    for channel in channels {
        let Some(sealed) = &channel.secret else {
            continue;
        };
        if keys.is_current(sealed) {
            rekeyed.current += 1;
            continue;
        }
        match again(keys, &channel, sealed) {
            Ok(secret) => {
                let unchanged = doc! { "_id": &channel.id, "revision": channel.revision, "secret": sealed };
                let update = doc! { "$set": { "secret": secret }, "$inc": { "revision": 1_i64 } };
                let updated = store.channels.update_one(unchanged, update).await?;
                if updated.matched_count == 1 {
                    rekeyed.sealed += 1;
                } else {
                    rekeyed.changed.push(channel.spec.name.to_string());
                }
            }
            Err(error) => rekeyed.failed.push((channel.spec.name.to_string(), error)),
        }
    }
    Ok(rekeyed)
}

/// Opens a secret and seals it with the first key.
fn again(keys: &Keys, channel: &StoredChannel, sealed: &str) -> Result<String, SealError> {
    let id: RecordId = channel.id.parse().map_err(|_| SealError::Damaged)?;
    let secret = keys.open(&id, &channel.spec.target, sealed)?;
    keys.seal(&id, &channel.spec.target, &secret)
}
