//! The newest live events, encoded once and shared by all readers.
//!
//! A reader holds a position, not events: what it missed and what happens now come from the same log, and a thousand
//! readers cost no more memory than one.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;
use tokio::sync::watch;
use vmwatch_api::InstanceId;

/// Events that are kept: a reader that missed more reads everything anew.
pub(super) const MOST_EVENTS: usize = 10_000;
/// Bytes of encoded events that are kept; the commands of a busy hour have long records.
const MOST_BYTES: usize = 16 << 20;
/// Events that a reader takes in one turn, and those that it looks at for it.
const MOST_TAKEN: usize = 64;
const MOST_SCANNED: usize = 1024;

/// An event as readers get it.
#[derive(Debug)]
pub(crate) struct Told {
    /// The event's number in the stream.
    pub(crate) number: u64,
    pub(crate) instance: InstanceId,
    /// The event as it goes over the wire.
    pub(crate) frame: Bytes,
}

/// The newest events of one stream.
#[derive(Debug)]
pub(crate) struct Log {
    events: RwLock<Events>,
    reached: watch::Sender<Reached>,
}

/// How far a log has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reached {
    /// The number of the newest event.
    pub(crate) number: u64,
    /// The stream is another: nothing more comes.
    pub(crate) over: bool,
}

#[derive(Debug)]
struct Events {
    kept: VecDeque<Arc<Told>>,
    bytes: usize,
    /// The oldest number from which on nothing is missing.
    begin: u64,
}

/// What a reader takes in one turn.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) events: Vec<Arc<Told>>,
    /// Up to here the reader has seen what it wants.
    pub(crate) position: u64,
}

impl Log {
    /// An empty log of what comes after this number.
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

    /// Adds the next event; without one, notes that its number holds nothing for readers.
    pub(super) fn push(&self, number: u64, told: Option<Told>) {
        let mut events = self.events.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(told) = told {
            events.bytes += told.frame.len();
            events.kept.push_back(Arc::new(told));
        }
        while events.kept.len() > MOST_EVENTS || events.bytes > MOST_BYTES {
            let Some(oldest) = events.kept.pop_front() else {
                break;
            };
            events.bytes -= oldest.frame.len();
            events.begin = oldest.number + 1;
        }
        drop(events);
        self.reached.send_replace(Reached { number, over: false });
    }

    /// Forgets everything before this number, since events are missing there.
    pub(super) fn begin_at(&self, number: u64) {
        let mut events = self.events.write().unwrap_or_else(PoisonError::into_inner);
        events.kept.clear();
        (events.bytes, events.begin) = (0, number);
    }

    /// Ends all readers.
    pub(super) fn end(&self) {
        self.reached.send_modify(|reached| reached.over = true);
    }

    /// Tells how far the log has come, now and later.
    pub(crate) fn reached(&self) -> watch::Receiver<Reached> {
        self.reached.subscribe()
    }

    /// Whether a reader that has seen everything up to this number misses nothing.
    pub(super) fn reaches_back_to(&self, position: u64) -> bool {
        let events = self.events.read().unwrap_or_else(PoisonError::into_inner);
        position.saturating_add(1) >= events.begin
    }

    /// The next events behind a position that the reader wants: a bounded number of a bounded number looked at. `None`
    /// where some are gone already.
    pub(crate) fn take(&self, position: u64, wants: impl Fn(&Told) -> bool) -> Option<Taken> {
        let events = self.events.read().unwrap_or_else(PoisonError::into_inner);
        if position.saturating_add(1) < events.begin {
            return None;
        }
        let first = events.kept.partition_point(|told| told.number <= position);
        let mut taken = Taken {
            events: Vec::new(),
            position,
        };
        for told in events.kept.iter().skip(first).take(MOST_SCANNED) {
            if taken.events.len() == MOST_TAKEN {
                break;
            }
            taken.position = told.number;
            if wants(told) {
                taken.events.push(Arc::clone(told));
            }
        }
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(log: &Log, number: u64, bytes: usize) {
        let told = Told {
            number,
            instance: format!("vm-{}", number % 2).parse().unwrap(),
            frame: vec![b'x'; bytes].into(),
        };
        log.push(number, Some(told));
    }

    fn numbers(taken: &Taken) -> Vec<u64> {
        taken.events.iter().map(|told| told.number).collect()
    }

    #[test]
    fn readers_take_what_they_want_in_turns_of_bounded_size() {
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
        let odd = |told: &Told| told.instance.as_str() == "vm-1";
        assert_eq!(numbers(&log.take(2001, odd).unwrap()), [2003]);
        assert_eq!(log.take(2004, |_| true).unwrap().position, 2004);
    }

    #[test]
    fn the_oldest_go_by_number_and_by_bytes_and_a_reader_is_told() {
        let log = Log::after(0);
        for number in 1..=10_001 {
            push(&log, number, 10);
        }
        assert!(log.take(0, |_| true).is_none());
        assert!(!log.reaches_back_to(0) && log.reaches_back_to(1));
        assert_eq!(numbers(&log.take(1, |_| true).unwrap())[0], 2);
        push(&log, 10_002, MOST_BYTES - 5);
        assert!(log.take(10_000, |_| true).is_none());
        assert_eq!(numbers(&log.take(10_001, |_| true).unwrap()), [10_002]);
        push(&log, 10_003, MOST_BYTES + 1);
        assert!(
            log.take(10_002, |_| true).is_none(),
            "too large to be kept at all"
        );
        assert!(log.take(10_003, |_| true).unwrap().events.is_empty());
    }

    #[test]
    fn numbers_without_an_event_and_those_that_were_missed_are_passed_over() {
        let log = Log::after(0);
        push(&log, 1, 10);
        log.push(2, None);
        let reached = log.reached();
        assert_eq!(reached.borrow().number, 2);
        log.begin_at(8);
        assert!(!log.reaches_back_to(6) && log.reaches_back_to(7));
        push(&log, 9, 10);
        assert_eq!(numbers(&log.take(7, |_| true).unwrap()), [9]);
        log.end();
        assert!(reached.borrow().over);
    }
}
