//! A single inbox for the replies to all requests on a NATS connection.
//!
//! The NATS client has such an inbox as well, but it does not forget requests that time out: an entry of 333 bytes
//! remains for the life of the connection (in async-nats 0.51, only a reply removes an entry of
//! `Multiplexer::senders`). This inbox removes an entry as soon as its caller stops waiting, whatever the reason.

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

/// The inbox for replies. The task that reads it ends when the last clone of the connection is dropped.
#[derive(Debug)]
pub(super) struct Replies {
    prefix: String,
    waiting: Arc<Pending>,
    _reader: AbortOnDropHandle<()>,
}

/// Pending requests, keyed by the last token of their reply subject.
#[derive(Debug, Default)]
struct Pending(Mutex<HashMap<String, oneshot::Sender<Message>>>);

/// Why a request got no reply.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoReply {
    /// The request could not be sent.
    #[error(transparent)]
    NotSent(#[from] PublishError),
    /// The NATS connection has ended, so the inbox is no longer read.
    #[error("the connection has ended")]
    Ended,
}

impl Replies {
    /// Creates a new inbox and subscribes to it.
    pub(super) async fn subscribe(client: &Client) -> Result<Self, BusError> {
        let prefix = format!("{}.", client.new_inbox());
        let mut inbox = client.subscribe(format!("{prefix}*")).await?;
        let waiting = Arc::new(Pending::default());
        let (answered, start) = (Arc::clone(&waiting), prefix.len());
        let reader = tokio::spawn(async move {
            while let Some(message) = inbox.next().await {
                let token = message.subject.get(start..).unwrap_or_default();
                // A reply is dropped if its caller has stopped waiting.
                if let Some(caller) = answered.remove(token) {
                    let _ = caller.send(message);
                }
            }
            error!("the connection has ended; replies are no longer received");
            answered.lock().clear();
        });
        Ok(Self {
            prefix,
            waiting,
            _reader: AbortOnDropHandle::new(reader),
        })
    }

    /// Sends a request and waits for its reply without a time limit; the caller must set one.
    pub(super) async fn request(
        &self,
        client: &Client,
        subject: Subject,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<Message, NoReply> {
        let (caller, reply) = oneshot::channel();
        // The token is random because otherwise a service could guess it and answer a request to another service.
        let entry = PendingEntry::insert(&self.waiting, random_id(), caller);
        let inbox = format!("{}{}", self.prefix, entry.token);
        client
            .publish_with_reply_and_headers(subject, inbox, headers, payload)
            .await?;
        reply.await.map_err(|_| NoReply::Ended)
    }
}

impl Pending {
    fn remove(&self, token: &str) -> Option<oneshot::Sender<Message>> {
        let removed = self.lock().remove(token);
        if removed.is_some() {
            gauge!("vmwatch_bus_replies_awaited").decrement(1.0);
        }
        removed
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<Message>>> {
        // A poisoned lock is safe to use, because no code that could panic runs while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Represents the entry of a caller in [`Pending`]; dropping this value removes the entry.
struct PendingEntry<'a> {
    waiting: &'a Pending,
    token: String,
}

impl<'a> PendingEntry<'a> {
    fn insert(waiting: &'a Pending, token: String, caller: oneshot::Sender<Message>) -> Self {
        waiting.lock().insert(token.clone(), caller);
        gauge!("vmwatch_bus_replies_awaited").increment(1.0);
        Self { waiting, token }
    }
}

impl Drop for PendingEntry<'_> {
    fn drop(&mut self) {
        self.waiting.remove(&self.token);
    }
}
