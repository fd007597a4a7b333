//! Live events: what came of commands, and how machines change, whoever changed them. Told at most once and never in the
//! way of what they tell of; the records and the audit are what lasts.

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

/// Handing a message to the connection takes no time, unless it is full.
const DEADLINE: Duration = Duration::from_secs(1);
/// Replicas that see the same change within this time tell it once, in milliseconds.
const SAME_CHANGE_MS: u64 = 10_000;

/// Where events are told.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    bus: Bus,
    /// Wakes who looks for changes: a command has just changed something.
    changed: Arc<Notify>,
}

impl Events {
    pub(crate) fn new(bus: &Bus) -> Self {
        Self {
            bus: bus.clone(),
            changed: Arc::default(),
        }
    }

    /// Tells how far a command has come. A record that is written again without news is told once.
    pub(crate) async fn tell_operation(&self, operation: &Operation) {
        let at = operation.history.last().map_or(0, |event| event.at_ms);
        let id = format!("operation:{}:{}:{at}", operation.id, operation.state);
        self.tell(&LiveEvent::Operation(Box::new(operation.clone())), id)
            .await;
        if operation.state.is_final() {
            self.changed.notify_one();
        }
    }

    async fn tell_machine(&self, instance_id: InstanceId, state: Option<MachineState>) {
        let at_ms = unix_millis();
        let now = state.map_or_else(|| "gone".to_owned(), |state| state.to_string());
        let id = format!("machine:{instance_id}:{now}:{}", at_ms / SAME_CHANGE_MS);
        let event = MachineEvent {
            instance_id,
            at_ms,
            state,
        };
        self.tell(&LiveEvent::Machine(event), id).await;
    }

    async fn tell(&self, event: &LiveEvent, id: String) {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, id);
        // What is queued while the bus is away would be told long after.
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
            debug!(kind = event.kind(), instance = %event.instance(), "a live event is lost");
        }
    }
}

/// The machines as they were last seen.
#[derive(Debug, Default)]
pub(crate) struct Machines {
    seen: Mutex<Option<HashMap<InstanceId, ListedMachine>>>,
}

impl Machines {
    /// What the hypervisor called the machine when it was last seen.
    pub(crate) fn name(&self, id: &InstanceId) -> Option<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.as_ref()?.get(id).map(|machine| machine.name.clone())
    }

    /// Looks at all machines, again and again and after each command, and tells what has changed, until shutdown.
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
                    events.tell_machine(instance_id, state).await;
                }
                tokio::select! {
                    () = sleep(interval) => {}
                    () = events.changed.notified() => {}
                }
            }
        };
        tokio::spawn(until.run_until_cancelled_owned(watching));
    }

    /// Takes what was listed in place of what was seen; gives back what is different. The first look finds nothing
    /// different, and machines of hypervisors that are silent stay as they were.
    fn take(&self, listing: Listing) -> Vec<(InstanceId, Option<MachineState>)> {
        let mut now: HashMap<_, _> = listing
            .machines
            .into_iter()
            .map(|machine| (machine.instance_id.clone(), machine))
            .collect();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = seen.take() else {
            *seen = Some(now);
            return Vec::new();
        };
        let mut changes: Vec<_> = now
            .values()
            .filter(|machine| {
                before.get(&machine.instance_id).map(|known| known.state) != Some(machine.state)
            })
            .map(|machine| (machine.instance_id.clone(), Some(machine.state)))
            .collect();
        for (id, machine) in before {
            if listing.silent.contains(&machine.hypervisor) {
                now.entry(id).or_insert(machine);
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

    fn listing(machines: &[(&str, &str, MachineState)], silent: &[&str]) -> Listing {
        let machine = |&(id, hypervisor, state): &(&str, &str, MachineState)| ListedMachine {
            instance_id: id.parse().unwrap(),
            name: format!("name of {id}"),
            hypervisor: hypervisor.to_owned(),
            state,
        };
        Listing {
            machines: machines.iter().map(machine).collect(),
            silent: silent.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn only_what_has_changed_is_told() {
        use MachineState::{Running, ShutOff};
        let machines = Machines::default();
        let take = |listed: &[(&str, &str, MachineState)], silent: &[&str]| {
            let mut changes = machines.take(listing(listed, silent));
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
            "who is silent has lost nothing"
        );
        assert_eq!(machines.name(&"b".parse().unwrap()), Some("name of b".to_owned()));
        assert_eq!(take(&[("a", "one", ShutOff)], &[]), [("b".to_owned(), None)]);
        assert_eq!(
            take(&[("a", "one", ShutOff), b], &[]),
            [("b".to_owned(), Some(Running))]
        );
    }
}
