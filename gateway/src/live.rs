//! Follows the stream of live events once for the whole gateway and distributes the events to all connected clients
//! ("readers").
//!
//! One task reads the JetStream stream into a [`Log`] of the newest encoded events. Readers take events from the log at
//! their own pace, and the task never waits for a reader. At start the task loads the events that are in the stream, so
//! that clients that reconnect after a restart are served from memory. JetStream has one consumer per gateway, whatever
//! the number of readers.

mod log;

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::{consumer::DeliverPolicy, message::Message};
use bytes::Bytes;
use metrics::counter;
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::{
    events::{EVENT_STREAM, LiveEvent},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Bus, follow::StreamState};

pub(crate) use self::log::{EncodedEvent, Log, Reached};

/// Deadline of a JetStream request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(3);
/// Interval at which the stream's state is read. Without this check a broken consumer would look like a stream without
/// new events.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Pause before the next attempt to follow the stream of live events.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How long to wait for the event that a reconnecting client saw last: another gateway may have sent this event to the
/// client before this gateway received it.
const MAX_LAG: Duration = Duration::from_secs(1);

/// Encodes a live event with its number, as sent to clients; `None` if clients do not receive it.
type Encode = fn(u64, &LiveEvent) -> Option<Bytes>;

/// Distributes live events to the connected clients.
#[derive(Clone)]
pub(crate) struct Live {
    bus: Bus,
    encode: Encode,
    /// The log of the stream; `None` while the stream is not followed. Replaced by a new log when the stream was
    /// recreated.
    log: watch::Sender<Option<Arc<Log>>>,
    /// Highest event number that may have been used for two different events because JetStream lost its newest data; 0
    /// if there is none.
    ambiguous: Arc<AtomicU64>,
    /// Ends all event streams when the gateway shuts down.
    pub(crate) shutdown: CancellationToken,
}

/// The position in the log of live events at which a newly connected client starts.
pub(crate) struct Start {
    pub(crate) log: Arc<Log>,
    /// Number of the last live event that the client has seen or does not need.
    pub(crate) position: u64,
    /// Number of the newest live event; missed events up to this number are replayed to the client.
    pub(crate) newest: u64,
    /// Whether the client missed live events that cannot be replayed.
    pub(crate) gap: bool,
}

impl Live {
    /// Starts the task that follows the stream of live events until shutdown.
    pub(crate) fn follow(bus: &Bus, encode: Encode, shutdown: CancellationToken) -> Self {
        let live = Self {
            bus: bus.clone(),
            encode,
            log: watch::Sender::new(None),
            ambiguous: Arc::default(),
            shutdown,
        };
        let follower = live.clone();
        tokio::spawn(async move {
            let following = follower.follow_until_shutdown();
            follower.shutdown.run_until_cancelled(Box::pin(following)).await
        });
        live
    }

    /// Starts a reader. `seen` is the number of the last event that the client received, if any.
    pub(crate) async fn reader(&self, seen: Option<u64>) -> Result<Start, Fault> {
        let unavailable = || {
            let text = "live events are unavailable; try again shortly";
            Fault::new(FaultKind::Unavailable, text)
        };
        if !self.bus.is_connected() {
            return Err(unavailable());
        }
        let mut followed = self.log.subscribe();
        let log = tokio::time::timeout(DEADLINE, followed.wait_for(Option::is_some)).await;
        let log = log.ok().and_then(Result::ok).and_then(|log| log.clone());
        let log = log.ok_or_else(unavailable)?;
        let mut reached = log.reached();
        let position = match seen {
            None => None,
            Some(seen) if self.is_reused_number(seen) => None,
            Some(seen) => {
                // The client reconnects with the number of the last event that it received, perhaps from another
                // gateway. If this gateway has not received that event yet, it does so within milliseconds. If not, the
                // number comes from a stream that no longer exists.
                let heard = reached.wait_for(|reached| reached.number >= seen || reached.over);
                let heard = tokio::time::timeout(MAX_LAG, heard).await.is_ok();
                Some(seen).filter(|seen| heard && log.covers(*seen))
            }
        };
        let newest = reached.borrow().number;
        Ok(Start {
            log,
            position: position.unwrap_or(newest),
            newest,
            gap: seen.is_some() && position.is_none(),
        })
    }

    /// Whether this number may have been used for an event that JetStream has lost.
    fn is_reused_number(&self, number: u64) -> bool {
        let ambiguous = self.ambiguous.load(Ordering::Relaxed);
        ambiguous > 0 && number <= ambiguous
    }

    async fn follow_until_shutdown(&self) {
        let mut followed = None;
        let mut reconnections = self.bus.reconnections();
        loop {
            tokio::select! {
                // The bus reconnected: continue at once. Missed events are read from the stream, if it is still the
                // same stream.
                Ok(()) = reconnections.changed() => continue,
                Err(error) = Box::pin(self.follow_once(&mut followed)) => {
                    debug!(%error, "following live events failed; retrying");
                    // Clients that are connected keep their log of events; new clients get an error and retry.
                    self.log.send_replace(None);
                }
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// Follows the stream of live events from the last known position until an error occurs.
    async fn follow_once(&self, followed: &mut Option<Followed>) -> Result<Infallible, async_nats::Error> {
        let info = self.bus.stream_info(EVENT_STREAM, DEADLINE).await?;
        let state = StreamState::from(&info);
        if let Some(other) = Followed::take_if_replaced(followed, state) {
            self.end(&other);
        }
        let following = Followed::resume(followed, state, info.state.first_sequence);
        // Start with the last event that was received, to verify that the stream is still the same.
        let begin = DeliverPolicy::ByStartSequence {
            start_sequence: following.position.max(1),
        };
        let mut reader = self.bus.read_stream(EVENT_STREAM, "", begin, DEADLINE).await?;
        let mut checks = tokio::time::interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Readers are admitted only once all events that are now in the stream are loaded.
        let mut missing = Some(info.state.last_sequence);
        let mut behind = None;
        loop {
            if missing.is_some_and(|last| following.position >= last) {
                missing = None;
                self.log.send_replace(Some(Arc::clone(&following.log)));
            }
            tokio::select! {
                message = reader.next() => {
                    let message = message?;
                    let info = message.info()?;
                    let published = info.published.unix_timestamp_nanos();
                    if following.is_reused(info.stream_sequence, published) {
                        let other = followed.take();
                        other.inspect(|other| self.end(other));
                        return Err("the stream of live events has lost its newest events".into());
                    }
                    self.forward(following, info.stream_sequence, &message);
                }
                _ = checks.tick() => {
                    let info = self.bus.stream_info(EVENT_STREAM, DEADLINE).await?;
                    if StreamState::from(&info).is_rolled_back_from(&following.state) {
                        return Err("the stream of live events has lost its newest events".into());
                    }
                    following.pass_over(info.state.first_sequence, info.state.last_sequence);
                    let newer = info.state.last_sequence > following.position;
                    // The position did not advance between two checks, so the consumer is broken and the event is not
                    // merely late.
                    if newer && behind == Some(following.position) {
                        return Err("the consumer received none of the stream's new events".into());
                    }
                    behind = newer.then_some(following.position);
                }
            }
        }
    }

    fn forward(&self, followed: &mut Followed, number: u64, message: &Message) {
        // Skip an event that was still in transit when `pass_over` moved the position past it.
        if number <= followed.position {
            return;
        }
        followed.position = number;
        let encoded = decode(message).and_then(|event| {
            let frame = (self.encode)(number, &event)?;
            Some(EncodedEvent {
                number,
                instance: event.instance().cloned(),
                kind: event.kind(),
                frame,
            })
        });
        followed.log.push(number, encoded);
    }

    /// Ends the log of a stream that was recreated or rolled back to an older state. Its readers end; their clients
    /// reconnect and get a `gap` event.
    fn end(&self, other: &Followed) {
        counter!("vmwatch_store_rollbacks_total", "bucket" => EVENT_STREAM).increment(1);
        warn!(
            position = other.position,
            "stream of live events was recreated or lost its newest events; reading it again from the beginning"
        );
        self.ambiguous.fetch_max(other.position, Ordering::Relaxed);
        other.log.end();
    }
}

/// The gateway's position in the stream of live events.
struct Followed {
    /// Last known state of the stream of live events.
    state: StreamState,
    position: u64,
    /// Time at which the event at this position was published, in Unix nanoseconds; `None` if the event was not
    /// received.
    published: Option<i128>,
    log: Arc<Log>,
}

impl Followed {
    /// Removes and returns the position if the stream was recreated or has lost its newest events.
    fn take_if_replaced(followed: &mut Option<Self>, state: StreamState) -> Option<Self> {
        followed.take_if(|known| state.is_rolled_back_from(&known.state))
    }

    /// Continues at the last position, or starts with the newest retained events if there is no position.
    fn resume(followed: &mut Option<Self>, state: StreamState, first_sequence: u64) -> &mut Self {
        let followed = followed.get_or_insert_with(|| {
            let kept = u64::try_from(log::MAX_EVENTS).unwrap_or(u64::MAX);
            let position = state.last_sequence.saturating_sub(kept);
            Self {
                state,
                position,
                published: None,
                log: Arc::new(Log::after(position)),
            }
        });
        followed.state = state;
        followed.pass_over(first_sequence, state.last_sequence);
        followed
    }

    /// Records a received event. Returns whether a different event has used its number before.
    fn is_reused(&mut self, number: u64, published: i128) -> bool {
        if number < self.position {
            return false;
        }
        let known = self.published.replace(published);
        self.state.last_sequence = self.state.last_sequence.max(number);
        number == self.position && known.is_some_and(|known| known != published)
    }

    /// Moves the position past live events that the stream has already discarded.
    fn pass_over(&mut self, first_sequence: u64, last_sequence: u64) {
        // If the stream is empty, JetStream reports the next sequence number as the number of the first event.
        let oldest = first_sequence.min(last_sequence + 1);
        if self.position + 1 < oldest {
            self.position = oldest - 1;
            self.published = None;
            self.log.begin_at(oldest);
            self.log.push(self.position, None);
        }
    }
}

fn decode(message: &Message) -> Option<LiveEvent> {
    let read = LiveEvent::read(&message.payload)
        .inspect_err(|error| warn!(%error, subject = %message.subject, "decoding a live event failed"));
    let event = read.ok()?;
    if event.is_none() {
        // The live event has a kind that only newer versions know; skip it.
        counter!("vmwatch_events_of_newer_kinds_total").increment(1);
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(created_ns: i128, last_sequence: u64) -> StreamState {
        StreamState {
            created_ns,
            last_sequence,
            messages: 1,
            bytes: 1,
        }
    }

    #[test]
    fn live_events_resume_at_last_position() {
        let mut followed = None;
        assert_eq!(
            Followed::resume(&mut followed, state(1, 50_000), 1).position,
            40_000
        );
        let log = Arc::clone(&followed.as_ref().unwrap().log);
        followed.as_mut().unwrap().position = 50_000;
        assert!(Followed::take_if_replaced(&mut followed, state(1, 50_010)).is_none());
        let again = Followed::resume(&mut followed, state(1, 50_010), 1);
        assert!(again.position == 50_000 && Arc::ptr_eq(&again.log, &log));
        // Live events that expired while the stream was not followed leave a gap in the log.
        let later = Followed::resume(&mut followed, state(1, 60_000), 60_001);
        assert!(later.position == 60_000 && Arc::ptr_eq(&later.log, &log));
        assert!(!log.covers(50_000) && log.covers(60_000));
    }

    #[test]
    fn live_events_restart_when_stream_was_recreated_or_rolled_back() {
        for other in [state(2, 50_000), state(1, 40_000)] {
            let mut followed = None;
            Followed::resume(&mut followed, state(1, 50_000), 1).position = 50_000;
            assert!(Followed::take_if_replaced(&mut followed, other).is_some());
            let new = Followed::resume(&mut followed, other, 1);
            assert_eq!(new.position, other.last_sequence - 10_000);
        }
    }

    #[test]
    fn event_number_used_twice_is_detected() {
        let mut followed = None;
        let following = Followed::resume(&mut followed, state(1, 5), 1);
        following.position = 5;
        assert!(!following.is_reused(5, 100) && !following.is_reused(5, 100));
        assert!(!following.is_reused(4, 50));
        assert!(following.is_reused(5, 101));
    }
}
