//! Publishes live events about alerts. An event is delivered at most once and never delays what it reports; the alerts
//! themselves are in the database.

use std::time::Duration;

use async_nats::{HeaderMap, header::NATS_MESSAGE_ID};
use metrics::counter;
use tokio::time::timeout;
use tracing::debug;
use vmwatch_api::{
    alerts::Alert,
    events::{AlertEvent, LiveEvent},
};
use vmwatch_bus::Bus;

/// Deadline for queueing an event on the bus connection, which blocks only if the connection's buffer is full.
const DEADLINE: Duration = Duration::from_secs(1);

/// Publishes live events on the bus.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    bus: Bus,
}

impl Events {
    pub(crate) fn new(bus: &Bus) -> Self {
        Self { bus: bus.clone() }
    }

    /// Publishes an alert after a change.
    pub(crate) async fn publish(&self, alert: &Alert) {
        let event = LiveEvent::Alert(Box::new(AlertEvent {
            instance_id: alert.instance_id.clone(),
            alert: alert.clone(),
        }));
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, format!("alert:{}:{}", alert.id, alert.revision));
        // Do not queue events while the bus is unreachable: they would be delivered too late to be useful.
        let sent = self.bus.is_connected() && {
            // Encoding cannot fail, because all keys are texts.
            let body = serde_json::to_vec(&event).unwrap_or_default();
            let sending = self.bus.publish(event.subject(), headers, body.into());
            timeout(DEADLINE, sending).await.is_ok_and(|sent| sent.is_ok())
        };
        if !sent {
            counter!("vmwatch_events_lost_total").increment(1);
            debug!(alert = %alert.id, "publishing a live event failed; the event was dropped");
        }
    }
}
