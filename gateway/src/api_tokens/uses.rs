//! Reports the latest uses of API tokens to auth-svc. Gateways have no permission to write to the KV bucket of tokens.

use std::time::Duration;

use metrics::counter;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use vmwatch_api::api_tokens::{
    ApiTokenId, ApiTokenUse, ApiTokensUsed, MAX_USED_TOKENS, UsedApiToken, UsedApiTokens,
};
use vmwatch_bus::{Bus, Context};

/// Maximum number of uses that wait to be reported.
const QUEUE: usize = 10_000;
/// Interval between reports to auth-svc. A report holds at most [`MAX_USED_TOKENS`] tokens.
const INTERVAL: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_secs(5);

/// Queue of uses of API tokens to report to auth-svc.
#[derive(Debug, Clone)]
pub(super) struct Uses {
    queue: mpsc::Sender<UsedApiToken>,
}

impl Uses {
    /// Starts the task that reports uses until shutdown.
    pub(super) fn report(bus: &Bus, shutdown: CancellationToken) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let bus = bus.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(report(bus, waiting)).await });
        Self { queue }
    }

    /// Queues the use of a token. If the queue is full the use is dropped; the next use a minute later will be
    /// reported.
    pub(super) fn note(&self, id: ApiTokenId, at_ms: u64, source: Option<&str>) {
        let last_use = ApiTokenUse {
            at_ms,
            source: source.map(str::to_owned),
        };
        if self.queue.try_send(UsedApiToken { id, last_use }).is_err() {
            counter!("vmwatch_api_token_uses_dropped_total").increment(1);
        }
    }
}

async fn report(bus: Bus, mut waiting: mpsc::Receiver<UsedApiToken>) {
    loop {
        let mut tokens = Vec::new();
        if waiting.recv_many(&mut tokens, MAX_USED_TOKENS).await == 0 {
            return;
        }
        let count = tokens.len() as u64;
        let reported = bus
            .call::<ApiTokensUsed>(&Context::new(DEADLINE), &UsedApiTokens { tokens })
            .await;
        if let Err(fault) = reported {
            counter!("vmwatch_api_token_uses_dropped_total").increment(count);
            debug!(
                cause = fault.cause_chain(),
                "sending the latest uses of API tokens to auth-svc failed: {fault}"
            );
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
