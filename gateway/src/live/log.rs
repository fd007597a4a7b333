//! In-memory log of the newest live events, each encoded once for all readers.
//!
//! A reader holds only its position in the log. Replayed and new events come from the same log, so a thousand readers
//! need no more memory for events than one reader does.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;
use tokio::sync::watch;
use vmwatch_api::InstanceId;

/// Maximum number of events in the log. A client that missed more than this must reload its data.
pub(super) const MAX_EVENTS: usize = 10_000;
/// Maximum total size of the encoded events in the log. Events about operations are large.
const MAX_BYTES: usize = 16 << 20;
/// Maximum numbers of events that a reader takes and examines in one turn. A reader also examines events that it does
/// not want and so does not take.
const MAX_TAKEN: usize = 64;
const MAX_EXAMINED: usize = 1024;

/// A live event, encoded as sent to clients.
#[derive(Debug)]
pub(crate) struct EncodedEvent {
    /// Sequence number of the live event in its JetStream stream.
    pub(crate) number: u64,
    /// The VM that the event is about; `None` if it is about vmwatch itself.
    pub(crate) instance: Option<InstanceId>,
    /// The event's kind, as returned by [`vmwatch_api::events::LiveEvent::kind`].
    pub(crate) kind: &'static str,
    /// The encoded live event.
    pub(crate) frame: Bytes,
}

/// The newest events of one stream of live events.
#[derive(Debug)]
pub(crate) struct Log {
    events: RwLock<Events>,
    reached: watch::Sender<Reached>,
}

/// How far the log of live events has been filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reached {
    /// Number of the newest event in the log.
    pub(crate) number: u64,
    /// Whether the stream was replaced, so that no more events will be added to this log.
    pub(crate) over: bool,
}

#[derive(Debug)]
struct Events {
    kept: VecDeque<Arc<EncodedEvent>>,
    bytes: usize,
    /// The log contains all live events from this number on.
    begin: u64,
}

/// Live events that a connected client ("reader") takes from the log in one turn.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) events: Vec<Arc<EncodedEvent>>,
    /// The reader's position after this turn: it has examined all events up to this number.
    pub(crate) position: u64,
}

impl Log {
    /// Creates an empty log; its first event will have a number greater than this one.
    pub(super) fn after(number: u64) -> Self {
        Self {
            events: RwLock::new(Events {
                kept: VecDeque::new(),
                bytes: 0,
                begin: number + 1,
            }),
            reached: watch::Sender::new(Reached { number, over: false }),
        }
    }

    /// Adds the next live event. `None` records that this sequence number has no event for clients.
    pub(super) fn push(&self, number: u64, event: Option<EncodedEvent>) {
        let mut events = self.events.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(event) = event {
            events.bytes += event.frame.len();
            events.kept.push_back(Arc::new(event));
        }
        while events.kept.len() > MAX_EVENTS || events.bytes > MAX_BYTES {
            let Some(oldest) = events.kept.pop_front() else {
                break;
            };
            events.bytes -= oldest.frame.len();
            events.begin = oldest.number + 1;
        }
        drop(events);
        self.reached.send_replace(Reached { number, over: false });
    }

    /// Discards all events and continues at this number, because some events before it are missing.
    pub(super) fn begin_at(&self, number: u64) {
        let mut events = self.events.write().unwrap_or_else(PoisonError::into_inner);
        events.kept.clear();
        (events.bytes, events.begin) = (0, number);
    }

    /// Ends the event streams of all clients that read this log.
    pub(super) fn end(&self) {
        self.reached.send_modify(|reached| reached.over = true);
    }

    /// Notifies the receiver whenever live events are added to the log.
    pub(crate) fn reached(&self) -> watch::Receiver<Reached> {
        self.reached.subscribe()
    }

    /// Whether a reader at this position can continue without missing events.
    pub(super) fn covers(&self, position: u64) -> bool {
        let events = self.events.read().unwrap_or_else(PoisonError::into_inner);
        position.saturating_add(1) >= events.begin
    }

    /// Takes the next events that the reader wants after this position; the numbers of events taken and examined are
    /// bounded. Returns `None` if some events after the position were discarded already.
    pub(crate) fn take(&self, position: u64, wants: impl Fn(&EncodedEvent) -> bool) -> Option<Taken> {
        let events = self.events.read().unwrap_or_else(PoisonError::into_inner);
        if position.saturating_add(1) < events.begin {
            return None;
        }
        let first = events.kept.partition_point(|event| event.number <= position);
        let mut taken = Taken {
            events: Vec::new(),
            position,
        };
        for event in events.kept.iter().skip(first).take(MAX_EXAMINED) {
            if taken.events.len() == MAX_TAKEN {
                break;
            }
            taken.position = event.number;
            if wants(event) {
                taken.events.push(Arc::clone(event));
            }
        }
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(log: &Log, number: u64, bytes: usize) {
        let event = EncodedEvent {
            number,
            instance: format!("vm-{}", number % 2).parse().ok(),
            kind: "sample",
            frame: vec![b'x'; bytes].into(),
        };
        log.push(number, Some(event));
    }

    fn numbers(taken: &Taken) -> Vec<u64> {
        taken.events.iter().map(|event| event.number).collect()
    }

    #[test]
    fn reader_takes_wanted_events_in_bounded_turns() {
        let log = Log::after(4);
        for number in 5..2005 {
            push(&log, number, 10);
        }
        let all = log.take(4, |_| true).unwrap();
        assert_eq!((all.events.len(), all.position), (64, 68));
        let next = log.take(all.position, |_| true).unwrap();
        assert_eq!(numbers(&next)[0], 69);
        let none = log.take(4, |_| false).unwrap();
        assert_eq!((none.events.len(), none.position), (0, 1028));
        let odd = |event: &EncodedEvent| event.instance == "vm-1".parse().ok();
        assert_eq!(numbers(&log.take(2001, odd).unwrap()), [2003]);
        assert_eq!(log.take(2004, |_| true).unwrap().position, 2004);
    }

    #[test]
    fn event_log_discards_oldest_events_by_count_and_size() {
        let log = Log::after(0);
        for number in 1..=10_001 {
            push(&log, number, 10);
        }
        assert!(log.take(0, |_| true).is_none());
        assert!(!log.covers(0) && log.covers(1));
        assert_eq!(numbers(&log.take(1, |_| true).unwrap())[0], 2);
        push(&log, 10_002, MAX_BYTES - 5);
        assert!(log.take(10_000, |_| true).is_none());
        assert_eq!(numbers(&log.take(10_001, |_| true).unwrap()), [10_002]);
        push(&log, 10_003, MAX_BYTES + 1);
        assert!(
            log.take(10_002, |_| true).is_none(),
            "the event is too large for the log and must have been discarded"
        );
        assert!(log.take(10_003, |_| true).unwrap().events.is_empty());
    }

    #[test]
    fn reader_skips_event_numbers_without_events() {
        let log = Log::after(0);
        push(&log, 1, 10);
        log.push(2, None);
        let reached = log.reached();
        assert_eq!(reached.borrow().number, 2);
        log.begin_at(8);
        assert!(!log.covers(6) && log.covers(7));
        push(&log, 9, 10);
        assert_eq!(numbers(&log.take(7, |_| true).unwrap()), [9]);
        log.end();
        assert!(reached.borrow().over);
    }
}
