//! Judges whether samples flow from the agents to alert-svc.

/// The stream of samples is unreachable if it did not answer for this time.
const UNREACHABLE_MS: u64 = 15_000;
/// Samples wait if the oldest one in the stream is older than this, and if no sample that arrived within this time was
/// evaluated. A single VM above its rate, whose samples wait, is thereby no standstill.
const WAITING_MS: u64 = 60_000;

/// What was last found out about the stream of samples. All times are Unix milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::engine) struct Health {
    /// When the stream last answered, if it did not answer the last request.
    pub(in crate::engine) failing_since_ms: Option<u64>,
    /// When the oldest sample in the stream arrived; `None` if there is none.
    pub(in crate::engine) oldest_ms: Option<u64>,
}

/// What is known about the flow of samples. All times are Unix milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::engine) struct Evidence {
    pub(in crate::engine) health: Health,
    /// When the newest evaluated sample arrived.
    pub(in crate::engine) newest_arrival_ms: u64,
    /// Beginning of a mass silence.
    pub(in crate::engine) mass_since_ms: Option<u64>,
    /// Since when alert-svc itself is late with evaluating records. Then arrivals say little about agents.
    pub(in crate::engine) late_since_ms: Option<u64>,
    /// Whether it is late because the database accepts no writes.
    pub(in crate::engine) is_stuck: bool,
    /// Whether vmwatch received no samples at the last check.
    pub(in crate::engine) was_not_receiving: bool,
}

/// Whether samples flow. All times are Unix milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::engine) struct Flow {
    /// Since when vmwatch receives no samples, as the alert says; `None` if it does.
    pub(in crate::engine) not_receiving_since_ms: Option<u64>,
    /// Since when silence does not count. alert-svc itself being late does not count either, but is no reason for an
    /// alert.
    pub(in crate::engine) stands_since_ms: Option<u64>,
}

impl Flow {
    pub(in crate::engine) fn judge(evidence: Evidence, now_ms: u64) -> Self {
        let Evidence {
            health,
            late_since_ms,
            ..
        } = evidence;
        let unreachable = health
            .failing_since_ms
            .filter(|since_ms| now_ms.saturating_sub(*since_ms) > UNREACHABLE_MS);
        let is_old = |at_ms: u64| now_ms.saturating_sub(at_ms) > WAITING_MS;
        // While alert-svc is late, nothing begins that depends on arrivals.
        let is_late = late_since_ms.is_some();
        let shows_waiting = if is_late {
            evidence.is_stuck || evidence.was_not_receiving
        } else {
            is_old(evidence.newest_arrival_ms)
        };
        let waiting = health
            .oldest_ms
            .filter(|oldest_ms| is_old(*oldest_ms) && shows_waiting);
        let waiting = waiting.map(|oldest_ms| oldest_ms.max(evidence.newest_arrival_ms));
        let mass = evidence
            .mass_since_ms
            .filter(|_| !is_late || evidence.was_not_receiving);
        let not_receiving = [unreachable, waiting, mass].into_iter().flatten().min();
        Self {
            not_receiving_since_ms: not_receiving,
            stands_since_ms: [not_receiving, late_since_ms].into_iter().flatten().min(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000_000;

    fn judge(evidence: Evidence) -> (Option<u64>, Option<u64>) {
        let flow = Flow::judge(evidence, NOW);
        (flow.not_receiving_since_ms, flow.stands_since_ms)
    }

    /// Evidence with these ages, in milliseconds, of the oldest sample in the stream and of the newest evaluated sample.
    fn waiting(oldest: u64, newest: u64) -> Evidence {
        Evidence {
            health: Health {
                failing_since_ms: None,
                oldest_ms: Some(NOW - oldest),
            },
            newest_arrival_ms: NOW - newest,
            ..Evidence::default()
        }
    }

    #[test]
    fn unreachable_stream_is_reported_after_some_time() {
        let failing = |since: u64| Evidence {
            health: Health {
                failing_since_ms: Some(NOW - since),
                oldest_ms: None,
            },
            ..Evidence::default()
        };
        assert_eq!(judge(failing(15_000)), (None, None));
        let since = Some(NOW - 15_001);
        assert_eq!(judge(failing(15_001)), (since, since));
    }

    #[test]
    fn waiting_samples_are_reported_only_if_no_recent_sample_was_evaluated() {
        let since = Some(NOW - 61_000);
        assert_eq!(judge(waiting(61_000, 62_000)), (since, since));
        // The samples of one VM above its rate wait, and all others are stored.
        assert_eq!(judge(waiting(61_000, 5000)), (None, None));
        assert_eq!(judge(waiting(59_000, 500_000)), (None, None));
    }

    #[test]
    fn own_lateness_is_no_alert_but_silence_does_not_count() {
        let late = Some(NOW - 600_000);
        let evidence = Evidence {
            late_since_ms: late,
            mass_since_ms: late,
            ..waiting(500_000, 600_000)
        };
        assert_eq!(judge(evidence), (None, late));
        // If the database accepts no writes, metrics-svc probably stores nothing either.
        let stuck = Evidence {
            is_stuck: true,
            ..evidence
        };
        assert_eq!(judge(stuck).0, Some(NOW - 500_000));
    }

    #[test]
    fn mass_silence_continues_an_outage_without_a_gap() {
        let mass = Some(NOW - 600_000);
        let evidence = Evidence {
            mass_since_ms: mass,
            late_since_ms: Some(NOW - 20_000),
            was_not_receiving: true,
            newest_arrival_ms: NOW - 600_000,
            ..Evidence::default()
        };
        assert_eq!(judge(evidence), (mass, mass));
        let caught_up = Evidence {
            late_since_ms: None,
            ..evidence
        };
        assert_eq!(judge(caught_up), (mass, mass));
    }
}
