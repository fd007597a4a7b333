//! Reads evaluation records from their stream, in order, through one durable consumer.
//!
//! When a replica takes the lease, it first reads records again ([`Records::replay`]): those that were acknowledged
//! since the progress of VMs was stored, to know the newest sample of each VM, and those that were delivered to the
//! last holder of the lease and not acknowledged. Otherwise newer records would be evaluated before these.

use std::time::Duration;

use async_nats::jetstream::{
    Message,
    consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
};
use futures::StreamExt;
use metrics::counter;
use tokio::time::timeout;
use tracing::{info, warn};
use vmwatch_api::{
    Service,
    alerts::evaluation::{EVALUATION_STREAM, EvaluationRecord},
};
use vmwatch_bus::{
    Bus,
    jetstream::{JetStreamError, Reader},
    provision::ensure_consumer,
};

use crate::AlertError;

/// Name of the durable consumer.
const CONSUMER: &str = "evaluate";
/// Deadline of a request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(2);
/// Time after which records that were not acknowledged are delivered again.
const ACK_WAIT: Duration = Duration::from_secs(5);
/// Maximum number of records that are delivered and not acknowledged.
const MAX_ACK_PENDING: i64 = 20_000;
/// Number of records that are requested at once.
const PULL: usize = 2000;
/// Records before the stored progress that are read again, because the parts of a sample may be on both sides of it.
const SLACK: u64 = 2000;
/// A replay ends if no record arrives for this time.
const REPLAY_PAUSE: Duration = Duration::from_secs(2);

/// A record, with its position in the stream.
#[derive(Debug)]
pub(super) struct Received {
    /// `None` if the record cannot be decoded.
    pub(super) record: Option<EvaluationRecord>,
    pub(super) sequence: u64,
    /// When the record was stored in the stream, Unix milliseconds.
    pub(super) stored_ms: u64,
    /// Number of records after this one.
    pub(super) pending: u64,
    pub(super) message: Message,
}

/// A reader of the stream of evaluation records.
pub(super) struct Records {
    messages: pull::Stream,
    /// Position of the newest record when the stream was opened.
    pub(super) newest: u64,
    /// Whether there were records that no replica had received.
    pub(super) has_pending: bool,
}

/// The records to be read again before new ones.
pub(super) struct Replay {
    reader: Reader,
    /// Records up to this position were evaluated before.
    pub(super) evaluated: u64,
    /// Position of the last record of the replay.
    last: u64,
    is_complete: bool,
}

fn config() -> pull::Config {
    pull::Config {
        durable_name: Some(CONSUMER.to_owned()),
        ack_policy: AckPolicy::All,
        ack_wait: ACK_WAIT,
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING,
        ..pull::Config::default()
    }
}

impl Records {
    /// Opens the stream. Records up to the position `known` are in the memory of this replica, those up to `saved` are
    /// in the stored progress.
    pub(super) async fn open(
        bus: &Bus,
        known: u64,
        saved: u64,
    ) -> Result<(Self, Option<Replay>), AlertError> {
        let stream = bus.stream_info(EVALUATION_STREAM, DEADLINE).await?;
        let consumer = ensure_consumer(bus, EVALUATION_STREAM, Service::Alert, &config()).await?;
        let info = bus.consumer_info(EVALUATION_STREAM, CONSUMER, DEADLINE).await?;
        let newest = stream.state.last_sequence;
        let evaluated = info.ack_floor.stream_sequence;
        let delivered = info.delivered.stream_sequence;
        // A stream that was made again begins with the first position.
        let (known, saved) = if known.max(saved) > newest {
            (0, 0)
        } else {
            (known, saved)
        };
        let from = if known == 0 {
            saved.saturating_sub(SLACK).min(evaluated)
        } else {
            known
        } + 1;
        let replay = if from <= delivered && stream.state.messages > 0 {
            let position = DeliverPolicy::ByStartSequence {
                start_sequence: from.max(stream.state.first_sequence),
            };
            info!(from, evaluated, delivered, "reading evaluation records again");
            Some(Replay {
                reader: bus.read_stream(EVALUATION_STREAM, "", position, DEADLINE).await?,
                evaluated: evaluated.max(known),
                last: delivered,
                is_complete: false,
            })
        } else {
            None
        };
        let messages = Self::messages(&consumer).await?;
        let records = Self {
            messages,
            newest,
            has_pending: info.num_pending > 0,
        };
        Ok((records, replay))
    }

    async fn messages(consumer: &PullConsumer) -> Result<pull::Stream, AlertError> {
        let messages = consumer
            .stream()
            .max_messages_per_batch(PULL)
            .expires(Duration::from_secs(10))
            .heartbeat(Duration::from_secs(3))
            .messages();
        messages
            .await
            .map_err(|error| JetStreamError::Unreadable(error.into()).into())
    }

    /// Returns the next record. If the caller stops waiting, a later call returns it.
    pub(super) async fn next(&mut self) -> Result<Received, AlertError> {
        let message = self.messages.next().await.ok_or(JetStreamError::Interrupted)?;
        received(message.map_err(|error| JetStreamError::Unreadable(error.into()))?)
    }
}

impl Replay {
    /// Returns the next record of the replay; `None` at its end.
    pub(super) async fn next(&mut self) -> Result<Option<Received>, AlertError> {
        if self.is_complete {
            return Ok(None);
        }
        // The last records may have been discarded, because the stream is full.
        let Ok(message) = timeout(REPLAY_PAUSE, self.reader.next()).await else {
            return Ok(None);
        };
        let received = received(message?)?;
        self.is_complete = received.sequence >= self.last || received.pending == 0;
        Ok((received.sequence <= self.last).then_some(received))
    }
}

fn received(message: Message) -> Result<Received, AlertError> {
    let info = message.info().map_err(JetStreamError::Unreadable)?;
    let (sequence, pending) = (info.stream_sequence, info.pending);
    let stored_ms = u64::try_from(info.published.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
    let record = serde_json::from_slice(&message.payload);
    let record = record
        .inspect_err(|error| {
            counter!("vmwatch_alert_records_ignored_total", "reason" => "undecodable").increment(1);
            warn!(%error, sequence, "an evaluation record could not be decoded; it is ignored");
        })
        .ok();
    Ok(Received {
        record,
        sequence,
        stored_ms,
        pending,
        message,
    })
}
