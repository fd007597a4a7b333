//! Reads audit records, newest first, from both audit streams, merged by the time at which NATS stored each record.

use std::{collections::VecDeque, time::Duration};

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use futures::TryStreamExt;
use tracing::warn;
use vmwatch_api::audit::{AUDIT_STREAM, AuditCursor, AuditRecord, UNAUTHENTICATED_AUDIT_STREAM};

use super::{AuditError, Bus, DEADLINE, random_id};
use crate::jetstream::{Existing, JetStreamError};

/// Number of audit records read per request to the NATS server.
const WINDOW: u64 = 500;
/// After this idle time the NATS server deletes the temporary consumer that reads a batch of audit records.
const CONSUMER_IDLE: Duration = Duration::from_secs(5);

/// Reads the newest audit records and returns them oldest first. Records that cannot be decoded are skipped with a
/// warning.
pub async fn newest(bus: &Bus, limit: u64) -> Result<Vec<AuditRecord>, AuditError> {
    let mut records = Vec::new();
    let mut reader = Newest::open(bus, None).await?;
    for _ in 0..limit {
        match reader.next(limit.min(WINDOW)).await? {
            Some(record) => records.push(record),
            None => break,
        }
    }
    records.reverse();
    Ok(records)
}

/// Reads audit records from a given position to older ones.
#[derive(Debug)]
pub struct Newest {
    authenticated: Tail,
    unauthenticated: Tail,
}

impl Newest {
    /// Starts reading before the cursor, or at the newest audit record if there is no cursor.
    pub async fn open(bus: &Bus, before: Option<AuditCursor>) -> Result<Self, AuditError> {
        let (authenticated, unauthenticated) = tokio::try_join!(
            Tail::open(bus, AUDIT_STREAM, before.map(|cursor| cursor.authenticated)),
            Tail::open(
                bus,
                UNAUTHENTICATED_AUDIT_STREAM,
                before.map(|cursor| cursor.unauthenticated)
            )
        )?;
        Ok(Self {
            authenticated,
            unauthenticated,
        })
    }

    /// Skips audit records stored at or after the given time, Unix milliseconds.
    pub async fn end_at(&mut self, moment_ms: u64) -> Result<(), AuditError> {
        tokio::try_join!(
            self.authenticated.end_at(moment_ms),
            self.unauthenticated.end_at(moment_ms)
        )?;
        Ok(())
    }

    /// The position of the next audit record, from which reading can resume later.
    pub const fn cursor(&self) -> AuditCursor {
        AuditCursor {
            authenticated: self.authenticated.before,
            unauthenticated: self.unauthenticated.before,
        }
    }

    /// Returns the next older audit record. Up to `window` records are read from each stream per request.
    pub async fn next(&mut self, window: u64) -> Result<Option<AuditRecord>, AuditError> {
        let (one, other) = (&mut self.authenticated, &mut self.unauthenticated);
        tokio::try_join!(Box::pin(one.fill(window)), Box::pin(other.fill(window)))?;
        let newer = match (one.waiting.front(), other.waiting.front()) {
            (Some(first), Some(second)) if second.moment > first.moment => other,
            (None, Some(_)) => other,
            _ => one,
        };
        Ok(newer.take())
    }
}

/// An audit record with its sequence number in its stream.
#[derive(Debug)]
struct Stored {
    number: u64,
    /// Time at which the NATS server stored the record, by the server's clock, in Unix nanoseconds.
    moment: i128,
    record: AuditRecord,
}

/// The part of an audit stream that has not been returned yet. The streams deny deletion, so sequence numbers have
/// no gaps.
#[derive(Debug)]
struct Tail {
    bus: Bus,
    stream: &'static str,
    first: u64,
    /// Records with this sequence number and higher ones have been returned.
    before: u64,
    /// Records with this sequence number and higher ones have been read from the server.
    read: u64,
    /// Records that have been read but not returned yet, newest first.
    waiting: VecDeque<Stored>,
}

impl Tail {
    async fn open(bus: &Bus, stream: &'static str, before: Option<u64>) -> Result<Self, AuditError> {
        let (first, before) = match bus.stream_info(stream, DEADLINE).await {
            Ok(info) => {
                let end = info.state.last_sequence.saturating_add(1);
                let before = before.unwrap_or(end).min(end);
                let first = info.state.first_sequence;
                (if info.state.messages > 0 { first } else { before }, before)
            }
            // The stream was not created yet, or it was lost together with all data of JetStream.
            Err(JetStreamError::Refused(_)) => (before.unwrap_or_default(), before.unwrap_or_default()),
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            bus: bus.clone(),
            stream,
            first,
            before,
            read: before,
            waiting: VecDeque::new(),
        })
    }

    fn take(&mut self) -> Option<AuditRecord> {
        let stored = self.waiting.pop_front()?;
        self.before = stored.number;
        Some(stored.record)
    }

    /// Reads older records until at least one is available or the audit stream is exhausted.
    async fn fill(&mut self, window: u64) -> Result<(), AuditError> {
        while self.waiting.is_empty() && self.read > self.first {
            let start = self.read.saturating_sub(window).max(self.first);
            self.waiting = records(&self.bus, self.stream, start, self.read).await?;
            self.read = start;
            if self.waiting.is_empty() {
                self.before = start;
            }
        }
        Ok(())
    }

    /// Uses binary search to skip all records stored at or after the given time, Unix milliseconds.
    async fn end_at(&mut self, moment_ms: u64) -> Result<(), AuditError> {
        let (mut low, mut high) = (self.first, self.before);
        while low < high {
            let middle = low + (high - low) / 2;
            // A missing record expired after the stream's state was read; it is therefore older than the requested time.
            let found = self.bus.message(self.stream, middle, DEADLINE).await?;
            let record = found.and_then(|message| decoded(&message.payload));
            let is_later = record.is_some_and(|record| record.at_ms >= moment_ms);
            if is_later {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        self.before = low;
        self.read = low;
        Ok(())
    }
}

/// Reads the audit records with sequence numbers from `start` up to `end`, newest first. Expired records are missing;
/// the server reports immediately when no further record follows, so the read does not wait for them.
async fn records(bus: &Bus, stream: &str, start: u64, end: u64) -> Result<VecDeque<Stored>, AuditError> {
    let config = pull::Config {
        name: Some(random_id()),
        deliver_policy: DeliverPolicy::ByStartSequence {
            start_sequence: start,
        },
        ack_policy: AckPolicy::None,
        inactive_threshold: CONSUMER_IDLE,
        num_replicas: 1,
        memory_storage: true,
        ..pull::Config::default()
    };
    let info = bus
        .create_consumer(stream, config, Existing::Keep, DEADLINE)
        .await?;
    let consumer = bus.pull_consumer(info)?;
    let most = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
    let fetching = tokio::time::timeout(DEADLINE, consumer.fetch().max_messages(most).messages());
    let fetched = fetching.await.map_err(|_| AuditError::Timeout)?;
    let mut messages = fetched.map_err(|error| AuditError::Stream(error.into()))?;
    let mut records = VecDeque::new();
    loop {
        let next = tokio::time::timeout(DEADLINE, messages.try_next()).await;
        let next = next.map_err(|_| AuditError::Timeout)?;
        let Some(message) = next.map_err(AuditError::Stream)? else {
            break;
        };
        let info = message.info().map_err(AuditError::Stream)?;
        let (number, moment) = (info.stream_sequence, info.published.unix_timestamp_nanos());
        if number < end
            && let Some(record) = decoded(&message.payload)
        {
            records.push_front(Stored {
                number,
                moment,
                record,
            });
        }
        if number + 1 >= end {
            break;
        }
    }
    Ok(records)
}

fn decoded(payload: &[u8]) -> Option<AuditRecord> {
    serde_json::from_slice(payload)
        .inspect_err(|error| warn!(%error, "an audit record could not be decoded"))
        .ok()
}
