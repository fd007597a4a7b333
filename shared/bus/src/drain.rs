//! Lets a service replica leave a NATS queue group without losing requests.
//!
//! `unsubscribe` drops messages that the server has already sent, and the client's own `drain` removes the subscription
//! before the server has confirmed. A request to end the subscription after a number of *further* messages loses
//! nothing, because client and server agree on the last message. Under load that number arrives within a quarter of a
//! second. If no message arrives for half a second, the client unsubscribes at once; only a message that the server
//! sends before it processes the request can then be lost.
//!
//! The NATS client (async-nats 0.51) counts a subscription's messages across reconnections and sends that total in
//! `UNSUB`, but the server counts only those of the current connection. Each loss of the connection therefore ends the
//! subscription, and a new one, whose count starts at zero on both sides, takes effect with the next connection. The
//! old subscription must end before that connection is made. Otherwise the client would renew it, and requests that
//! the server then sends to it could be lost.

use std::time::{Duration, Instant};

use async_nats::{Message, Subject, SubscribeError, Subscriber};
use futures::{FutureExt, StreamExt};
use tokio::task::unconstrained;
use tracing::warn;

use super::Bus;

/// Minimum number of further messages to wait for. It exceeds the number of messages in flight at the expected rates.
const LEAST_MORE: u64 = 16;
const MOST_MORE: u64 = 4096;
/// If no message arrives for this long, the subscription counts as idle.
const IDLE: Duration = Duration::from_millis(500);

/// A queue group subscription that counts its messages and measures their rate.
pub(super) struct Counted {
    bus: Bus,
    subject: Subject,
    queue: String,
    subscriber: Subscriber,
    received: u64,
    window_start: Instant,
    window_received: u64,
    last_rate: u64,
}

impl Counted {
    pub(super) async fn subscribe(
        bus: &Bus,
        subject: Subject,
        queue: String,
    ) -> Result<Self, SubscribeError> {
        let subscriber = bus
            .client()
            .queue_subscribe(subject.clone(), queue.clone())
            .await?;
        Ok(Self {
            bus: bus.clone(),
            subject,
            queue,
            subscriber,
            received: 0,
            window_start: Instant::now(),
            window_received: 0,
            last_rate: 0,
        })
    }

    /// Returns the next message; `None` after the subscription has ended.
    pub(super) async fn next(&mut self) -> Option<Message> {
        let message = self.subscriber.next().await?;
        self.received += 1;
        self.window_received += 1;
        if self.window_start.elapsed() >= Duration::from_secs(1) {
            self.last_rate = self.window_received;
            self.window_received = 0;
            self.window_start = Instant::now();
        }
        Some(message)
    }

    /// Ends the subscription and subscribes again. Messages that the lost connection had delivered are passed to
    /// `take`.
    pub(super) async fn renewed(mut self, mut take: impl FnMut(Message)) -> Result<Self, SubscribeError> {
        // Without `unconstrained`, Tokio's cooperative scheduling would report after some messages that none is
        // available, and the loop would end before the last message.
        while let Some(Some(message)) = unconstrained(self.subscriber.next()).now_or_never() {
            take(message);
        }
        drop(self.subscriber);
        Self::subscribe(&self.bus, self.subject, self.queue).await
    }

    /// Ends the subscription. Messages that still arrive before the time limit are passed to `take`.
    pub(super) async fn drain(mut self, limit: Duration, mut take: impl FnMut(Message)) {
        let end = Instant::now() + limit;
        let per_second = self.last_rate.max(self.window_received);
        let more = (per_second / 4).clamp(LEAST_MORE, MOST_MORE);
        if let Err(error) = self.subscriber.unsubscribe_after(self.received + more).await {
            warn!(%error, "unsubscribing failed because the connection to NATS has ended");
            return;
        }
        let mut leaving = false;
        while Instant::now() < end {
            match tokio::time::timeout(IDLE, self.subscriber.next()).await {
                Ok(Some(message)) => take(message),
                Ok(None) => return,
                Err(_) if leaving => return,
                Err(_) => {
                    leaving = true;
                    if self.subscriber.drain().await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}
