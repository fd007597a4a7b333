//! One inbox for the replies to all requests of a connection.
//!
//! The client has one too, but forgets none of those who wait at it: a request that times out leaves its entry there for
//! the life of the connection, 333 bytes of it (async-nats 0.51: `Multiplexer::senders` loses an entry by a reply only). At this one,
//! who stops waiting is gone, whatever way he stops.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_nats::{Client, HeaderMap, Message, PublishError, Subject};
use bytes::Bytes;
use futures::StreamExt;
use metrics::gauge;
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;
use tracing::error;

use super::{BusError, random_id};

/// The inbox; it is read until the last clone of its connection is dropped.
#[derive(Debug)]
pub(super) struct Replies {
    prefix: String,
    waiting: Arc<Waiting>,
    _reader: AbortOnDropHandle<()>,
}

/// Who waits, by the last token of the subject that he is answered on.
#[derive(Debug, Default)]
struct Waiting(Mutex<HashMap<String, oneshot::Sender<Message>>>);

/// No reply will come.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoReply {
    /// The request did not leave.
    #[error(transparent)]
    NotSent(#[from] PublishError),
    /// The inbox is no longer read: the connection has ended.
    #[error("the connection has ended")]
    Ended,
}

impl Replies {
    /// Subscribes to an inbox of its own.
    pub(super) async fn subscribe(client: &Client) -> Result<Self, BusError> {
        let prefix = format!("{}.", client.new_inbox());
        let mut inbox = client.subscribe(format!("{prefix}*")).await?;
        let waiting = Arc::new(Waiting::default());
        let (answered, start) = (Arc::clone(&waiting), prefix.len());
        let reader = tokio::spawn(async move {
            while let Some(message) = inbox.next().await {
                let token = message.subject.get(start..).unwrap_or_default();
                // Nobody where the reply came too late; and the sending fails where it is too late at this moment.
                if let Some(caller) = answered.remove(token) {
                    let _ = caller.send(message);
                }
            }
            error!("the inbox of replies has ended with the connection");
            answered.lock().clear();
        });
        Ok(Self {
            prefix,
            waiting,
            _reader: AbortOnDropHandle::new(reader),
        })
    }

    /// Sends a request and waits for its reply; there is no limit but the caller's.
    pub(super) async fn request(
        &self,
        client: &Client,
        subject: Subject,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<Message, NoReply> {
        let (caller, reply) = oneshot::channel();
        // Not to be guessed: one service could answer for another.
        let place = Place::take(&self.waiting, random_id(), caller);
        let inbox = format!("{}{}", self.prefix, place.token);
        client
            .publish_with_reply_and_headers(subject, inbox, headers, payload)
            .await?;
        reply.await.map_err(|_| NoReply::Ended)
    }
}

impl Waiting {
    fn remove(&self, token: &str) -> Option<oneshot::Sender<Message>> {
        let removed = self.lock().remove(token);
        if removed.is_some() {
            gauge!("vmwatch_bus_replies_awaited").decrement(1.0);
        }
        removed
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<Message>>> {
        // No code that could panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller's place among those who wait, left with this value.
struct Place<'a> {
    waiting: &'a Waiting,
    token: String,
}

impl<'a> Place<'a> {
    fn take(waiting: &'a Waiting, token: String, caller: oneshot::Sender<Message>) -> Self {
        waiting.lock().insert(token.clone(), caller);
        gauge!("vmwatch_bus_replies_awaited").increment(1.0);
        Self { waiting, token }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiting.remove(&self.token);
    }
}
