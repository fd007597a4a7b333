//! The newest live events, encoded once for all readers.
//!
//! A reader holds a position, not events. Replayed and new events come from the same log, so a thousand readers need no
//! more memory for events than one.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;
use tokio::sync::watch;
use vmwatch_api::InstanceId;

/// Maximum number of retained events; a reader that missed more must reload everything.
pub(super) const MAX_EVENTS: usize = 10_000;
/// Maximum bytes of retained encoded events; operations have long records.
const MAX_BYTES: usize = 16 << 20;
/// Maximum number of events that a reader takes and examines in one turn.
const MAX_TAKEN: usize = 64;
const MAX_EXAMINED: usize = 1024;

/// An encoded event.
#[derive(Debug)]
pub(crate) struct EncodedEvent {
    /// The event's number in the stream.
    pub(crate) number: u64,
    pub(crate) instance: InstanceId,
    /// The event as sent to clients.
    pub(crate) frame: Bytes,
}

/// The newest events of one stream.
#[derive(Debug)]
pub(crate) struct Log {
    events: RwLock<Events>,
    reached: watch::Sender<Reached>,
}

/// The newest position of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reached {
    /// The number of the newest event.
    pub(crate) number: u64,
    /// Whether the stream was replaced, so that no more events follow.
    pub(crate) over: bool,
}

#[derive(Debug)]
struct Events {
    kept: VecDeque<Arc<EncodedEvent>>,
    bytes: usize,
    /// The number from which on no event is missing.
    begin: u64,
}

/// The events that a reader takes in one turn.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) events: Vec<Arc<EncodedEvent>>,
    /// The reader's new position: it has seen all wanted events up to here.
    pub(crate) position: u64,
}

impl Log {
    /// An empty log that begins after this number.
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

    /// Adds the next event, or `None` if its number holds no event for readers.
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

    /// Discards all events, since some before this number are missing.
    pub(super) fn begin_at(&self, number: u64) {
        let mut events = self.events.write().unwrap_or_else(PoisonError::into_inner);
        events.kept.clear();
        (events.bytes, events.begin) = (0, number);
    }

    /// Ends all readers.
    pub(super) fn end(&self) {
        self.reached.send_modify(|reached| reached.over = true);
    }

    /// Watches the newest position of the log.
    pub(crate) fn reached(&self) -> watch::Receiver<Reached> {
        self.reached.subscribe()
    }

    /// Whether a reader at this position misses no events.
    pub(super) fn covers(&self, position: u64) -> bool {
        let events = self.events.read().unwrap_or_else(PoisonError::into_inner);
        position.saturating_add(1) >= events.begin
    }

    /// Takes the next events after a position that the reader wants; the numbers of taken and examined events are
    /// bounded. `None` if some were discarded already.
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
            instance: format!("vm-{}", number % 2).parse().unwrap(),
            frame: vec![b'x'; bytes].into(),
        };
        log.push(number, Some(event));
    }

    fn numbers(taken: &Taken) -> Vec<u64> {
        taken.events.iter().map(|event| event.number).collect()
    }

    #[test]
    fn takes_wanted_events_in_bounded_turns() {
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
        let odd = |event: &EncodedEvent| event.instance.as_str() == "vm-1";
        assert_eq!(numbers(&log.take(2001, odd).unwrap()), [2003]);
        assert_eq!(log.take(2004, |_| true).unwrap().position, 2004);
    }

    #[test]
    fn discards_oldest_events_by_count_and_bytes() {
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
        assert!(log.take(10_002, |_| true).is_none(), "too large to be retained");
        assert!(log.take(10_003, |_| true).unwrap().events.is_empty());
    }

    #[test]
    fn skips_numbers_without_events() {
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
