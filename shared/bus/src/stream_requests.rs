//! Sends frequent requests to JetStream, each with a deadline.
//!
//! Each request or publish of the NATS client that times out leaves an entry in the client's table of pending replies
//! for the life of the connection (nats.rs issue 1618). The requests in this module use the inbox of this crate
//! (`replies.rs`) instead, which forgets a request when its caller stops waiting.

use std::time::Duration;

use async_nats::{
    HeaderMap, StatusCode, Subject,
    jetstream::{self, publish::PublishAck, response::Response, stream::Info},
};
use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::Bus;

/// A JetStream request failed, or its result is unknown.
#[derive(Debug, thiserror::Error)]
pub enum JetStreamError {
    #[error("JetStream did not answer in time")]
    Timeout,
    #[error("no stream stores messages of this subject, or JetStream is not available")]
    NoResponders,
    #[error("the request to JetStream could not be sent")]
    NotSent(#[source] async_nats::Error),
    #[error("JetStream refused the request")]
    Refused(#[source] jetstream::Error),
    #[error("JetStream's answer could not be decoded")]
    Unreadable(#[from] serde_json::Error),
}

impl Bus {
    /// Publishes a message and waits until JetStream has stored it.
    pub async fn publish_stored(
        &self,
        subject: impl Into<Subject>,
        headers: HeaderMap,
        body: Bytes,
        limit: Duration,
    ) -> Result<PublishAck, JetStreamError> {
        self.ask_jetstream(subject.into(), headers, body, limit).await
    }

    /// Reads the configuration and the state of a JetStream stream.
    pub async fn stream_info(&self, stream: &str, limit: Duration) -> Result<Info, JetStreamError> {
        self.jetstream_api(&format!("STREAM.INFO.{stream}"), limit).await
    }

    /// Sends a JetStream API request that has no parameters.
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
