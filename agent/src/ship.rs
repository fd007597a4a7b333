//! The shipping loop. It publishes sample parts to JetStream, in order and one at a time, and waits for
//! each acknowledgement. Sample parts that are not acknowledged within 250 ms are spooled to disk. `spool.rs`
//! describes the guarantees. A sample part that NATS will never accept because of its size is sent in pieces or, if it cannot
//! be split, moved aside, so that the following ones are sent.
//!
//! At log level `trace`, this module logs each sample part when it is sampled, spooled and acknowledged, so tests
//! can compare the log with the stored messages.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use metrics::counter;
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use tracing::{error, info, trace, warn};
use vmwatch_api::{
    InstanceId,
    metrics::{SAMPLE_SUBJECT_PREFIX, Sample},
};
use vmwatch_blocks::{Encoder, SAMPLE_LIMITS, decode_sample};
use vmwatch_bus::Bus;

use crate::{
    disk::Disk,
    dropped,
    parts::{halve, split},
    pieces::Pieces,
    publish::{Attempt, Origin, PublishError, publish},
    retry::Retry,
    share::ShareFull,
    spool::{Queued, Spool},
    status::Status,
};

/// How long a sample part may wait in memory for its acknowledgement before it is spooled.
pub(crate) const GRACE: Duration = Duration::from_millis(250);
/// Wait before a failed write to the spool is retried.
const WRITE_RETRY_PAUSE: Duration = Duration::from_secs(5);
/// Maximum number of bytes kept in memory while the spool's disk hangs or is full: eight sample parts of the maximum
/// size, or several thousand of an agent with 100 processes.
const MAX_BYTES_IN_MEMORY: usize = 4 << 20;

/// Ships the samples of one VM to JetStream.
#[derive(Debug)]
pub(crate) struct Shipper {
    bus: Bus,
    subject: String,
    origin: Origin,
    disk: Disk,
    status: Arc<Status>,
    encoder: Encoder,
    /// Sample parts that are only in memory, oldest first. All sample parts on disk are older.
    fresh: VecDeque<Queued>,
    /// The pieces of the oldest sample part that are not acknowledged yet, if NATS refused the part as too large. The part
    /// itself stays in the spool or in memory until all of them are.
    pieces: Pieces,
    /// Time at which the sample parts in memory must be written to the spool.
    write_at: Option<Instant>,
    next_sequence: u64,
    /// The sequence number of the last sample part that was sent.
    tried: Option<u64>,
    retry: Retry,
    share_full: ShareFull,
}

impl Shipper {
    pub(crate) fn new(
        bus: Bus,
        instance_id: &InstanceId,
        origin: Origin,
        spool: Spool,
        encoder: Encoder,
        status: Arc<Status>,
    ) -> Self {
        Self {
            bus,
            subject: format!("{SAMPLE_SUBJECT_PREFIX}{instance_id}"),
            origin,
            next_sequence: spool.next_sequence(),
            disk: Disk::new(spool),
            status,
            encoder,
            fresh: VecDeque::new(),
            pieces: Pieces::default(),
            write_at: None,
            tried: None,
            retry: Retry::new(),
            share_full: ShareFull::default(),
        }
    }

    /// Ships samples until the sampling loop ends, and then until everything has been sent or the deadline has passed.
    /// Sample parts that were not sent remain on disk.
    pub(crate) async fn run(mut self, mut taken: mpsc::Receiver<Sample>, drain_deadline: Duration) {
        // At most one sample part is in flight, so sample parts are acknowledged in order.
        let mut sending = JoinSet::new();
        let mut drain_until = None;
        loop {
            if sending.is_empty()
                && let Some(queued) = self.next().await
            {
                let attempt = match self.tried.replace(queued.sequence) {
                    Some(before) if before == queued.sequence => Attempt::Repeated,
                    _ => Attempt::First,
                };
                let published = publish(
                    self.bus.clone(),
                    self.subject.clone(),
                    self.origin,
                    queued.part.clone(),
                    attempt,
                );
                sending.spawn(async move { (queued, published.await) });
            }
            if drain_until.is_some_and(|until| sending.is_empty() || until <= Instant::now()) {
                break;
            }
            let wake_at = self.wake_at(sending.is_empty(), drain_until);
            tokio::select! {
                next = taken.recv(), if drain_until.is_none() => match next {
                    Some(sample) => self.accept(sample),
                    None => drain_until = Some(Instant::now() + drain_deadline),
                },
                Some(sent) = sending.join_next() => match sent {
                    Ok((queued, outcome)) => self.settle(&queued, outcome).await,
                    Err(panicked) => self.publish_failed(&PublishError::Refused(panicked.to_string())),
                },
                () = tokio::time::sleep_until(wake_at) => {}
            }
            if self.write_at.is_some_and(|at| at <= Instant::now()) {
                self.write().await;
            }
        }
        self.finish().await;
    }

    fn accept(&mut self, sample: Sample) {
        let parts = match split(sample, &mut self.encoder) {
            Ok(parts) => parts,
            Err(error) => {
                error!(%error, "dropped a sample that could not be encoded; this is a bug in the agent");
                dropped::note("unencodable", 1);
                return;
            }
        };
        let grace = if self.is_held_up() { Duration::ZERO } else { GRACE };
        self.write_at.get_or_insert(Instant::now() + grace);
        for part in parts {
            let sequence = self.next_sequence;
            self.next_sequence += 1;
            trace!(id = part.id, body = as_json(&part.body), "sampled");
            self.fresh.push_back(Queued { sequence, part });
        }
        self.keep_memory_bound();
    }

    /// Whether a new sample part is unlikely to be acknowledged soon, because NATS is unreachable or older ones wait.
    fn is_held_up(&self) -> bool {
        self.disk.waiting() > 0 || self.retry.is_failing() || !self.bus.is_connected()
    }

    fn keep_memory_bound(&mut self) {
        let size = |queued: &Queued| size_of::<Queued>() + queued.part.id.len() + queued.part.body.len();
        let mut bytes: usize = self.fresh.iter().map(size).sum();
        let mut dropped = 0;
        while bytes > MAX_BYTES_IN_MEMORY
            && let Some(oldest) = self.fresh.pop_front()
        {
            bytes -= size(&oldest);
            dropped += 1;
        }
        if dropped > 0 {
            error!(
                dropped,
                "writing to the spool failed and the memory limit was reached; dropped the oldest samples"
            );
            dropped::note("memory_full", dropped);
        }
    }

    /// Returns the oldest sample part if it is time to send one. While the disk hangs, sample parts in memory are
    /// sent before those on disk, because the current state of a VM with a hung disk is the most important.
    async fn next(&mut self) -> Option<Queued> {
        if !self.retry.is_due() || !self.has_unsent() {
            return None;
        }
        if !self.bus.is_connected() {
            self.publish_failed(&PublishError::Disconnected);
            return None;
        }
        if let Some(piece) = self.pieces.next() {
            return Some(piece);
        }
        if self.disk.waiting() > 0 {
            match self.disk.oldest().await {
                Ok(Some(oldest)) => return Some(oldest),
                Ok(None) => {}
                Err(error) => {
                    warn!(%error, "failed to read the spool; sending the samples that are in memory first");
                    if self.fresh.is_empty() {
                        self.retry.later(WRITE_RETRY_PAUSE);
                    }
                }
            }
        }
        self.fresh.front().cloned()
    }

    fn has_unsent(&self) -> bool {
        !self.pieces.is_empty() || !self.fresh.is_empty() || self.disk.waiting() > 0
    }

    async fn settle(&mut self, queued: &Queued, outcome: Result<(), PublishError>) {
        match outcome {
            Ok(()) => {
                counter!("vmwatch_agent_parts_published_total").increment(1);
                trace!(id = queued.part.id, "acknowledged");
            }
            Err(PublishError::TooLarge) => {
                if !self.split_or_keep_refused(queued).await {
                    return;
                }
            }
            Err(error) => {
                self.publish_failed(&error);
                return;
            }
        }
        if self.pieces.remove_first(queued) {
            self.remove(queued).await;
        } else {
            self.tried = None;
        }
    }

    /// Splits a sample part that is too large. One that cannot be split is moved to the folder of refused parts. Returns
    /// whether nothing of it is left to send.
    async fn split_or_keep_refused(&mut self, queued: &Queued) -> bool {
        let (id, bytes) = (&queued.part.id, queued.part.body.len());
        if let Some(halves) = halve(&queued.part, &mut self.encoder) {
            warn!(
                id,
                bytes, "NATS does not accept a sample part of this size; splitting it"
            );
            self.tried = None;
            self.pieces.split(queued, halves);
            return false;
        }
        match self.disk.keep_refused(queued.part.clone()).await {
            Ok(file) => error!(
                id,
                bytes,
                file = %file.display(),
                "NATS does not accept a sample part of this size; moved it aside"
            ),
            Err(error) => error!(
                id,
                bytes,
                %error,
                "NATS does not accept a sample part of this size, and it could not be moved aside; dropped it"
            ),
        }
        dropped::note("refused", 1);
        true
    }

    /// Removes a sample part that has been sent.
    async fn remove(&mut self, queued: &Queued) {
        if self
            .fresh
            .front()
            .is_some_and(|fresh| fresh.sequence == queued.sequence)
        {
            self.fresh.pop_front();
        }
        if self.fresh.is_empty() {
            self.write_at = None;
        }
        if self.disk.waiting() > 0
            && let Err(error) = self.disk.remove(queued.sequence).await
        {
            warn!(%error, "removing an acknowledged sample from the spool failed; the sample will be sent again");
            self.retry.later(WRITE_RETRY_PAUSE);
        }
        if self.retry.succeeded(!self.has_unsent()) {
            info!("all spooled samples have been sent and acknowledged");
            self.status.publishing(Ok(()));
        }
    }

    fn publish_failed(&mut self, error: &PublishError) {
        let is_new = self.retry.failed(error);
        if is_new {
            self.status.publishing(Err(error.kind()));
        }
        match error {
            PublishError::ShareFull => self.share_full.refused(),
            _ if is_new => warn!("{error}"),
            _ => {}
        }
        if !self.fresh.is_empty() {
            self.write_at = Some(Instant::now());
        }
    }

    /// Writes the sample parts in memory to the spool.
    async fn write(&mut self) {
        let written = self.disk.write(self.fresh.iter().cloned().collect()).await;
        for queued in self.fresh.drain(..written.count) {
            trace!(id = queued.part.id, "spooled");
        }
        self.write_at = written.error.map(|error| {
            warn!(%error, waiting = self.fresh.len(), "writing to the spool failed; samples wait in memory");
            Instant::now() + WRITE_RETRY_PAUSE
        });
    }

    fn wake_at(&self, idle: bool, drain_until: Option<Instant>) -> Instant {
        let send_at = (idle && self.has_unsent()).then(|| self.retry.at());
        let moments = [self.write_at, send_at, drain_until];
        // If there is nothing to do, the loop sleeps for a long time; a new sample wakes it earlier.
        moments
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_else(|| Instant::now() + Duration::from_hours(1))
    }

    async fn finish(mut self) {
        if !self.fresh.is_empty() {
            self.write().await;
        }
        if !self.fresh.is_empty() {
            let lost = self.fresh.len() as u64;
            error!(
                lost,
                "the agent stopped; samples that could be neither sent nor spooled are lost"
            );
            dropped::note("stopped", lost);
        }
        info!(
            waiting = self.disk.waiting(),
            "the agent stopped; spooled samples will be sent after its next start"
        );
    }
}

/// Decodes a sample part for the log.
fn as_json(body: &[u8]) -> Option<String> {
    serde_json::to_string(&decode_sample(body, SAMPLE_LIMITS).ok()?).ok()
}
