//! How far this machine's clock is from that of NATS. Deadlines of requests are absolute: clocks that differ by more
//! than the shortest deadline make every request late, or let one run after its caller has given up.

use std::time::Duration;

use jiff::Timestamp;
use metrics::gauge;
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Bus;

/// How often it is measured.
const INTERVAL: Duration = Duration::from_secs(30);
/// After a failure, such as before the stream is made.
const RETRY: Duration = Duration::from_secs(1);
/// An answer that takes longer is no measure.
const LIMIT: Duration = Duration::from_secs(1);
/// From here on it is in the log: a tenth of the shortest deadline of a request, five seconds.
const NOTABLE_SECONDS: f64 = 0.5;

/// The part of JetStream's answer that says when it was given.
#[derive(Deserialize)]
struct Answered {
    ts: String,
}

/// Measures until shutdown, in the background. The program must be allowed to ask for the state of this stream.
pub fn watch(bus: &Bus, stream: &str, shutdown: CancellationToken) {
    let (bus, request) = (bus.clone(), format!("STREAM.INFO.{stream}"));
    let measuring = async move {
        loop {
            let pause = if let Some(seconds) = skew_seconds(&bus, &request).await {
                gauge!("vmwatch_clock_skew_seconds").set(seconds);
                if seconds.abs() >= NOTABLE_SECONDS {
                    warn!(seconds, "this machine's clock differs from that of NATS");
                }
                INTERVAL
            } else {
                debug!("the clock of NATS could not be read; retrying");
                RETRY
            };
            sleep(pause).await;
        }
    };
    tokio::spawn(async move { shutdown.run_until_cancelled(measuring).await });
}

/// How far this clock is ahead, within half of what the answer took.
async fn skew_seconds(bus: &Bus, request: &str) -> Option<f64> {
    let (asked, started) = (Timestamp::now(), Instant::now());
    let Answered { ts } = bus.jetstream_api(request, LIMIT).await.ok()?;
    let there: Timestamp = ts.parse().ok()?;
    Some(ahead(asked, started.elapsed(), there))
}

/// The answer was given about half-way.
fn ahead(asked: Timestamp, took: Duration, there: Timestamp) -> f64 {
    asked.duration_since(there).as_secs_f64() + took.as_secs_f64() / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_round_trip_is_not_skew() {
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
