//! Decides when a failed publish is retried.

use std::time::Duration;

use tokio::time::Instant;
use vmwatch_service::jitter::jittered;

use crate::publish::PublishError;

/// Interval between checks for a connection to NATS while there is none. The interval is random within limits, so after
/// an outage thousands of agents do not send their first messages at once.
const DISCONNECTED: Duration = Duration::from_secs(2);
/// Wait after the first failure. It doubles with each further failure of the same kind, up to [`MAX`].
const FIRST: Duration = Duration::from_millis(500);
const MAX: Duration = Duration::from_secs(30);
/// Wait after the first attempt that failed because NATS is busy. NATS is usually ready again within milliseconds. The
/// wait doubles with each further such failure, up to [`BUSY_MAX`].
const BUSY_FIRST: Duration = Duration::from_millis(10);
const BUSY_MAX: Duration = Duration::from_millis(500);

/// When the next attempt to publish takes place, and the failure that it retries.
#[derive(Debug)]
pub(crate) struct Retry {
    at: Instant,
    failing: Option<Failing>,
}

#[derive(Debug, Clone, Copy)]
struct Failing {
    kind: &'static str,
    times: u32,
}

impl Retry {
    /// Delays the first attempt by a random time, because there is no connection to NATS yet and many agents may start
    /// at the same time.
    pub(crate) fn new() -> Self {
        Self {
            at: Instant::now() + jittered(FIRST, 0.5),
            failing: None,
        }
    }

    /// The time of the next attempt to publish.
    pub(crate) const fn at(&self) -> Instant {
        self.at
    }

    pub(crate) fn is_due(&self) -> bool {
        self.at <= Instant::now()
    }

    pub(crate) const fn is_failing(&self) -> bool {
        self.failing.is_some()
    }

    /// Records a failed attempt. Returns true if the failure is of another kind than the previous one, or is the first.
    pub(crate) fn failed(&mut self, error: &PublishError) -> bool {
        let kind = error.kind();
        let times = match self.failing {
            Some(before) if before.kind == kind => before.times.saturating_add(1),
            _ => 1,
        };
        let is_new = self.failing.is_none_or(|before| before.kind != kind);
        self.failing = Some(Failing { kind, times });
        let wait = match error {
            PublishError::Disconnected => DISCONNECTED,
            PublishError::Busy => doubled(BUSY_FIRST, times, BUSY_MAX),
            _ => doubled(FIRST, times, MAX),
        };
        self.later(jittered(wait, 0.25));
        is_new
    }

    /// Records a successful attempt. Returns true if it ended a series of failures. A series ends only when all queued
    /// sample parts have been sent: while an agent empties a long spool, JetStream alternately rejects and accepts its
    /// messages.
    pub(crate) fn succeeded(&mut self, all_sent: bool) -> bool {
        if all_sent {
            return self.failing.take().is_some();
        }
        if let Some(failing) = &mut self.failing {
            failing.times = 0;
        }
        false
    }

    /// Postpones the next attempt to publish.
    pub(crate) fn later(&mut self, wait: Duration) {
        self.at = Instant::now() + wait;
    }
}

/// The wait after `times` consecutive failures: it starts with `first` and doubles up to `most`.
fn doubled(first: Duration, times: u32, most: Duration) -> Duration {
    // The exponent is limited to avoid an arithmetic overflow.
    most.min(first * 2_u32.pow(times.saturating_sub(1).min(16)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The waits after each of the first `times` consecutive failures.
    fn waits(error: &PublishError, times: usize) -> Vec<Duration> {
        let mut retry = Retry::new();
        let mut wait = || {
            retry.failed(error);
            retry.at().saturating_duration_since(Instant::now())
        };
        (0..times).map(|_| wait()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn retry_wait_doubles_up_to_a_limit() {
        for (times, wait) in (0..).zip(waits(&PublishError::NoStream, 100)) {
            let most = MAX.min(FIRST * 2_u32.pow(times.min(16)));
            assert!(
                (most / 4..=most).contains(&wait),
                "the wait after {times} failures is {wait:?}, with a limit of {most:?}"
            );
        }
        assert!(
            waits(&PublishError::Disconnected, 100)
                .iter()
                .all(|wait| *wait <= DISCONNECTED)
        );
        let busy = waits(&PublishError::Busy, 100);
        assert!(busy[0] <= BUSY_FIRST && busy.iter().all(|wait| *wait <= BUSY_MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn each_kind_of_publish_failure_is_reported_once_and_resets_the_wait() {
        let mut retry = Retry::new();
        assert!(!retry.is_due() && !retry.is_failing());
        tokio::time::advance(FIRST).await;
        assert!(retry.is_due());
        assert!(retry.failed(&PublishError::NoStream));
        assert!(!retry.failed(&PublishError::NoStream));
        assert!(retry.is_failing() && !retry.is_due());
        assert!(retry.failed(&PublishError::Unanswered));
        assert!(retry.at() <= Instant::now() + FIRST);
        assert!(retry.succeeded(true));
        assert!(!retry.succeeded(true) && !retry.is_failing());
    }

    #[tokio::test(start_paused = true)]
    async fn publish_failure_ends_only_when_all_parts_are_sent() {
        let mut retry = Retry::new();
        for _ in 0..10 {
            retry.failed(&PublishError::ShareFull);
        }
        assert!(!retry.succeeded(false) && retry.is_failing());
        assert!(
            !retry.failed(&PublishError::ShareFull),
            "the failure was already reported"
        );
        assert!(retry.at() <= Instant::now() + FIRST);
        assert!(retry.succeeded(true));
    }
}
