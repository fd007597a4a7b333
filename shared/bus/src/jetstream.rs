//! Sends requests to JetStream, each with a deadline. Services send all requests to JetStream through this module,
//! except those of pull consumers.
//!
//! In async-nats 0.51, each request or publish that times out leaves an entry of 333 bytes in the client's table of
//! pending replies for the life of the connection (nats.rs issue 1618). The requests in this module use the inbox of
//! this crate (`replies.rs`) instead, which forgets a request when its caller stops waiting. The client's pull
//! consumers do not use the table of pending replies, so services use them directly.

mod bucket;
mod reader;

use std::{collections::HashMap, time::Duration};

use async_nats::{
    HeaderMap, Message, StatusCode, Subject,
    client::PublishErrorKind,
    jetstream::{
        self, ErrorCode,
        consumer::{self, Consumer, FromConsumer, IntoConsumerConfig, PullConsumer, pull},
        message::StreamMessage,
        publish::PublishAck,
        response::Response,
        stream::{Config, Info, RawMessage},
    },
};
use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;

pub use self::{
    bucket::{Bucket, Watch},
    reader::Reader,
};
use super::{Bus, replies::NoReply};

/// A JetStream request failed, or its result is unknown.
#[derive(Debug, thiserror::Error)]
pub enum JetStreamError {
    #[error("JetStream did not answer in time")]
    Timeout,
    #[error("no stream stores messages of this subject, or JetStream is not available")]
    NoResponders,
    /// The NATS server accepts no message of this size.
    #[error("the message is larger than the NATS server accepts")]
    TooLarge,
    #[error("the request to JetStream could not be sent")]
    NotSent(#[source] async_nats::Error),
    #[error("JetStream refused the request")]
    Refused(#[source] jetstream::Error),
    /// JetStream answered a direct read of a message with an error status.
    #[error("JetStream answered with status {0}")]
    Status(StatusCode),
    #[error("JetStream's answer could not be decoded")]
    Unreadable(#[source] async_nats::Error),
    #[error("a key of a bucket may contain only letters, digits, `-`, `/`, `_`, `=` and inner dots")]
    InvalidKey,
    /// A message that the server sent did not reach the reader, or the reader's consumer was deleted.
    #[error("the reader lost its place in the stream")]
    Interrupted,
}

impl JetStreamError {
    /// The server's error code, if the server refused the request.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(error) => Some(error.error_code()),
            _ => None,
        }
    }

    /// Whether the same request would fail again.
    pub const fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Refused(_) | Self::TooLarge | Self::NotSent(_) | Self::InvalidKey
        )
    }
}

/// How many messages of each subject a stream holds.
#[derive(Debug, Deserialize)]
pub struct StreamSubjects {
    config: Config,
    state: SubjectCounts,
}

#[derive(Debug, Deserialize)]
struct SubjectCounts {
    #[serde(default)]
    subjects: HashMap<String, i64>,
}

impl StreamSubjects {
    /// The maximum number of messages of a subject; 0 or less if it is not limited.
    pub const fn most(&self) -> i64 {
        self.config.max_messages_per_subject
    }

    /// The number of messages by subject.
    pub fn counts(&self) -> impl Iterator<Item = (&str, i64)> {
        let subjects = self.state.subjects.iter();
        subjects.map(|(subject, count)| (subject.as_str(), *count))
    }
}

/// Whether creating a consumer may change an existing consumer with the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    Keep,
    Update,
}

/// Selects a message of a stream.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Select<'a> {
    seq: u64,
    #[serde(rename = "next_by_subj", skip_serializing_if = "Option::is_none")]
    filter: Option<&'a str>,
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
        let answer = self.ask_jetstream(subject.into(), headers, body, limit).await?;
        decode(&answer)
    }

    /// Reads the configuration and the state of a JetStream stream.
    pub async fn stream_info(&self, stream: &str, limit: Duration) -> Result<Info, JetStreamError> {
        self.jetstream_api(&format!("STREAM.INFO.{stream}"), limit).await
    }

    /// Reads how many messages a stream holds of each subject that matches a filter. The server reports at most 100,000
    /// subjects.
    pub async fn stream_subjects(
        &self,
        stream: &str,
        filter: &str,
        limit: Duration,
    ) -> Result<StreamSubjects, JetStreamError> {
        let request = format!("STREAM.INFO.{stream}");
        let filter = json!({ "subjects_filter": filter });
        self.jetstream_api_with(&request, &filter, limit).await
    }

    /// Creates a stream. Also succeeds if the stream exists already with the same configuration.
    pub async fn create_stream(&self, wanted: &Config, limit: Duration) -> Result<Info, JetStreamError> {
        let request = format!("STREAM.CREATE.{}", wanted.name);
        self.jetstream_api_with(&request, wanted, limit).await
    }

    /// Changes the configuration of a stream.
    pub async fn update_stream(&self, wanted: &Config, limit: Duration) -> Result<Info, JetStreamError> {
        let request = format!("STREAM.UPDATE.{}", wanted.name);
        self.jetstream_api_with(&request, wanted, limit).await
    }

    /// Reads a message of a stream; `None` if the stream does not hold it.
    pub async fn message(
        &self,
        stream: &str,
        sequence: u64,
        limit: Duration,
    ) -> Result<Option<StreamMessage>, JetStreamError> {
        let select = Select {
            seq: sequence,
            filter: None,
        };
        self.select_message(stream, select, limit).await
    }

    /// Reads the first message that has this or a higher sequence number and whose subject matches the filter.
    pub async fn next_message(
        &self,
        stream: &str,
        sequence: u64,
        filter: &str,
        limit: Duration,
    ) -> Result<Option<StreamMessage>, JetStreamError> {
        let select = Select {
            seq: sequence,
            filter: Some(filter),
        };
        self.select_message(stream, select, limit).await
    }

    async fn select_message(
        &self,
        stream: &str,
        select: Select<'_>,
        limit: Duration,
    ) -> Result<Option<StreamMessage>, JetStreamError> {
        #[derive(Deserialize)]
        struct Found {
            message: RawMessage,
        }
        let request = format!("STREAM.MSG.GET.{stream}");
        match self.jetstream_api_with(&request, &select, limit).await {
            Ok(Found { message }) => {
                let message = StreamMessage::try_from(message).map_err(JetStreamError::Unreadable)?;
                Ok(Some(message))
            }
            Err(error) if error.code() == Some(ErrorCode::NO_MESSAGE_FOUND) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes a message of a stream.
    pub async fn delete_message(
        &self,
        stream: &str,
        sequence: u64,
        limit: Duration,
    ) -> Result<(), JetStreamError> {
        let request = format!("STREAM.MSG.DELETE.{stream}");
        let done: Result<Ignored, _> = self
            .jetstream_api_with(&request, &json!({ "seq": sequence }), limit)
            .await;
        done.map(drop)
    }

    /// Reads the configuration and state of a consumer.
    pub async fn consumer_info(
        &self,
        stream: &str,
        consumer: &str,
        limit: Duration,
    ) -> Result<consumer::Info, JetStreamError> {
        self.jetstream_api(&format!("CONSUMER.INFO.{stream}.{consumer}"), limit)
            .await
    }

    /// Creates a consumer. With [`Existing::Keep`], fails if a consumer with the same name exists.
    pub async fn create_consumer(
        &self,
        stream: &str,
        wanted: impl IntoConsumerConfig,
        existing: Existing,
        limit: Duration,
    ) -> Result<consumer::Info, JetStreamError> {
        let config = wanted.into_consumer_config();
        let mut request = format!("CONSUMER.CREATE.{stream}");
        // If the consumer has a name, the server requires its name and filter in the subject of the request.
        if let Some(name) = config.name.as_ref().or(config.durable_name.as_ref()) {
            request = format!("{request}.{name}");
            if !config.filter_subject.is_empty() {
                request = format!("{request}.{}", config.filter_subject);
            }
        }
        let action = match existing {
            Existing::Keep => "create",
            Existing::Update => "",
        };
        let body = json!({ "stream_name": stream, "config": config, "action": action });
        self.jetstream_api_with(&request, &body, limit).await
    }

    /// Returns a client for an existing pull consumer.
    pub fn pull_consumer(&self, info: consumer::Info) -> Result<PullConsumer, JetStreamError> {
        let config = pull::Config::try_from_consumer_config(info.config.clone());
        let config = config.map_err(JetStreamError::Unreadable)?;
        Ok(Consumer::new(config, info, self.jetstream.clone()))
    }

    /// Asks for the state of the account, which any server with JetStream answers.
    pub(crate) async fn account_info(&self, limit: Duration) -> Result<(), JetStreamError> {
        let answer: Result<Ignored, _> = self.jetstream_api("INFO", limit).await;
        answer.map(drop)
    }

    /// Sends a JetStream API request that has no parameters.
    pub(crate) async fn jetstream_api<T: DeserializeOwned>(
        &self,
        request: &str,
        limit: Duration,
    ) -> Result<T, JetStreamError> {
        let subject = format!("$JS.API.{request}").into();
        let asking = self.ask_jetstream(subject, HeaderMap::new(), Bytes::new(), limit);
        decode(&asking.await?)
    }

    async fn jetstream_api_with<T: DeserializeOwned>(
        &self,
        request: &str,
        parameters: &impl Serialize,
        limit: Duration,
    ) -> Result<T, JetStreamError> {
        let subject = format!("$JS.API.{request}").into();
        let body = serde_json::to_vec(parameters).map_err(|error| JetStreamError::NotSent(error.into()))?;
        let asking = self.ask_jetstream(subject, HeaderMap::new(), body.into(), limit);
        decode(&asking.await?)
    }

    async fn ask_jetstream(
        &self,
        subject: Subject,
        headers: HeaderMap,
        body: Bytes,
        limit: Duration,
    ) -> Result<Message, JetStreamError> {
        let asking = self.replies.request(&self.client, subject, headers, body);
        let answer = tokio::time::timeout(limit, asking).await;
        let answer = answer.map_err(|_| JetStreamError::Timeout)?;
        let answer = answer.map_err(|error| match error {
            NoReply::NotSent(error) if error.kind() == PublishErrorKind::MaxPayloadExceeded => {
                JetStreamError::TooLarge
            }
            error => JetStreamError::NotSent(error.into()),
        })?;
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            return Err(JetStreamError::NoResponders);
        }
        Ok(answer)
    }
}

/// An answer whose content is not needed.
#[derive(Debug, Deserialize)]
struct Ignored {}

fn decode<T: DeserializeOwned>(answer: &Message) -> Result<T, JetStreamError> {
    match serde_json::from_slice(&answer.payload) {
        Ok(Response::Ok(answer)) => Ok(answer),
        Ok(Response::Err { error }) => Err(JetStreamError::Refused(error)),
        Err(error) => Err(JetStreamError::Unreadable(error.into())),
    }
}
