//! When to try again what failed.

use std::time::Duration;

use shared::jitter::jittered;
use tokio::time::Instant;

use crate::publish::Trouble;

/// Without a connection nothing is sent: this is only how soon its return is noticed. Thousands of agents whose
/// server comes back begin to send within it, each at a moment of its own.
const AWAY: Duration = Duration::from_secs(2);
/// Doubled with each failure of the same kind, up to [`MOST`].
const FIRST: Duration = Duration::from_millis(500);
const MOST: Duration = Duration::from_secs(30);
/// A server that takes no more at one moment does so again within milliseconds; doubled up to [`BUSY_MOST`].
const BUSY_FIRST: Duration = Duration::from_millis(20);
const BUSY_MOST: Duration = Duration::from_secs(5);

/// When to try again, and what the trouble is.
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
    /// The first attempt is not at once: there is no connection yet, and agents may have started together.
    pub(crate) fn new() -> Self {
        Self {
            at: Instant::now() + jittered(FIRST, 0.5),
            failing: None,
        }
    }

    /// The moment of the next attempt.
    pub(crate) const fn at(&self) -> Instant {
        self.at
    }

    pub(crate) fn is_due(&self) -> bool {
        self.at <= Instant::now()
    }

    pub(crate) const fn is_failing(&self) -> bool {
        self.failing.is_some()
    }

    /// Notes a failure; true where the one before was of another kind, or there was none.
    pub(crate) fn failed(&mut self, trouble: &Trouble) -> bool {
        let kind = trouble.kind();
        let times = match self.failing {
            Some(before) if before.kind == kind => before.times.saturating_add(1),
            _ => 1,
        };
        let is_new = self.failing.is_none_or(|before| before.kind != kind);
        self.failing = Some(Failing { kind, times });
        let wait = match trouble {
            Trouble::Away => AWAY,
            Trouble::Busy => doubled(BUSY_FIRST, times, BUSY_MOST),
            _ => doubled(FIRST, times, MOST),
        };
        self.later(jittered(wait, 0.25));
        is_new
    }

    /// Notes a success; true where it ended a trouble, which lasts until all that waited is sent. While an agent empties a
    /// long spool, the stream refuses and takes its parts by turns.
    pub(crate) fn succeeded(&mut self, all_sent: bool) -> bool {
        if all_sent {
            return self.failing.take().is_some();
        }
        if let Some(failing) = &mut self.failing {
            failing.times = 0;
        }
        false
    }

    /// Puts the next attempt off.
    pub(crate) fn later(&mut self, wait: Duration) {
        self.at = Instant::now() + wait;
    }
}

/// The wait after so many failures in a row.
fn doubled(first: Duration, times: u32, most: Duration) -> Duration {
    // The exponent is bounded so that the power is.
    most.min(first * 2_u32.pow(times.saturating_sub(1).min(16)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The wait of each of so many failures in a row.
    fn waits(trouble: &Trouble, times: usize) -> Vec<Duration> {
        let mut retry = Retry::new();
        let mut wait = || {
            retry.failed(trouble);
            retry.at().saturating_duration_since(Instant::now())
        };
        (0..times).map(|_| wait()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_doubles_up_to_its_bound_and_is_never_below_a_quarter_of_it() {
        for (times, wait) in (0..).zip(waits(&Trouble::NoStream, 100)) {
            let most = MOST.min(FIRST * 2_u32.pow(times.min(16)));
            assert!(
                (most / 4..=most).contains(&wait),
                "{wait:?} after {times} of {most:?}"
            );
        }
        assert!(waits(&Trouble::Away, 100).iter().all(|wait| *wait <= AWAY));
        let busy = waits(&Trouble::Busy, 100);
        assert!(busy[0] <= BUSY_FIRST && busy.iter().all(|wait| *wait <= BUSY_MOST));
    }

    #[tokio::test(start_paused = true)]
    async fn a_trouble_is_told_once_and_another_begins_anew() {
        let mut retry = Retry::new();
        assert!(!retry.is_due() && !retry.is_failing());
        tokio::time::advance(FIRST).await;
        assert!(retry.is_due());
        assert!(retry.failed(&Trouble::NoStream));
        assert!(!retry.failed(&Trouble::NoStream));
        assert!(retry.is_failing() && !retry.is_due());
        assert!(retry.failed(&Trouble::Unanswered));
        assert!(retry.at() <= Instant::now() + FIRST);
        assert!(retry.succeeded(true));
        assert!(!retry.succeeded(true) && !retry.is_failing());
    }

    #[tokio::test(start_paused = true)]
    async fn a_trouble_lasts_until_all_is_sent_and_a_success_shortens_the_wait() {
        let mut retry = Retry::new();
        for _ in 0..10 {
            retry.failed(&Trouble::ShareFull);
        }
        assert!(!retry.succeeded(false) && retry.is_failing());
        assert!(!retry.failed(&Trouble::ShareFull), "it was logged before");
        assert!(retry.at() <= Instant::now() + FIRST);
        assert!(retry.succeeded(true));
    }
}
