//! A KV bucket: reading, writing and following it.
//!
//! A bucket is a stream that keeps the last message of each subject; a key is the part of the subject after the
//! bucket's prefix.

use std::time::Duration;

use async_nats::{
    HeaderMap, StatusCode,
    header::{NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, NATS_MESSAGE_TTL},
    jetstream::{
        ErrorCode,
        consumer::DeliverPolicy,
        kv::{Entry, Operation},
        message::StreamMessage,
    },
};
use bytes::Bytes;

use super::{JetStreamError, Reader, Select};
use crate::Bus;

const OPERATION: &str = "KV-Operation";
const DELETED: &str = "DEL";

/// Access to a KV bucket, which the owning service creates. Each call takes at most the time `limit`.
#[derive(Debug, Clone)]
pub struct Bucket {
    bus: Bus,
    name: &'static str,
    limit: Duration,
}

impl Bucket {
    pub fn new(bus: &Bus, name: &'static str, limit: Duration) -> Self {
        Self {
            bus: bus.clone(),
            name,
            limit,
        }
    }

    /// Reads the latest entry of a key, including a deletion marker.
    pub async fn entry(&self, key: &str) -> Result<Option<Entry>, JetStreamError> {
        let request = format!("{}.{}", self.direct_get(), self.subject(key)?);
        let found = self.read(request, Bytes::new()).await?;
        Ok(found.map(|message| Entry {
            bucket: self.name.to_owned(),
            key: key.to_owned(),
            operation: operation(Some(&message.headers)),
            value: message.payload,
            revision: message.sequence,
            created: message.time,
            delta: 0,
            seen_current: false,
        }))
    }

    /// Whether the bucket holds an entry with at least this revision.
    pub(crate) async fn holds_from(&self, revision: u64) -> Result<bool, JetStreamError> {
        let all = format!("{}>", self.prefix());
        let select = Select {
            seq: revision,
            filter: Some(&all),
        };
        let body = serde_json::to_vec(&select).map_err(|error| JetStreamError::NotSent(error.into()))?;
        let found = self.read(self.direct_get(), body.into()).await?;
        Ok(found.is_some())
    }

    /// Writes a value unconditionally and returns its revision.
    pub async fn put(&self, key: &str, value: Bytes) -> Result<u64, JetStreamError> {
        self.write(key, HeaderMap::new(), value).await
    }

    /// Writes a value if the key has none. Returns its revision, or `None` if the key has a value.
    pub async fn create(&self, key: &str, value: Bytes) -> Result<Option<u64>, JetStreamError> {
        let creating = async {
            let created = self.update(key, value.clone(), 0).await?;
            if created.is_some() {
                return Ok(created);
            }
            match self.entry(key).await? {
                Some(marker) if marker.operation != Operation::Put => {
                    self.update(key, value, marker.revision).await
                }
                _ => Ok(None),
            }
        };
        let created = tokio::time::timeout(self.limit, creating).await;
        created.map_err(|_| JetStreamError::Timeout)?
    }

    /// Replaces the value of a key if the key still has this revision. Returns the new revision, or `None` if the key
    /// has another revision.
    pub async fn update(
        &self,
        key: &str,
        value: Bytes,
        revision: u64,
    ) -> Result<Option<u64>, JetStreamError> {
        unless_changed(self.write(key, expecting(revision), value).await)
    }

    /// Like [`Bucket::update`], with a value that NATS deletes after the time `keep`, such as `1h`. The bucket must allow
    /// that (`allow_message_ttl`).
    pub async fn update_for(
        &self,
        key: &str,
        value: Bytes,
        revision: u64,
        keep: &str,
    ) -> Result<Option<u64>, JetStreamError> {
        let mut headers = expecting(revision);
        headers.insert(NATS_MESSAGE_TTL, keep);
        unless_changed(self.write(key, headers, value).await)
    }

    /// Deletes a key; also succeeds if the key does not exist.
    pub async fn delete(&self, key: &str) -> Result<(), JetStreamError> {
        let mut headers = HeaderMap::new();
        headers.insert(OPERATION, DELETED);
        self.write(key, headers, Bytes::new()).await.map(drop)
    }

    /// Deletes a key if it still has this revision. Returns the revision of the deletion marker, or `None` if the key
    /// has another revision.
    pub async fn delete_revision(&self, key: &str, revision: u64) -> Result<Option<u64>, JetStreamError> {
        let mut headers = expecting(revision);
        headers.insert(OPERATION, DELETED);
        unless_changed(self.write(key, headers, Bytes::new()).await)
    }

    /// Like [`Bucket::delete_revision`], with a marker that NATS deletes after the time `keep`, such as `1h`. The bucket
    /// must allow that (`allow_message_ttl`).
    pub async fn delete_revision_for(
        &self,
        key: &str,
        revision: u64,
        keep: &str,
    ) -> Result<Option<u64>, JetStreamError> {
        let mut headers = expecting(revision);
        headers.insert(OPERATION, DELETED);
        headers.insert(NATS_MESSAGE_TTL, keep);
        unless_changed(self.write(key, headers, Bytes::new()).await)
    }

    /// The size of all entries in bytes.
    pub async fn bytes(&self) -> Result<u64, JetStreamError> {
        let info = self.bus.stream_info(&self.stream(), self.limit).await?;
        Ok(info.state.bytes)
    }

    /// Reads all entries, then each change.
    pub(crate) async fn watch(&self) -> Result<Watch, JetStreamError> {
        let filter = format!("{}>", self.prefix());
        let reader = self
            .bus
            .read_stream(&self.stream(), &filter, DeliverPolicy::All, self.limit)
            .await?;
        Ok(Watch {
            reader,
            bucket: self.name,
            prefix: self.prefix(),
            seen_current: false,
        })
    }

    pub(crate) fn stream(&self) -> String {
        format!("KV_{}", self.name)
    }

    fn prefix(&self) -> String {
        format!("$KV.{}.", self.name)
    }

    fn direct_get(&self) -> String {
        format!("$JS.API.DIRECT.GET.{}", self.stream())
    }

    fn subject(&self, key: &str) -> Result<String, JetStreamError> {
        let is_allowed = |letter: char| letter.is_ascii_alphanumeric() || "-/_=.".contains(letter);
        let has_empty_token = key.split('.').any(str::is_empty);
        if has_empty_token || !key.chars().all(is_allowed) {
            return Err(JetStreamError::InvalidKey);
        }
        Ok(format!("{}{key}", self.prefix()))
    }

    async fn read(&self, request: String, body: Bytes) -> Result<Option<StreamMessage>, JetStreamError> {
        let asking = self
            .bus
            .ask_jetstream(request.into(), HeaderMap::new(), body, self.limit);
        let answer = asking.await?;
        match answer.status {
            None => {
                let message = StreamMessage::try_from(answer);
                message
                    .map(Some)
                    .map_err(|error| JetStreamError::Unreadable(error.into()))
            }
            Some(StatusCode::NOT_FOUND) => Ok(None),
            Some(status) => Err(JetStreamError::Status(status)),
        }
    }

    async fn write(&self, key: &str, headers: HeaderMap, value: Bytes) -> Result<u64, JetStreamError> {
        let subject = self.subject(key)?;
        let stored = self.bus.publish_stored(subject, headers, value, self.limit);
        Ok(stored.await?.sequence)
    }
}

fn expecting(revision: u64) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, revision.to_string());
    headers
}

fn unless_changed(written: Result<u64, JetStreamError>) -> Result<Option<u64>, JetStreamError> {
    match written {
        Ok(revision) => Ok(Some(revision)),
        Err(error)
            if matches!(
                error.code(),
                Some(ErrorCode::STREAM_WRONG_LAST_SEQUENCE | ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn operation(headers: Option<&HeaderMap>) -> Operation {
    let named = headers.and_then(|headers| headers.get(OPERATION));
    named
        .and_then(|named| named.as_str().parse().ok())
        .unwrap_or(Operation::Put)
}

/// Reads a bucket: all entries, then each change.
#[derive(Debug)]
pub struct Watch {
    reader: Reader,
    bucket: &'static str,
    prefix: String,
    /// Whether all entries that the bucket held at the start were read.
    seen_current: bool,
}

impl Watch {
    /// Returns the next entry. If the caller stops waiting, a later call returns that entry.
    pub(crate) async fn next(&mut self) -> Result<Entry, JetStreamError> {
        let message = self.reader.next().await?;
        let info = message.info().map_err(JetStreamError::Unreadable)?;
        self.seen_current |= info.pending == 0;
        let key = message.subject.strip_prefix(self.prefix.as_str());
        Ok(Entry {
            bucket: self.bucket.to_owned(),
            key: key.unwrap_or_default().to_owned(),
            operation: operation(message.headers.as_ref()),
            revision: info.stream_sequence,
            created: info.published,
            delta: info.pending,
            seen_current: self.seen_current,
            value: message.payload.clone(),
        })
    }
}
