//! Live events, followed once for the whole gateway and handed to every reader.
//!
//! One task reads the stream into a [`Log`] of the newest events, encoded; readers take from the log at their own pace,
//! and are not waited for. It is filled at the start with what the stream holds, so that clients that come again after a
//! restart are served from memory: JetStream is read by one consumer, however many readers there are.

mod log;

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::{
    consumer::{
        DeliverPolicy,
        pull::{Ordered, OrderedConfig},
    },
    message::Message,
    stream::Stream,
};
use bytes::Bytes;
use futures::StreamExt;
use metrics::counter;
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::{
    events::{EVENT_STREAM, LiveEvent},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Bus, follow::StreamState};

pub(crate) use self::log::{Log, Reached, Told};

/// JetStream answers in milliseconds or not at all.
const DEADLINE: Duration = Duration::from_secs(3);
/// A consumer that broke looks like a stream in which nothing happens: this often it is asked whether something has.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Before a stream that is not there is looked for again.
const AGAIN: Duration = Duration::from_secs(1);
/// How far this gateway may be behind another, of which a reader has its last event.
const BEHIND_AT_MOST: Duration = Duration::from_secs(1);

/// Writes an event as readers get it.
type Encode = fn(u64, &LiveEvent) -> Bytes;

/// What readers take from.
#[derive(Clone)]
pub(crate) struct Live {
    bus: Bus,
    encode: Encode,
    /// Absent while the stream is not followed, and another once the stream is another.
    log: watch::Sender<Option<Arc<Log>>>,
    /// Numbers up to this one were given to other events before the store was rolled back; 0 for none.
    ambiguous: Arc<AtomicU64>,
    /// Readers end with the gateway.
    pub(crate) shutdown: CancellationToken,
}

/// Where a reader begins.
pub(crate) struct Start {
    pub(crate) log: Arc<Log>,
    /// The number of the last event that it has seen, or need not see.
    pub(crate) position: u64,
    /// The number of the newest event: up to here it is told what it missed.
    pub(crate) newest: u64,
    /// Whether more was missed than can be told again.
    pub(crate) gap: bool,
}

impl Live {
    /// Starts to follow the stream, until shutdown.
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
            let following = follower.follow_for_ever();
            follower.shutdown.run_until_cancelled(Box::pin(following)).await
        });
        live
    }

    /// A reader that saw everything up to and with this event, or nothing at all.
    pub(crate) async fn reader(&self, seen: Option<u64>) -> Result<Start, Fault> {
        let unavailable = || {
            let text = "live events cannot be followed at the moment; try again shortly";
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
            Some(seen) if self.is_ambiguous(seen) => None,
            Some(seen) => {
                // What another gateway has told this one hears within milliseconds; after that, the number is of
                // another stream.
                let heard = reached.wait_for(|reached| reached.number >= seen || reached.over);
                let heard = tokio::time::timeout(BEHIND_AT_MOST, heard).await.is_ok();
                Some(seen).filter(|seen| heard && log.reaches_back_to(*seen))
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

    /// Whether the number may be that of an event that the store has lost.
    fn is_ambiguous(&self, number: u64) -> bool {
        let ambiguous = self.ambiguous.load(Ordering::Relaxed);
        ambiguous > 0 && number <= ambiguous
    }

    async fn follow_for_ever(&self) {
        let mut followed = None;
        let mut reconnections = self.bus.reconnections();
        loop {
            tokio::select! {
                // What was missed meanwhile is read from the stream, if it is still the same.
                Ok(()) = reconnections.changed() => continue,
                Err(error) = Box::pin(self.follow_once(&mut followed)) => {
                    debug!(%error, "the stream of live events is not followed");
                    // Readers keep what they have; new ones are told to come again.
                    self.log.send_replace(None);
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Follows the stream from where it was left until that breaks.
    async fn follow_once(&self, followed: &mut Option<Followed>) -> Result<Infallible, async_nats::Error> {
        let found = tokio::time::timeout(DEADLINE, self.bus.jetstream().get_stream(EVENT_STREAM));
        let stream = found.await??;
        let info = stream.cached_info();
        if let Some(other) = Followed::take_if_other(followed, info.into()) {
            self.end(&other);
        }
        let following = Followed::resume(followed, info.into(), info.state.first_sequence);
        // From the last event that was handed on: it proves that the stream is the same.
        let begin = following.position.max(1);
        let mut messages = tokio::time::timeout(DEADLINE, messages(&stream, begin)).await??;
        let mut checks = tokio::time::interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // What the stream holds now is read before readers are let in.
        let mut missing = Some(info.state.last_sequence);
        let mut behind = None;
        loop {
            if missing.is_some_and(|last| following.position >= last) {
                missing = None;
                self.log.send_replace(Some(Arc::clone(&following.log)));
            }
            tokio::select! {
                message = messages.next() => {
                    let message = message.ok_or("the consumer ended")??;
                    let info = message.info()?;
                    let published = info.published.unix_timestamp_nanos();
                    if following.is_another(info.stream_sequence, published) {
                        let other = followed.take();
                        other.inspect(|other| self.end(other));
                        return Err("the stream was rolled back".into());
                    }
                    self.hand_on(following, info.stream_sequence, &message);
                }
                _ = checks.tick() => {
                    let info = tokio::time::timeout(DEADLINE, stream.get_info()).await??;
                    if StreamState::from(&info).is_rolled_back_from(&following.state) {
                        return Err("the stream was rolled back".into());
                    }
                    following.pass_over(info.state.first_sequence, info.state.last_sequence);
                    let newer = info.state.last_sequence > following.position;
                    // Behind twice in a row at the same place: it is not just late.
                    if newer && behind == Some(following.position) {
                        return Err("the stream moved on without its consumer".into());
                    }
                    behind = newer.then_some(following.position);
                }
            }
        }
    }

    fn hand_on(&self, followed: &mut Followed, number: u64, message: &Message) {
        // It may have been passed over while it was on its way.
        if number <= followed.position {
            return;
        }
        followed.position = number;
        let told = decode(message).map(|event| Told {
            number,
            instance: event.instance().clone(),
            frame: (self.encode)(number, &event),
        });
        followed.log.push(number, told);
    }

    /// Ends the log of a stream that was created again or rolled back. Its readers end, connect again, and are told that
    /// there is a gap.
    fn end(&self, other: &Followed) {
        counter!("vmwatch_store_rollbacks_total", "bucket" => EVENT_STREAM).increment(1);
        warn!(
            position = other.position,
            "the stream of live events was rolled back; following it from its beginning"
        );
        self.ambiguous.fetch_max(other.position, Ordering::Relaxed);
        other.log.end();
    }
}

/// How far the stream was followed.
struct Followed {
    /// The stream as it was last seen.
    state: StreamState,
    position: u64,
    /// When the event at the position was published, Unix nanoseconds, if it was received.
    published: Option<i128>,
    log: Arc<Log>,
}

impl Followed {
    /// Takes out what was followed before, if the stream was created again or rolled back since.
    fn take_if_other(followed: &mut Option<Self>, state: StreamState) -> Option<Self> {
        followed.take_if(|known| state.is_rolled_back_from(&known.state))
    }

    /// Goes on where it was left, or begins with the newest events that are kept.
    fn resume(followed: &mut Option<Self>, state: StreamState, first_sequence: u64) -> &mut Self {
        let followed = followed.get_or_insert_with(|| {
            let kept = u64::try_from(log::MOST_EVENTS).unwrap_or(u64::MAX);
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

    /// Notes that a message was received; whether another one was received under its number before.
    fn is_another(&mut self, number: u64, published: i128) -> bool {
        if number < self.position {
            return false;
        }
        let known = self.published.replace(published);
        self.state.last_sequence = self.state.last_sequence.max(number);
        number == self.position && known.is_some_and(|known| known != published)
    }

    /// Passes over what the stream no longer holds.
    fn pass_over(&mut self, first_sequence: u64, last_sequence: u64) {
        // An empty stream says that its first message is the next one.
        let oldest = first_sequence.min(last_sequence + 1);
        if self.position + 1 < oldest {
            self.position = oldest - 1;
            self.published = None;
            self.log.begin_at(oldest);
            self.log.push(self.position, None);
        }
    }
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

fn decode(message: &Message) -> Option<LiveEvent> {
    let read = LiveEvent::read(&message.payload)
        .inspect_err(|error| warn!(%error, subject = %message.subject, "a live event cannot be read"));
    let event = read.ok()?;
    if event.is_none() {
        // From a newer version: its readers come through newer gateways.
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
    fn follows_from_what_is_kept_and_goes_on_where_it_was_left() {
        let mut followed = None;
        assert_eq!(
            Followed::resume(&mut followed, state(1, 50_000), 1).position,
            40_000
        );
        let log = Arc::clone(&followed.as_ref().unwrap().log);
        followed.as_mut().unwrap().position = 50_000;
        assert!(Followed::take_if_other(&mut followed, state(1, 50_010)).is_none());
        let again = Followed::resume(&mut followed, state(1, 50_010), 1);
        assert!(again.position == 50_000 && Arc::ptr_eq(&again.log, &log));
        // What expired while nobody followed is a gap for readers.
        let later = Followed::resume(&mut followed, state(1, 60_000), 60_001);
        assert!(later.position == 60_000 && Arc::ptr_eq(&later.log, &log));
        assert!(!log.reaches_back_to(50_000) && log.reaches_back_to(60_000));
    }

    #[test]
    fn begins_again_when_the_stream_is_another_or_was_rolled_back() {
        for other in [state(2, 50_000), state(1, 40_000)] {
            let mut followed = None;
            Followed::resume(&mut followed, state(1, 50_000), 1).position = 50_000;
            assert!(Followed::take_if_other(&mut followed, other).is_some());
            let new = Followed::resume(&mut followed, other, 1);
            assert_eq!(new.position, other.last_sequence - 10_000);
        }
    }

    #[test]
    fn detects_another_event_under_the_same_number() {
        let mut followed = None;
        let following = Followed::resume(&mut followed, state(1, 5), 1);
        following.position = 5;
        assert!(!following.is_another(5, 100) && !following.is_another(5, 100));
        assert!(!following.is_another(4, 50));
        assert!(following.is_another(5, 101));
    }
}
