//! Publishes live events about the progress of operations and about state changes of VMs, whatever caused them. An
//! event is delivered at most once and never delays what it reports; the durable facts are in the operation records and
//! the audit log.

use std::time::Duration;

use async_nats::{HeaderMap, header::NATS_MESSAGE_ID};
use metrics::counter;
use tokio::time::timeout;
use tracing::debug;
use vmwatch_api::{
    InstanceId,
    events::{LiveEvent, MachineEvent},
    lifecycle::{MachineState, Operation},
    time::unix_millis,
};
use vmwatch_bus::Bus;

/// Deadline for queueing an event on the bus connection, which blocks only if the connection's buffer is full.
const DEADLINE: Duration = Duration::from_secs(1);
/// If several replicas see the same state change within this time (in milliseconds), it is published once.
const SAME_CHANGE_MS: u64 = 10_000;

/// Publishes live events on the bus.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    bus: Bus,
}

impl Events {
    pub(crate) fn new(bus: &Bus) -> Self {
        Self { bus: bus.clone() }
    }

    /// Publishes the progress of an operation. A record that is written again without a change is published only once.
    pub(crate) async fn publish_operation(&self, operation: &Operation) {
        let at = operation.history.last().map_or(0, |event| event.at_ms);
        let id = format!("operation:{}:{}:{at}", operation.id, operation.state);
        self.publish(&LiveEvent::Operation(Box::new(operation.clone())), id)
            .await;
    }

    /// Publishes the state of a VM; `None` if no hypervisor has the VM any more.
    pub(crate) async fn publish_state(&self, instance_id: InstanceId, state: Option<MachineState>) {
        let at_ms = unix_millis();
        let now = state.map_or_else(|| "gone".to_owned(), |state| state.to_string());
        let id = format!("machine:{instance_id}:{now}:{}", at_ms / SAME_CHANGE_MS);
        let event = MachineEvent {
            instance_id,
            at_ms,
            state,
        };
        self.publish(&LiveEvent::Machine(event), id).await;
    }

    async fn publish(&self, event: &LiveEvent, id: String) {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, id);
        // Do not queue events while the bus is unreachable: they would be delivered too late to be useful.
        let sent = self.bus.is_connected() && {
            let body = serde_json::to_vec(event).unwrap_or_default();
            let sending = self.bus.publish(event.subject(), headers, body.into());
            timeout(DEADLINE, sending).await.is_ok_and(|sent| sent.is_ok())
        };
        if !sent {
            counter!("vmwatch_events_lost_total").increment(1);
            debug!(
                kind = event.kind(),
                instance_id = event.instance().map(InstanceId::as_str),
                "publishing a live event failed; the event was dropped"
            );
        }
    }
}
