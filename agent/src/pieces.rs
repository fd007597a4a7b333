//! The pieces of a sample part that was too large for NATS. They exist only in memory: an agent that is restarted splits the
//! part again, and sends some rows twice, which is harmless.

use std::collections::VecDeque;

use crate::{parts::Part, spool::Queued};

/// The pieces of one sample part that are not acknowledged yet, in order.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    sequence: u64,
    waiting: VecDeque<Part>,
}

impl Pieces {
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The next piece, with the sequence number of the sample part.
    pub(crate) fn next(&self) -> Option<Queued> {
        let part = self.waiting.front()?.clone();
        let sequence = self.sequence;
        Some(Queued { sequence, part })
    }

    /// Replaces a sample part, or the piece that was sent last, by its halves.
    pub(crate) fn split(&mut self, sent: &Queued, halves: [Part; 2]) {
        self.waiting.pop_front();
        self.sequence = sent.sequence;
        let [first, second] = halves;
        self.waiting.push_front(second);
        self.waiting.push_front(first);
    }

    /// Removes the piece that was sent. Returns true if the whole sample part has been sent.
    pub(crate) fn remove_first(&mut self, sent: &Queued) -> bool {
        if sent.sequence == self.sequence {
            self.waiting.pop_front();
        }
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(id: &str) -> Part {
        let (id, body) = (id.to_owned(), bytes::Bytes::new());
        Part { id, body }
    }

    #[test]
    fn pieces_are_sent_in_order_and_split_again() {
        let mut pieces = Pieces::default();
        let whole = Queued {
            sequence: 7,
            part: part("whole"),
        };
        assert!(pieces.next().is_none() && pieces.remove_first(&whole));
        pieces.split(&whole, [part("1"), part("2")]);
        let first = pieces.next().unwrap();
        assert_eq!((first.sequence, first.part.id.as_str()), (7, "1"));
        pieces.split(&first, [part("1a"), part("1b")]);
        let mut sent = Vec::new();
        while let Some(piece) = pieces.next() {
            sent.push(piece.part.id.clone());
            assert_eq!(pieces.remove_first(&piece), piece.part.id == "2");
        }
        assert_eq!(sent, ["1a", "1b", "2"]);
    }
}
