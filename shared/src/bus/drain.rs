//! Leaving a queue group without losing a request.
//!
//! `unsubscribe` drops what the server had already sent; the client's own `drain` forgets the subscription before
//! the server has confirmed. Asking the server to end the subscription after a bounded number *more* loses nothing:
//! client and server agree on the last message. Under load that number comes within a quarter of a second; without
//! load nothing comes for half a second, and then leaving at once is safe but for a message within that very round trip.

use std::time::{Duration, Instant};

use async_nats::{Message, Subscriber};
use futures::StreamExt;
use tracing::warn;

/// More than can be on the way between server and client at any rate we serve.
const LEAST_MORE: u64 = 16;
const MOST_MORE: u64 = 4096;
/// Nothing for this long counts as no load.
const IDLE: Duration = Duration::from_millis(500);

/// A subscription that counts what it gave, and how fast of late.
pub(super) struct Counted {
    subscriber: Subscriber,
    received: u64,
    window_start: Instant,
    window_received: u64,
    last_rate: u64,
}

impl Counted {
    pub(super) fn new(subscriber: Subscriber) -> Self {
        Self {
            subscriber,
            received: 0,
            window_start: Instant::now(),
            window_received: 0,
            last_rate: 0,
        }
    }

    /// The next message; `None` once the subscription has ended.
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

    /// Ends the subscription, handing on every message that still comes, within the limit.
    pub(super) async fn drain(mut self, limit: Duration, mut take: impl FnMut(Message)) {
        let end = Instant::now() + limit;
        let per_second = self.last_rate.max(self.window_received);
        let more = (per_second / 4).clamp(LEAST_MORE, MOST_MORE);
        if let Err(error) = self.subscriber.unsubscribe_after(self.received + more).await {
            warn!(%error, "the bus is away: nothing to unsubscribe from");
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
