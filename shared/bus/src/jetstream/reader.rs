//! Reads a stream in order and follows it.

use std::time::Duration;

use async_nats::{
    StatusCode, Subject, Subscriber,
    header::NATS_LAST_CONSUMER,
    jetstream::{
        consumer::{AckPolicy, DeliverPolicy, push},
        message::Message,
    },
};
use bytes::Bytes;
use futures::StreamExt;
use tokio::time::{Instant, timeout_at};

use super::{Existing, JetStreamError};
use crate::Bus;

/// Interval at which the server reports that the consumer exists and has nothing to deliver.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// The server deletes the consumer when its reader has been gone for this time.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// Reads a stream through a consumer of its own. After an error, the caller opens a new reader at the position that it
/// has reached. The client's ordered consumer would do this itself, but its requests leak memory if they time out (see
/// [`super`]).
#[derive(Debug)]
pub struct Reader {
    bus: Bus,
    messages: Subscriber,
    /// The number of messages received so far.
    received: u64,
    /// Time at which the last message or heartbeat of the server arrived.
    heard: Instant,
    /// Subject of a pending flow-control request: the server sends more messages only after a reply to this subject.
    flow_control: Option<Subject>,
}

impl Bus {
    /// Reads the messages of a stream from the given position on. A filter that is not empty selects messages by their
    /// subject.
    pub async fn read_stream(
        &self,
        stream: &str,
        filter: &str,
        position: DeliverPolicy,
        limit: Duration,
    ) -> Result<Reader, JetStreamError> {
        let inbox = self.client.new_inbox();
        let messages = self.client.subscribe(inbox.clone()).await;
        let messages = messages.map_err(|error| JetStreamError::NotSent(error.into()))?;
        let wanted = push::Config {
            deliver_subject: inbox,
            filter_subject: filter.to_owned(),
            deliver_policy: position,
            ack_policy: AckPolicy::None,
            max_deliver: 1,
            flow_control: true,
            idle_heartbeat: HEARTBEAT,
            inactive_threshold: IDLE_LIMIT,
            num_replicas: 1,
            memory_storage: true,
            ..push::Config::default()
        };
        self.create_consumer(stream, wanted, Existing::Keep, limit)
            .await?;
        Ok(Reader {
            bus: self.clone(),
            messages,
            received: 0,
            heard: Instant::now(),
            flow_control: None,
        })
    }
}

impl Reader {
    /// Returns the next message. If the caller stops waiting, a later call returns that message.
    pub async fn next(&mut self) -> Result<Message, JetStreamError> {
        loop {
            if let Some(subject) = self.flow_control.clone() {
                let sent = self.bus.client.publish(subject, Bytes::new()).await;
                sent.map_err(|error| JetStreamError::NotSent(error.into()))?;
                self.flow_control = None;
            }
            let received = timeout_at(self.heard + 2 * HEARTBEAT, self.messages.next()).await;
            let message = received.map_err(|_| JetStreamError::Interrupted)?;
            let message = message.ok_or(JetStreamError::Interrupted)?;
            self.heard = Instant::now();
            match message.status {
                None => {
                    let message = Message {
                        message,
                        context: self.bus.jetstream.clone(),
                    };
                    let info = message.info().map_err(JetStreamError::Unreadable)?;
                    self.received += 1;
                    if info.consumer_sequence != self.received {
                        return Err(JetStreamError::Interrupted);
                    }
                    return Ok(message);
                }
                Some(StatusCode::IDLE_HEARTBEAT) => {
                    let sent = message.headers.as_ref();
                    let sent = sent.and_then(|headers| headers.get_last(NATS_LAST_CONSUMER));
                    let sent = sent.and_then(|sent| sent.as_str().parse::<u64>().ok());
                    if sent.is_some_and(|sent| sent != self.received) {
                        return Err(JetStreamError::Interrupted);
                    }
                    self.flow_control = message.reply;
                }
                Some(_) => return Err(JetStreamError::Interrupted),
            }
        }
    }
}
