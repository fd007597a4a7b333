//! Reports to auth-svc which sessions were used, so that sessions in use do not expire as idle. Gateways themselves
//! have no permission to write to the KV bucket of sessions.

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

/// Maximum number of session uses that wait to be reported.
const QUEUE: usize = 10_000;
/// Interval between reports to auth-svc. A report holds at most [`MOST_USED`] sessions.
const INTERVAL: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_secs(5);

/// Queue of session uses to report to auth-svc.
#[derive(Debug, Clone)]
pub(super) struct Uses {
    queue: mpsc::Sender<UsedSession>,
}

impl Uses {
    /// Starts the task that reports session uses until shutdown.
    pub(super) fn report(bus: &Bus, shutdown: CancellationToken) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let bus = bus.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(report(bus, waiting)).await });
        Self { queue }
    }

    /// Queues the use of a session. If the queue is full the use is dropped; a later use will be reported well before
    /// the session expires.
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
                "sending the times of last use of sessions to auth-svc failed: {fault}"
            );
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
