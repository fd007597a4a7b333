//! Live events, followed once for the whole gateway and handed to every reader.
//!
//! One task reads the stream into a [`Log`] of the newest events, encoded; readers take from the log at their own pace,
//! and are not waited for. It is filled at the start with what the stream holds, so that clients that come again after a
//! restart are served from memory: JetStream is read by one consumer, however many readers there are.

mod log;

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{
    consumer::{
        DeliverPolicy,
        pull::{Ordered, OrderedConfig},
    },
    message::Message,
    stream::{State, Stream},
};
use bytes::Bytes;
use futures::StreamExt;
use shared::{
    api::events::{EVENT_STREAM, LiveEvent},
    bus::Bus,
    wire::{Fault, FaultKind},
};
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

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

    async fn follow_for_ever(&self) {
        let mut followed = None;
        loop {
            if let Err(error) = self.follow_once(&mut followed).await {
                debug!(%error, "the stream of live events is not followed");
                // Readers keep what they have; new ones are told to come again.
                self.log.send_replace(None);
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Follows the stream from where it was left until that breaks.
    async fn follow_once(&self, followed: &mut Option<Followed>) -> Result<(), async_nats::Error> {
        let found = tokio::time::timeout(DEADLINE, self.bus.jetstream().get_stream(EVENT_STREAM));
        let stream = found.await??;
        let info = stream.cached_info();
        let followed = Followed::resume(followed, info.created.unix_timestamp_nanos(), &info.state);
        let mut messages = tokio::time::timeout(DEADLINE, messages(&stream, followed.position + 1)).await??;
        let mut checks = tokio::time::interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // What the stream holds now is read before readers are let in.
        let mut missing = Some(info.state.last_sequence);
        let mut behind = None;
        loop {
            if missing.is_some_and(|last| followed.position >= last) {
                missing = None;
                self.log.send_replace(Some(Arc::clone(&followed.log)));
            }
            tokio::select! {
                message = messages.next() => {
                    let message = message.ok_or("the consumer ended")??;
                    self.hand_on(followed, message.info()?.stream_sequence, &message);
                }
                _ = checks.tick() => {
                    let info = tokio::time::timeout(DEADLINE, stream.get_info()).await??;
                    if info.state.last_sequence < followed.position {
                        return Err("the stream went back".into());
                    }
                    followed.pass_over(&info.state);
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
}

/// How far the stream was followed.
struct Followed {
    /// When the stream was made, Unix nanoseconds.
    created: i128,
    position: u64,
    log: Arc<Log>,
}

impl Followed {
    /// Goes on where it was left; from the beginning on the first look, and where the stream was made anew or an older
    /// copy of it was put back. Readers of the old one end, come again, and are told that there is a gap.
    fn resume<'a>(followed: &'a mut Option<Self>, created: i128, state: &State) -> &'a mut Self {
        let is_same = |known: &Self| known.created == created && known.position <= state.last_sequence;
        if let Some(other) = followed.take_if(|known| !is_same(known)) {
            info!(
                position = other.position,
                last = state.last_sequence,
                "the stream of live events is another or went back; following it from its beginning"
            );
            other.log.end();
        }
        let followed = followed.get_or_insert_with(|| {
            let kept = u64::try_from(log::MOST_EVENTS).unwrap_or(u64::MAX);
            let position = state.last_sequence.saturating_sub(kept);
            Self {
                created,
                position,
                log: Arc::new(Log::after(position)),
            }
        });
        followed.pass_over(state);
        followed
    }

    /// Passes over what the stream no longer holds.
    fn pass_over(&mut self, state: &State) {
        // An empty stream says that its first message is the next one.
        let oldest = state.first_sequence.min(state.last_sequence + 1);
        if self.position + 1 < oldest {
            self.position = oldest - 1;
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
    serde_json::from_slice(&message.payload)
        .inspect_err(|error| warn!(%error, subject = %message.subject, "a live event cannot be read"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(first_sequence: u64, last_sequence: u64) -> State {
        let state = serde_json::json!({
            "messages": 1, "bytes": 1, "first_seq": first_sequence, "last_seq": last_sequence,
            "first_ts": "2026-01-01T00:00:00Z", "last_ts": "2026-01-01T00:00:00Z", "consumer_count": 0,
        });
        serde_json::from_value(state).unwrap()
    }

    #[test]
    fn follows_from_what_is_kept_and_goes_on_where_it_was_left() {
        let mut followed = None;
        assert_eq!(
            Followed::resume(&mut followed, 1, &state(1, 50_000)).position,
            40_000
        );
        let log = Arc::clone(&followed.as_ref().unwrap().log);
        followed.as_mut().unwrap().position = 50_000;
        let again = Followed::resume(&mut followed, 1, &state(1, 50_010));
        assert!(again.position == 50_000 && Arc::ptr_eq(&again.log, &log));
        // What expired while nobody followed is a gap for readers.
        let later = Followed::resume(&mut followed, 1, &state(60_001, 60_000));
        assert!(later.position == 60_000 && Arc::ptr_eq(&later.log, &log));
        assert!(!log.reaches_back_to(50_000) && log.reaches_back_to(60_000));
    }

    #[test]
    fn begins_anew_when_the_stream_is_another_or_went_back() {
        for (created, last) in [(2, 50_000), (1, 40_000)] {
            let mut followed = None;
            let old = Followed::resume(&mut followed, 1, &state(1, 50_000));
            old.position = 50_000;
            let old = Arc::clone(&old.log);
            let new = Followed::resume(&mut followed, created, &state(1, last));
            assert_eq!(new.position, last - 10_000);
            assert!(old.reached().borrow().over, "readers of the old one end");
        }
    }
}
