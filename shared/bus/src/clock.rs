//! Measures the difference between the clocks of this machine and of the NATS server. Request deadlines are absolute
//! times: if clocks differ by more than the shortest time limit, either every request counts as late, or requests run
//! after their caller has given up.

use std::{
    borrow::Cow,
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use metrics::gauge;
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Bus;

/// Interval between measurements of the clock difference.
const INTERVAL: Duration = Duration::from_secs(30);
/// Wait after a failed measurement. Measurements fail, for example, until the stream whose state is requested has been
/// created.
const RETRY: Duration = Duration::from_secs(1);
/// If the server's answer takes longer than this, the measurement is too inaccurate and is discarded.
const LIMIT: Duration = Duration::from_secs(1);
/// Clock differences from this value on are logged. The value is a tenth of five seconds, the shortest time limit of a
/// request.
const NOTABLE_SECONDS: f64 = 0.5;
/// Clock difference in milliseconds from which on a program is not ready: the shortest time limit of a request.
const MAX_MILLIS: i64 = 5000;
/// Interval between measurements while the program is not ready because of its clock.
const WRONG_INTERVAL: Duration = Duration::from_secs(5);

/// By how much the local clock is ahead of the NATS server's, in milliseconds; 0 until it is measured.
#[derive(Debug, Default)]
pub(super) struct ClockDifference(AtomicI64);

impl ClockDifference {
    fn set(&self, seconds: f64) {
        let millis = SignedDuration::try_from_secs_f64(seconds).map_or(i64::MAX, |ahead| {
            i64::try_from(ahead.as_millis()).unwrap_or(i64::MAX)
        });
        self.0.store(millis, Ordering::Relaxed);
    }

    /// Fails if the clock is so wrong that requests fail or run after their callers have given up.
    pub(super) fn check(&self) -> Result<(), Cow<'static, str>> {
        let millis = self.0.load(Ordering::Relaxed);
        if millis.abs() < MAX_MILLIS {
            return Ok(());
        }
        let (whole, tenths) = (millis.abs() / 1000, millis.abs() % 1000 / 100);
        let direction = if millis > 0 { "ahead of" } else { "behind" };
        Err(format!(
            "the clock of this machine is {whole}.{tenths} s {direction} the clock of NATS; synchronize both with NTP"
        )
        .into())
    }
}

/// The timestamp that JetStream includes in its answers.
#[derive(Deserialize)]
struct Answered {
    ts: String,
}

/// Measures the clock difference in the background until shutdown, by requests for the state of `stream`. The program's
/// NATS user needs permission for these requests.
pub fn watch(bus: &Bus, stream: &str, shutdown: CancellationToken) {
    let (bus, request) = (bus.clone(), format!("STREAM.INFO.{stream}"));
    let measuring = async move {
        loop {
            let pause = if let Some(seconds) = skew_seconds(&bus, &request).await {
                gauge!("vmwatch_clock_skew_seconds").set(seconds);
                bus.clock.set(seconds);
                if seconds.abs() >= NOTABLE_SECONDS {
                    warn!(
                        seconds,
                        "the clock of this machine differs from the clock of NATS"
                    );
                }
                if bus.clock.check().is_ok() {
                    INTERVAL
                } else {
                    WRONG_INTERVAL
                }
            } else {
                debug!("failed to compare the clock of this machine with the clock of NATS; retrying");
                RETRY
            };
            sleep(pause).await;
        }
    };
    tokio::spawn(async move { shutdown.run_until_cancelled(measuring).await });
}

/// By how much the local clock is ahead of the server's, in seconds; the error is at most half of the round trip.
async fn skew_seconds(bus: &Bus, request: &str) -> Option<f64> {
    let (asked, started) = (Timestamp::now(), Instant::now());
    let Answered { ts } = bus.jetstream_api(request, LIMIT).await.ok()?;
    let there: Timestamp = ts.parse().ok()?;
    Some(ahead(asked, started.elapsed(), there))
}

/// Assumes that the server read its clock in the middle of the round trip.
fn ahead(asked: Timestamp, took: Duration, there: Timestamp) -> f64 {
    asked.duration_since(there).as_secs_f64() + took.as_secs_f64() / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_with_wrong_clock_is_not_ready() {
        let clock = ClockDifference::default();
        for seconds in [0.0, 4.999, -4.999] {
            clock.set(seconds);
            assert_eq!(clock.check(), Ok(()), "{seconds}");
        }
        for (seconds, expected) in [(5.0, "5.0 s ahead of"), (-3600.25, "3600.2 s behind")] {
            clock.set(seconds);
            let reason = clock.check().unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
    }

    #[test]
    fn clock_difference_is_corrected_by_half_of_the_round_trip() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let asked = at("2026-11-26T12:00:00Z");
        let took = Duration::from_millis(200);
        for (there, expected) in [
            ("2026-11-26T12:00:00.1Z", 0.0),
            ("2026-11-26T12:00:05.1Z", -5.0),
            ("2026-11-26T11:59:58.1Z", 2.0),
        ] {
            let found = ahead(asked, took, at(there));
            assert!((found - expected).abs() < 1e-6, "{there}: {found}");
        }
    }
}
