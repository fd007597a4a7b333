//! Publishes live events about the progress of operations and about state changes of VMs, whatever caused them. An
//! event is delivered at most once and never delays what it reports; the durable facts are in the operation records and
//! the audit log.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::{HeaderMap, header::NATS_MESSAGE_ID};
use metrics::counter;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;
use vmwatch_api::{
    InstanceId,
    events::{LiveEvent, MachineEvent},
    lifecycle::{ListedMachine, MachineState, Operation},
    time::unix_millis,
};
use vmwatch_bus::Bus;

use crate::fleet::{Fleet, Listing};

/// Deadline for queueing an event on the bus connection, which blocks only if the connection's buffer is full.
const DEADLINE: Duration = Duration::from_secs(1);
/// If several replicas see the same state change within this time (in milliseconds), it is published once.
const SAME_CHANGE_MS: u64 = 10_000;

/// Publishes live events on the bus.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    bus: Bus,
    /// Wakes the task that polls the states of all VMs, after an operation has ended.
    changed: Arc<Notify>,
}

impl Events {
    pub(crate) fn new(bus: &Bus) -> Self {
        Self {
            bus: bus.clone(),
            changed: Arc::default(),
        }
    }

    /// Publishes the progress of an operation. A record that is written again without a change is published only once.
    pub(crate) async fn publish_operation(&self, operation: &Operation) {
        let at = operation.history.last().map_or(0, |event| event.at_ms);
        let id = format!("operation:{}:{}:{at}", operation.id, operation.state);
        self.publish(&LiveEvent::Operation(Box::new(operation.clone())), id)
            .await;
        if operation.state.is_final() {
            self.changed.notify_one();
        }
    }

    async fn publish_state(&self, instance_id: InstanceId, state: Option<MachineState>) {
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
            let sending = self
                .bus
                .client()
                .publish_with_headers(event.subject(), headers, body.into());
            timeout(DEADLINE, sending).await.is_ok_and(|sent| sent.is_ok())
        };
        if !sent {
            counter!("vmwatch_events_lost_total").increment(1);
            debug!(kind = event.kind(), instance = %event.instance(), "publishing a live event failed; the event was dropped");
        }
    }
}

/// The VMs and states in the last list from the hypervisors.
#[derive(Debug, Default)]
pub(crate) struct ObservedVms {
    seen: Mutex<Option<HashMap<InstanceId, ListedMachine>>>,
}

impl ObservedVms {
    /// Name of the VM when it was last listed.
    pub(crate) fn name(&self, id: &InstanceId) -> Option<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.as_ref()?.get(id).map(|vm| vm.name.clone())
    }

    /// Lists all VMs periodically and after each operation, and publishes state changes, until shutdown.
    pub(crate) fn watch(
        self: &Arc<Self>,
        fleet: Arc<Fleet>,
        events: Events,
        interval: Duration,
        shutdown: &CancellationToken,
    ) {
        let (this, until) = (Arc::clone(self), shutdown.clone());
        let watching = async move {
            loop {
                for (instance_id, state) in this.take(fleet.list().await) {
                    events.publish_state(instance_id, state).await;
                }
                tokio::select! {
                    () = sleep(interval) => {}
                    () = events.changed.notified() => {}
                }
            }
        };
        tokio::spawn(until.run_until_cancelled_owned(watching));
    }

    /// Replaces the known VMs by those of a new list and returns the VMs whose state differs. The first list gives no
    /// differences, and VMs of unreachable hypervisors are kept unchanged.
    fn take(&self, listing: Listing) -> Vec<(InstanceId, Option<MachineState>)> {
        let mut now: HashMap<_, _> = listing
            .vms
            .into_iter()
            .map(|vm| (vm.instance_id.clone(), vm))
            .collect();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = seen.take() else {
            *seen = Some(now);
            return Vec::new();
        };
        let mut changes: Vec<_> = now
            .values()
            .filter(|vm| before.get(&vm.instance_id).map(|known| known.state) != Some(vm.state))
            .map(|vm| (vm.instance_id.clone(), Some(vm.state)))
            .collect();
        for (id, vm) in before {
            if listing.unreachable.contains(&vm.hypervisor) {
                now.entry(id).or_insert(vm);
            } else if !now.contains_key(&id) {
                changes.push((id, None));
            }
        }
        *seen = Some(now);
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(vms: &[(&str, &str, MachineState)], unreachable: &[&str]) -> Listing {
        let vm = |&(id, hypervisor, state): &(&str, &str, MachineState)| ListedMachine {
            instance_id: id.parse().unwrap(),
            name: format!("name of {id}"),
            hypervisor: hypervisor.to_owned(),
            state,
        };
        Listing {
            vms: vms.iter().map(vm).collect(),
            unreachable: unreachable.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn live_events_are_published_only_for_changed_vms() {
        use MachineState::{Running, ShutOff};
        let vms = ObservedVms::default();
        let take = |listed: &[(&str, &str, MachineState)], unreachable: &[&str]| {
            let mut changes = vms.take(listing(listed, unreachable));
            changes.sort_by(|(one, _), (other, _)| one.cmp(other));
            changes
                .into_iter()
                .map(|(id, state)| (id.to_string(), state))
                .collect::<Vec<_>>()
        };
        let (a, b) = (("a", "one", Running), ("b", "two", Running));
        assert_eq!(take(&[a, b], &[]), []);
        assert_eq!(take(&[a, b], &[]), []);
        assert_eq!(
            take(&[("a", "one", ShutOff), b], &[]),
            [("a".to_owned(), Some(ShutOff))]
        );
        assert_eq!(
            take(&[("a", "one", ShutOff)], &["two"]),
            [],
            "the VMs of an unreachable hypervisor must be kept"
        );
        assert_eq!(vms.name(&"b".parse().unwrap()), Some("name of b".to_owned()));
        assert_eq!(take(&[("a", "one", ShutOff)], &[]), [("b".to_owned(), None)]);
        assert_eq!(
            take(&[("a", "one", ShutOff), b], &[]),
            [("b".to_owned(), Some(Running))]
        );
    }
}
