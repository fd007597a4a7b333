//! Reports the latest uses of sessions and API tokens to auth-svc. Gateways have no permission to write to their KV
//! buckets.

use std::time::Duration;

use metrics::counter;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use vmwatch_api::Method;
use vmwatch_bus::{Bus, Context};

/// Maximum number of uses that wait to be reported.
const QUEUE: usize = 10_000;
/// Interval between reports to auth-svc.
const INTERVAL: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_secs(5);

/// How uses of one kind are reported.
pub(crate) struct Reports<M: Method, T> {
    /// Maximum number of uses in a report.
    pub(crate) most: usize,
    /// Makes the parameters of a report.
    pub(crate) params: fn(Vec<T>) -> M::Params,
    /// Name of the counter of uses that were dropped.
    pub(crate) dropped: &'static str,
}

/// Queue of uses to report to auth-svc.
#[derive(Debug, Clone)]
pub(crate) struct Uses<T> {
    queue: mpsc::Sender<T>,
    dropped: &'static str,
}

impl<T: Send + 'static> Uses<T> {
    /// Starts the task that reports uses until shutdown.
    pub(crate) fn report<M: Method<Params: Sync>>(
        bus: &Bus,
        reports: Reports<M, T>,
        shutdown: CancellationToken,
    ) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let bus = bus.clone();
        let dropped = reports.dropped;
        tokio::spawn(async move { shutdown.run_until_cancelled(report(bus, reports, waiting)).await });
        Self { queue, dropped }
    }

    /// Queues a use. If the queue is full the use is dropped and counted; a later use will be reported.
    pub(crate) fn note(&self, used: T) {
        if self.queue.try_send(used).is_err() {
            counter!(self.dropped).increment(1);
        }
    }
}

async fn report<M: Method<Params: Sync>, T>(
    bus: Bus,
    reports: Reports<M, T>,
    mut waiting: mpsc::Receiver<T>,
) {
    loop {
        let mut uses = Vec::new();
        if waiting.recv_many(&mut uses, reports.most).await == 0 {
            return;
        }
        let count = uses.len() as u64;
        let params = (reports.params)(uses);
        if let Err(fault) = bus.call::<M>(&Context::new(DEADLINE), &params).await {
            counter!(reports.dropped).increment(count);
            debug!(
                cause = fault.cause_chain(),
                method = M::INFO.subject,
                "reporting the latest uses to auth-svc failed: {fault}"
            );
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
