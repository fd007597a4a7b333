//! Logs hourly that NATS refuses the samples of this VM because its share of the stream of samples is full.

use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use crate::publish::PublishError;

const INTERVAL: Duration = Duration::from_hours(1);

/// The refusals since the last log message.
#[derive(Debug, Default)]
pub(crate) struct ShareFull {
    logged_at: Option<Instant>,
    refusals: u64,
}

impl ShareFull {
    /// Counts a refusal, and logs the refusals at most once per hour.
    pub(crate) fn refused(&mut self) {
        if let Some(refusals) = self.count() {
            warn!(
                refusals,
                "{}; if this lasts although metrics-svc runs, report less (VMWATCH_AGENT_PROCESSES, VMWATCH_AGENT_PROCESS_INTERVAL) \
                 or raise the limits of a VM in the settings of metrics-svc; logged at most once per hour",
                PublishError::ShareFull
            );
        }
    }

    /// The number of refusals to log; `None` if the last message is less than an hour old.
    fn count(&mut self) -> Option<u64> {
        self.refusals += 1;
        let now = Instant::now();
        if self.logged_at.is_some_and(|at| now < at + INTERVAL) {
            return None;
        }
        self.logged_at = Some(now);
        Some(std::mem::take(&mut self.refusals))
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn refusals_are_logged_once_per_hour() {
        let mut share = ShareFull::default();
        let counts: Vec<_> = (0..5).filter_map(|_| share.count()).collect();
        assert_eq!(counts, [1]);
        advance(INTERVAL.saturating_sub(Duration::from_millis(1))).await;
        assert_eq!(share.count(), None);
        advance(Duration::from_millis(1)).await;
        assert_eq!(share.count(), Some(6));
        assert_eq!(share.count(), None);
    }
}
