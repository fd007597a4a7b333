//! Measures the difference between the clocks of this machine and NATS. Deadlines of requests are absolute: if clocks
//! differ by more than the shortest deadline, every request is late, or runs after its caller has given up.

use std::time::Duration;

use jiff::Timestamp;
use metrics::gauge;
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Bus;

/// Interval between measurements.
const INTERVAL: Duration = Duration::from_secs(30);
/// Wait after a failed measurement, such as before the stream exists.
const RETRY: Duration = Duration::from_secs(1);
/// Answers that take longer are too inaccurate and are discarded.
const LIMIT: Duration = Duration::from_secs(1);
/// Differences from here on are logged: a tenth of the shortest deadline of a request, five seconds.
const NOTABLE_SECONDS: f64 = 0.5;

/// The server's timestamp in an answer of JetStream.
#[derive(Deserialize)]
struct Answered {
    ts: String,
}

/// Measures in the background until shutdown. The program needs permission to request the state of this stream.
pub fn watch(bus: &Bus, stream: &str, shutdown: CancellationToken) {
    let (bus, request) = (bus.clone(), format!("STREAM.INFO.{stream}"));
    let measuring = async move {
        loop {
            let pause = if let Some(seconds) = skew_seconds(&bus, &request).await {
                gauge!("vmwatch_clock_skew_seconds").set(seconds);
                if seconds.abs() >= NOTABLE_SECONDS {
                    warn!(
                        seconds,
                        "the clock of this machine differs from the clock of NATS"
                    );
                }
                INTERVAL
            } else {
                debug!("clock measurement failed; retrying");
                RETRY
            };
            sleep(pause).await;
        }
    };
    tokio::spawn(async move { shutdown.run_until_cancelled(measuring).await });
}

/// How far the local clock is ahead; the error is at most half of the round trip.
async fn skew_seconds(bus: &Bus, request: &str) -> Option<f64> {
    let (asked, started) = (Timestamp::now(), Instant::now());
    let Answered { ts } = bus.jetstream_api(request, LIMIT).await.ok()?;
    let there: Timestamp = ts.parse().ok()?;
    Some(ahead(asked, started.elapsed(), there))
}

/// Assumes that the answer was made half-way through the round trip.
fn ahead(asked: Timestamp, took: Duration, there: Timestamp) -> f64 {
    asked.duration_since(there).as_secs_f64() + took.as_secs_f64() / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subtracts_half_of_the_round_trip_from_skew() {
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
