//! Live events, followed once a gateway and handed to every reader.
//!
//! One task reads the stream; each reader takes from a ring that holds the last [`RING`] events and is not kept up with:
//! who falls behind it is cut off, so that a slow reader costs nothing and holds nobody up. What a reader missed, by
//! the number of the last event that it saw, is read from the stream for it alone.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{
    consumer::{
        DeliverPolicy,
        pull::{Ordered, OrderedConfig},
    },
    message::Message,
    stream::Stream,
};
use futures::{StreamExt, TryStreamExt};
use metrics::counter;
use shared::{
    api::events::{EVENT_STREAM, LiveEvent},
    bus::Bus,
    wire::{Fault, FaultKind},
};
use tokio::{
    sync::{
        broadcast::{self, Receiver},
        watch,
    },
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Events that a reader may be behind: a few seconds of a thousand VMs that each report every second.
const RING: usize = 4096;
/// The most events that are read again for one reader; who missed more reads everything anew.
const MOST_REPLAYED: u64 = 10_000;
/// JetStream answers in milliseconds or not at all.
const DEADLINE: Duration = Duration::from_secs(3);
/// A consumer that broke looks like a stream in which nothing happens: this often it is asked whether something has.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Before a stream that is not there is looked for again.
const AGAIN: Duration = Duration::from_secs(1);

/// An event, with its number in the stream.
#[derive(Debug)]
pub(crate) struct Numbered {
    pub(crate) number: u64,
    pub(crate) event: LiveEvent,
}

type Ring = broadcast::Sender<Arc<Numbered>>;

/// What readers take from.
#[derive(Clone)]
pub(crate) struct Live {
    bus: Bus,
    /// Absent until the stream is followed, and another once the stream is another.
    ring: watch::Sender<Option<Ring>>,
    /// Readers end with the gateway.
    pub(crate) shutdown: CancellationToken,
}

/// Where a reader begins.
pub(crate) struct Start {
    /// What it missed, oldest first.
    pub(crate) missed: Vec<Arc<Numbered>>,
    /// Whether more was missed than can be read again.
    pub(crate) gap: bool,
    /// The number of the newest event of before.
    pub(crate) position: u64,
    /// What comes from then on, and a little of before.
    pub(crate) coming: Receiver<Arc<Numbered>>,
}

impl Live {
    /// Starts to follow the stream, until shutdown.
    pub(crate) fn follow(bus: &Bus, shutdown: CancellationToken) -> Self {
        let live = Self {
            bus: bus.clone(),
            ring: watch::Sender::new(None),
            shutdown,
        };
        let follower = live.clone();
        tokio::spawn(async move {
            let following = follower.follow_for_ever();
            follower.shutdown.run_until_cancelled(Box::pin(following)).await
        });
        live
    }

    /// A reader that saw everything up to and with this event, or nothing at all.
    pub(crate) async fn reader(&self, seen: Option<u64>) -> Result<Start, Fault> {
        let unavailable = |cause: async_nats::Error| {
            let text = "live events cannot be followed at the moment; try again shortly";
            Fault::new(FaultKind::Unavailable, text).caused_by(Cause(cause))
        };
        if !self.bus.is_connected() {
            return Err(unavailable("the bus is away".into()));
        }
        // Before the position is read, so that nothing lies between the two.
        let coming = self.coming().await.map_err(unavailable)?;
        let stream = self.stream().await.map_err(unavailable)?;
        let state = &stream.cached_info().state;
        let (first, last) = (state.first_sequence, state.last_sequence);
        let mut start = Start {
            missed: Vec::new(),
            gap: false,
            position: last,
            coming,
        };
        match seen {
            // A number from another stream: it was made anew.
            Some(seen) if seen > last => start.gap = true,
            Some(seen) if seen + 1 < first || last - seen > MOST_REPLAYED => start.gap = true,
            Some(seen) if seen < last => {
                start.missed = replay(&stream, seen + 1, last).await.map_err(unavailable)?;
            }
            _ => {}
        }
        Ok(start)
    }

    async fn coming(&self) -> Result<Receiver<Arc<Numbered>>, async_nats::Error> {
        let mut ring = self.ring.subscribe();
        let followed = tokio::time::timeout(DEADLINE, ring.wait_for(Option::is_some)).await??;
        followed
            .as_ref()
            .map(Ring::subscribe)
            .ok_or_else(|| "the stream is not followed".into())
    }

    async fn stream(&self) -> Result<Stream, async_nats::Error> {
        let found = tokio::time::timeout(DEADLINE, self.bus.jetstream().get_stream(EVENT_STREAM));
        Ok(found.await??)
    }

    async fn follow_for_ever(&self) {
        let mut followed = None;
        loop {
            if let Err(error) = self.follow_once(&mut followed).await {
                debug!(%error, "the stream of live events is not followed");
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Follows the stream from where it was left until that breaks.
    async fn follow_once(&self, followed: &mut Option<Followed>) -> Result<(), async_nats::Error> {
        let stream = self.stream().await?;
        let info = stream.cached_info();
        let created = info.created.unix_timestamp_nanos();
        let position = match followed {
            Some(followed) if followed.created == created => followed.position,
            // The first look, or a stream that was made anew and counts from its beginning: readers of the old one
            // end, come again, and are told that there is a gap.
            _ => {
                self.ring.send_replace(Some(Ring::new(RING)));
                info.state.last_sequence
            }
        };
        let followed = followed.insert(Followed { created, position });
        let mut messages = tokio::time::timeout(DEADLINE, messages(&stream, position + 1)).await??;
        let mut checks = tokio::time::interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut behind = None;
        loop {
            tokio::select! {
                message = messages.next() => {
                    let message = message.ok_or("the consumer ended")??;
                    followed.position = message.info()?.stream_sequence;
                    self.hand_on(followed.position, &message);
                }
                _ = checks.tick() => {
                    let info = tokio::time::timeout(DEADLINE, stream.get_info()).await??;
                    let newer = info.state.last_sequence > followed.position;
                    // Behind twice in a row at the same place: it is not just late.
                    if newer && behind == Some(followed.position) {
                        return Err("the stream moved on without its consumer".into());
                    }
                    behind = newer.then_some(followed.position);
                }
            }
        }
    }

    fn hand_on(&self, number: u64, message: &Message) {
        if let (Some(event), Some(ring)) = (decode(message), &*self.ring.borrow()) {
            // Fails only where nobody listens.
            let _ = ring.send(Arc::new(Numbered { number, event }));
        }
    }
}

/// How far the stream was followed.
struct Followed {
    /// When the stream was made, Unix nanoseconds.
    created: i128,
    position: u64,
}

async fn messages(stream: &Stream, begin: u64) -> Result<Ordered, async_nats::Error> {
    let config = OrderedConfig {
        deliver_policy: DeliverPolicy::ByStartSequence {
            start_sequence: begin,
        },
        ..OrderedConfig::default()
    };
    Ok(stream.create_consumer(config).await?.messages().await?)
}

/// What lies from the one number to the other.
async fn replay(stream: &Stream, begin: u64, end: u64) -> Result<Vec<Arc<Numbered>>, async_nats::Error> {
    let mut messages = tokio::time::timeout(DEADLINE, messages(stream, begin)).await??;
    let mut missed = Vec::new();
    while let Some(message) = tokio::time::timeout(DEADLINE, messages.try_next()).await?? {
        let number = message.info()?.stream_sequence;
        if number <= end {
            missed.extend(decode(&message).map(|event| Arc::new(Numbered { number, event })));
        }
        if number >= end {
            break;
        }
    }
    counter!("vmwatch_events_replayed_total").increment(missed.len() as u64);
    Ok(missed)
}

fn decode(message: &Message) -> Option<LiveEvent> {
    serde_json::from_slice(&message.payload)
        .inspect_err(|error| warn!(%error, subject = %message.subject, "a live event cannot be read"))
        .ok()
}

/// A boxed error as an error.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Cause(async_nats::Error);
