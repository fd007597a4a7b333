//! Receives evaluation records and evaluates them in batches. A batch is acknowledged after its changes were written.

use std::{future::pending, time::Duration};

use async_nats::jetstream::Message;
use metrics::counter;
use tokio::time::Instant;
use tracing::{info, warn};
use vmwatch_api::{alerts::evaluation::EvaluationRecord, time::unix_millis};

use super::{
    Engine,
    machine::Transition,
    never,
    records::{Received, Records, Replay},
    samples::Evaluation,
};
use crate::{AlertError, known_vms::VmFacts};

/// Time after its first record at which a batch is complete, and maximum number of its records.
const BATCH_TIME: Duration = Duration::from_millis(100);
const BATCH_RECORDS: usize = 2000;
/// alert-svc is late if it has not evaluated a record for this time.
const LATE_MS: u64 = 60_000;
/// alert-svc is late if it has not read the stream for this time.
const UNREAD_MS: u64 = 15_000;
/// Number of ticks after which a failed attempt to read the stream is repeated.
const RETRY_TICKS: u64 = 3;
/// Number of records of a replay after which other work is done.
const REPLAY_CHUNK: usize = 10_000;

/// Records whose changes are written and acknowledged together.
#[derive(Default)]
pub(super) struct Batch {
    transitions: Vec<Transition>,
    records: usize,
    last: Option<Message>,
    due: Option<Instant>,
}

impl Batch {
    pub(super) const fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// When the batch is complete.
    pub(super) fn due(&self) -> Instant {
        self.due.unwrap_or_else(never)
    }
}

/// How late alert-svc is with evaluating records. All times are Unix milliseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lag {
    /// When the last evaluated record was stored, and whether there are more.
    stored_ms: u64,
    has_more: bool,
    /// Whether all records were evaluated at some time since this replica took the lease.
    pub(super) has_caught_up: bool,
    /// When the stream was last read.
    pub(super) read_ms: u64,
}

impl Lag {
    pub(super) const fn new(now_ms: u64) -> Self {
        Self {
            stored_ms: now_ms,
            has_more: true,
            has_caught_up: false,
            read_ms: now_ms,
        }
    }

    /// The lag after all records were evaluated.
    #[cfg(test)]
    pub(super) const fn none(now_ms: u64) -> Self {
        Self {
            has_more: false,
            has_caught_up: true,
            ..Self::new(now_ms)
        }
    }

    /// Since when alert-svc is late; `None` if it is not.
    pub(super) fn late_since_ms(&self, now_ms: u64) -> Option<u64> {
        let unread = (now_ms.saturating_sub(self.read_ms) > UNREAD_MS).then_some(self.read_ms);
        let is_behind = self.behind_ms(now_ms) > LATE_MS;
        let behind = is_behind.then_some(self.stored_ms);
        [unread, behind].into_iter().flatten().min()
    }

    /// Age of the newest evaluated record, if there are more records.
    pub(super) fn behind_ms(&self, now_ms: u64) -> u64 {
        if self.has_more {
            now_ms.saturating_sub(self.stored_ms)
        } else {
            0
        }
    }
}

/// Returns the next record; waits without end if the stream is not open.
pub(super) async fn next(records: &mut Option<Records>) -> Result<Received, AlertError> {
    match records {
        Some(records) => records.next().await,
        None => pending().await,
    }
}

impl Engine {
    /// Opens the stream of evaluation records, and reads records again that another replica may not have evaluated.
    pub(super) async fn open_records(&mut self) {
        let opened = Records::open(&self.setup.bus, self.evaluated, self.saved).await;
        let (records, replay) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                warn!(%error, "opening the stream of evaluation records failed; retrying");
                self.retry_at = self.ticks + RETRY_TICKS;
                return;
            }
        };
        if records.newest < self.evaluated {
            warn!("the stream of evaluation records was made again");
            self.evaluated = 0;
        }
        if !records.has_pending {
            (self.lag.has_more, self.lag.has_caught_up) = (false, true);
        }
        if let Some(replay) = replay {
            let replayed = self.replay(replay).await;
            // These records are acknowledged with the next ones.
            let transitions = std::mem::take(&mut self.batch.transitions);
            self.hand_over(transitions);
            match replayed {
                Ok(count) => info!(count, "read evaluation records again"),
                Err(error) => {
                    warn!(%error, "reading evaluation records again failed; retrying");
                    self.retry_at = self.ticks + RETRY_TICKS;
                    return;
                }
            }
        }
        self.records = Some(records);
        self.lag.read_ms = unix_millis();
    }

    /// Reads records again, and evaluates those that were not evaluated before. Returns their number.
    async fn replay(&mut self, mut replay: Replay) -> Result<usize, AlertError> {
        let mut count = 0;
        while let Some(received) = replay.next().await? {
            if let Some(record) = &received.record {
                if received.sequence <= replay.evaluated {
                    self.samples.note(record, &self.watched);
                } else {
                    self.evaluate(record);
                }
            }
            self.evaluated = self.evaluated.max(received.sequence);
            count += 1;
            if count % REPLAY_CHUNK == 0 {
                tokio::task::yield_now().await;
            }
        }
        Ok(count)
    }

    /// Takes a record from the stream.
    pub(super) fn receive(&mut self, received: Result<Received, AlertError>) {
        let received = match received {
            Ok(received) => received,
            Err(error) => {
                warn!(%error, "reading the stream of evaluation records failed; retrying");
                self.finish_batch();
                self.records = None;
                self.retry_at = self.ticks + RETRY_TICKS;
                return;
            }
        };
        // The records between were delivered to a replica that has lost the lease.
        if self.evaluated > 0 && received.sequence > self.evaluated + 1 {
            info!(
                evaluated = self.evaluated,
                received = received.sequence,
                "evaluation records are missing; reading them again"
            );
            self.finish_batch();
            self.records = None;
            return;
        }
        let has_more = received.pending > 0;
        self.lag = Lag {
            stored_ms: received.stored_ms,
            has_more,
            has_caught_up: self.lag.has_caught_up || !has_more,
            read_ms: unix_millis(),
        };
        // A record that is delivered again only needs to be acknowledged.
        if received.sequence > self.evaluated {
            if let Some(record) = &received.record {
                self.evaluate(record);
            }
            self.evaluated = received.sequence;
        }
        self.batch.last = Some(received.message);
        self.batch.records += 1;
        self.batch.due.get_or_insert_with(|| Instant::now() + BATCH_TIME);
        if self.batch.records >= BATCH_RECORDS {
            self.finish_batch();
        }
    }

    pub(super) fn evaluate(&mut self, record: &EvaluationRecord) {
        counter!("vmwatch_alert_records_total").increment(1);
        let facts = if self.machine.has_selectors() {
            self.setup.known.facts(&record.instance_id)
        } else {
            VmFacts::default()
        };
        let mut evaluation = Evaluation {
            machine: &mut self.machine,
            watched: &self.watched,
            facts: &facts,
            out: &mut self.batch.transitions,
        };
        self.samples.evaluate(record, &mut evaluation);
    }

    /// Hands the batch to the writer.
    pub(super) fn finish_batch(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        if batch.records > 0 || !batch.transitions.is_empty() {
            let writes = self.writes(batch.transitions);
            self.send(writes, batch.last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alert_svc_is_late_if_it_is_behind_or_does_not_read() {
        let lag = |stored_ms, has_more, read_ms| Lag {
            stored_ms,
            has_more,
            has_caught_up: true,
            read_ms,
        };
        let now = 1_000_000;
        assert_eq!(
            lag(now - 61_000, true, now).late_since_ms(now),
            Some(now - 61_000)
        );
        assert_eq!(lag(now - 61_000, false, now).late_since_ms(now), None);
        assert_eq!(lag(now - 5000, true, now).late_since_ms(now), None);
        assert_eq!(
            lag(now, false, now - 16_000).late_since_ms(now),
            Some(now - 16_000)
        );
    }
}
