//! Parts on their way to the stream: published in order, one at a time, each until it is acknowledged; on disk
//! meanwhile where that takes longer than a moment. What that guarantees is said in `spool.rs`.
//!
//! At level `trace` this module logs each part as it is sampled, spooled and acknowledged: a witness to hold the store
//! against.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use metrics::counter;
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use tracing::{error, info, trace, warn};
use vmwatch_api::{
    InstanceId,
    metrics::{SAMPLE_SUBJECT_PREFIX, Sample},
};
use vmwatch_bus::Bus;

use crate::{
    disk::Disk,
    dropped,
    parts::split,
    publish::{Attempt, Trouble, publish},
    retry::Retry,
    spool::{Queued, Spool},
    status::Status,
};

/// How long a part may wait for its acknowledgement in memory alone.
pub(crate) const GRACE: Duration = Duration::from_millis(250);
/// How soon a write to the spool that failed is tried again.
const WRITE_AGAIN: Duration = Duration::from_secs(5);
/// The most bytes that wait in memory, while the disk of the spool hangs or is full: 128 parts of the largest size.
const MOST_IN_MEMORY: usize = 4 << 20;

/// Ships the samples of one VM.
#[derive(Debug)]
pub(crate) struct Shipper {
    bus: Bus,
    subject: String,
    disk: Disk,
    status: Arc<Status>,
    /// In memory alone, oldest first; all that is on disk is older.
    fresh: VecDeque<Queued>,
    /// When the fresh parts are to be on disk.
    write_at: Option<Instant>,
    next_sequence: u64,
    /// The part that was sent last.
    tried: Option<u64>,
    retry: Retry,
}

impl Shipper {
    pub(crate) fn new(bus: Bus, instance_id: &InstanceId, spool: Spool, status: Arc<Status>) -> Self {
        Self {
            bus,
            subject: format!("{SAMPLE_SUBJECT_PREFIX}{instance_id}"),
            next_sequence: spool.next_sequence(),
            disk: Disk::new(spool),
            status,
            fresh: VecDeque::new(),
            write_at: None,
            tried: None,
            retry: Retry::new(),
        }
    }

    /// Ships until the sender of samples is gone, then what is left as far as the stream takes it within the
    /// deadline. The rest is on disk at the end.
    pub(crate) async fn run(mut self, mut taken: mpsc::Receiver<Sample>, drain_deadline: Duration) {
        // At most one: parts are acknowledged in order.
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
                    Err(panicked) => self.in_trouble(&Trouble::Refused(panicked.to_string())),
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
        let parts = match split(sample) {
            Ok(parts) => parts,
            Err(error) => {
                error!(%error, "a sample could not be encoded: this is a defect of the agent");
                return;
            }
        };
        let grace = if self.is_held_up() { Duration::ZERO } else { GRACE };
        self.write_at.get_or_insert(Instant::now() + grace);
        for part in parts {
            let sequence = self.next_sequence;
            self.next_sequence += 1;
            trace!(id = part.id, body = %String::from_utf8_lossy(&part.body), "sampled");
            self.fresh.push_back(Queued { sequence, part });
        }
        self.keep_memory_bound();
    }

    /// Whether a new part will not be acknowledged within a moment.
    fn is_held_up(&self) -> bool {
        self.disk.waiting() > 0 || self.retry.is_failing() || !self.bus.is_connected()
    }

    fn keep_memory_bound(&mut self) {
        let mut bytes: usize = self.fresh.iter().map(|queued| queued.part.body.len()).sum();
        let mut dropped = 0;
        while bytes > MOST_IN_MEMORY
            && let Some(oldest) = self.fresh.pop_front()
        {
            bytes -= oldest.part.body.len();
            dropped += 1;
        }
        if dropped > 0 {
            error!(
                dropped,
                "the spool cannot be written and memory is at its limit: the oldest parts were dropped"
            );
            dropped::note("memory_full", dropped);
        }
    }

    /// The oldest part, if it is time to send one. While the disk hangs, what is in memory goes ahead of what is on
    /// it: a VM whose disk hangs is the one that somebody wants to see.
    async fn next(&mut self) -> Option<Queued> {
        if !self.retry.is_due() || (self.fresh.is_empty() && self.disk.waiting() == 0) {
            return None;
        }
        if !self.bus.is_connected() {
            self.in_trouble(&Trouble::Away);
            return None;
        }
        if self.disk.waiting() > 0 {
            match self.disk.oldest().await {
                Ok(Some(oldest)) => return Some(oldest),
                Ok(None) => {}
                Err(error) => {
                    warn!(%error, "the spool cannot be read: what is in memory goes first");
                    if self.fresh.is_empty() {
                        self.retry.later(WRITE_AGAIN);
                    }
                }
            }
        }
        self.fresh.front().cloned()
    }

    async fn settle(&mut self, queued: &Queued, outcome: Result<(), Trouble>) {
        if let Err(trouble) = outcome {
            self.in_trouble(&trouble);
            return;
        }
        counter!("vmwatch_agent_parts_published_total").increment(1);
        trace!(id = queued.part.id, "acknowledged");
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
            warn!(%error, "an acknowledged part is still in the spool and will be sent again");
            self.retry.later(WRITE_AGAIN);
        }
        let all_sent = self.fresh.is_empty() && self.disk.waiting() == 0;
        if self.retry.succeeded(all_sent) {
            info!("all samples that waited are acknowledged");
            self.status.publishing(Ok(()));
        }
    }

    fn in_trouble(&mut self, trouble: &Trouble) {
        if self.retry.failed(trouble) {
            warn!("{trouble}");
            self.status.publishing(Err(trouble.kind()));
        }
        if !self.fresh.is_empty() {
            self.write_at = Some(Instant::now());
        }
    }

    /// Moves the fresh parts to disk.
    async fn write(&mut self) {
        let written = self.disk.write(self.fresh.iter().cloned().collect()).await;
        for queued in self.fresh.drain(..written.count) {
            trace!(id = queued.part.id, "spooled");
        }
        self.write_at = written.error.map(|error| {
            warn!(%error, waiting = self.fresh.len(), "the spool cannot be written: parts wait in memory");
            Instant::now() + WRITE_AGAIN
        });
    }

    fn wake_at(&self, idle: bool, drain_until: Option<Instant>) -> Instant {
        let waits = !self.fresh.is_empty() || self.disk.waiting() > 0;
        let send_at = (idle && waits).then(|| self.retry.at());
        let moments = [self.write_at, send_at, drain_until];
        // With nothing to do, any far moment: a sample wakes the loop sooner.
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
                "the agent stops with parts that could be neither sent nor spooled"
            );
            dropped::note("stopped", lost);
        }
        info!(
            waiting = self.disk.waiting(),
            "stopped; what waits is sent after the next start"
        );
    }
}
