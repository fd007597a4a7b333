//! Requests to JetStream with a deadline, for what is asked often.
//!
//! The client's own requests and publishes leave an entry in its table of pending replies for each one that times out, for
//! the life of the connection (nats.rs issue 1618). These wait at the inbox of this crate (`replies.rs`), which forgets a
//! request that is no longer waited for.

use std::time::Duration;

use async_nats::{
    HeaderMap, StatusCode, Subject,
    jetstream::{self, publish::PublishAck, response::Response, stream::Info},
};
use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::Bus;

/// JetStream did not do what it was asked for, as far as is known.
#[derive(Debug, thiserror::Error)]
pub enum JetStreamError {
    /// No answer came in time.
    #[error("JetStream did not answer in time")]
    Timeout,
    /// No stream takes the subject, or JetStream is not available.
    #[error("no stream takes the subject, or JetStream is not available")]
    NoResponders,
    /// The request was not sent, or the connection ended.
    #[error("the request to JetStream could not be sent")]
    NotSent(#[source] async_nats::Error),
    /// JetStream refused it.
    #[error("JetStream refused the request")]
    Refused(#[source] jetstream::Error),
    /// The answer could not be decoded.
    #[error("JetStream's answer could not be decoded")]
    Unreadable(#[from] serde_json::Error),
}

impl Bus {
    /// Publishes a message and waits until a stream has stored it.
    pub async fn publish_stored(
        &self,
        subject: impl Into<Subject>,
        headers: HeaderMap,
        body: Bytes,
        limit: Duration,
    ) -> Result<PublishAck, JetStreamError> {
        self.ask_jetstream(subject.into(), headers, body, limit).await
    }

    /// The configuration and state of a stream.
    pub async fn stream_info(&self, stream: &str, limit: Duration) -> Result<Info, JetStreamError> {
        self.jetstream_api(&format!("STREAM.INFO.{stream}"), limit).await
    }

    /// The answer of JetStream's API to a request without parameters.
    pub(crate) async fn jetstream_api<T: DeserializeOwned>(
        &self,
        request: &str,
        limit: Duration,
    ) -> Result<T, JetStreamError> {
        let subject = format!("$JS.API.{request}").into();
        self.ask_jetstream(subject, HeaderMap::new(), Bytes::new(), limit)
            .await
    }

    async fn ask_jetstream<T: DeserializeOwned>(
        &self,
        subject: Subject,
        headers: HeaderMap,
        body: Bytes,
        limit: Duration,
    ) -> Result<T, JetStreamError> {
        let asking = self.replies.request(&self.client, subject, headers, body);
        let answer = tokio::time::timeout(limit, asking).await;
        let answer = answer.map_err(|_| JetStreamError::Timeout)?;
        let answer = answer.map_err(|error| JetStreamError::NotSent(error.into()))?;
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            return Err(JetStreamError::NoResponders);
        }
        match serde_json::from_slice(&answer.payload)? {
            Response::Ok(answer) => Ok(answer),
            Response::Err { error } => Err(JetStreamError::Refused(error)),
        }
    }
}
