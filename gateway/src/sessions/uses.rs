//! Reports uses of sessions to auth-svc, so that used sessions do not end as idle. Gateways may not write to the
//! bucket.

use std::time::Duration;

use metrics::counter;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use vmwatch_api::{
    auth::Token,
    sessions::{MOST_USED, SessionsUsed, UsedSession, UsedSessions},
};
use vmwatch_bus::{Bus, Context};

/// Maximum number of uses waiting to be reported.
const QUEUE: usize = 10_000;
/// Interval between reports; each holds at most [`MOST_USED`] sessions.
const INTERVAL: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_secs(5);

/// Queue of uses to report.
#[derive(Debug, Clone)]
pub(super) struct Uses {
    queue: mpsc::Sender<UsedSession>,
}

impl Uses {
    /// Starts reporting, until shutdown.
    pub(super) fn report(bus: &Bus, shutdown: CancellationToken) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let bus = bus.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(report(bus, waiting)).await });
        Self { queue }
    }

    /// Queues a use, or drops it if the queue is full: a later use is reported well before the session would end.
    pub(super) fn note(&self, token: &Token, used_at_ms: u64) {
        let used = UsedSession {
            key: token.key(),
            used_at_ms,
        };
        if self.queue.try_send(used).is_err() {
            counter!("vmwatch_session_uses_dropped_total").increment(1);
        }
    }
}

async fn report(bus: Bus, mut waiting: mpsc::Receiver<UsedSession>) {
    loop {
        let mut sessions = Vec::new();
        if waiting.recv_many(&mut sessions, MOST_USED).await == 0 {
            return;
        }
        let count = sessions.len() as u64;
        let reported = bus
            .call::<SessionsUsed>(&Context::new(DEADLINE), &UsedSessions { sessions })
            .await;
        if let Err(fault) = reported {
            counter!("vmwatch_session_uses_dropped_total").increment(count);
            debug!(
                cause = fault.cause_chain(),
                "reporting uses of sessions failed: {fault}"
            );
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
