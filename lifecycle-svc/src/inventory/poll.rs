//! Polls a hypervisor while this replica holds its lease, and writes into the inventory what has changed.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use metrics::{counter, gauge, histogram};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::{
    InstanceId,
    inventory::{InventoryHypervisor, InventoryKey, InventoryVm, RENEWAL},
    time::unix_millis,
};
use vmwatch_bus::random_id;

use super::{Inventory, lease::Held};
use crate::{
    config::PollSettings,
    driver::{DriverError, Found, MAX_LISTED},
    events::Events,
    fence::LeaseEnd,
    fleet::{Fleet, Hypervisor},
    measures::Measures,
    state_machine,
};

/// Maximum number of concurrent writes to the inventory by one task.
pub(super) const CONCURRENT_WRITES: usize = 32;
/// Interval at which a replica checks whether the lease on a hypervisor is free.
const LEASE_CHECK: Duration = Duration::from_secs(1);
/// Minimum time between two lists of one hypervisor, however many operations end meanwhile.
const MIN_PAUSE: Duration = Duration::from_millis(200);
/// Maximum time from a failed attempt to list the VMs or to check the hypervisor until the next attempt.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// After this many consecutive failures to list the VMs, the replica releases its lease, because another replica may
/// reach the hypervisor.
const MAX_FAILURES: u32 = 3;

/// The polling tasks of this replica, one per hypervisor.
pub(crate) struct Polling(JoinSet<()>);

/// Polls one hypervisor.
struct Poller {
    inventory: Arc<Inventory>,
    hypervisor: Arc<Hypervisor>,
    events: Events,
    measures: Measures,
    settings: PollSettings,
    owner: String,
    /// Time of the last complete list by this replica, in Unix milliseconds; 0 if there was none. The stored time is less
    /// accurate, because it is renewed only once per [`RENEWAL`].
    listed_at_ms: AtomicU64,
}

/// A difference between a list of VMs and the inventory.
struct Change {
    id: InstanceId,
    /// The new record; `None` if the hypervisor no longer has the VM.
    vm: Option<InventoryVm>,
    /// Whether to publish the VM's state as a live event.
    is_event: bool,
}

impl Polling {
    /// Starts polling all hypervisors until shutdown.
    pub(crate) fn start(
        inventory: &Arc<Inventory>,
        fleet: &Fleet,
        events: &Events,
        settings: PollSettings,
        shutdown: &CancellationToken,
    ) -> Self {
        let owner = random_id();
        let mut tasks = JoinSet::new();
        for hypervisor in fleet.hypervisors() {
            let poller = Poller {
                inventory: Arc::clone(inventory),
                hypervisor: Arc::clone(hypervisor),
                events: events.clone(),
                measures: Measures::new(inventory, &hypervisor.name, settings.measures),
                settings,
                owner: owner.clone(),
                listed_at_ms: AtomicU64::new(0),
            };
            let until = shutdown.clone();
            tasks.spawn(async move { poller.run(&until).await });
        }
        Self(tasks)
    }

    /// Waits until the leases have been released after shutdown.
    pub(crate) async fn ended(self) {
        self.0.join_all().await;
    }
}

impl Poller {
    async fn run(&self, shutdown: &CancellationToken) {
        let name = self.hypervisor.name.as_str();
        let polled = gauge!("vmwatch_hypervisor_polled", "hypervisor" => name.to_owned());
        loop {
            polled.set(0.0);
            let Some(mut lease) = shutdown.run_until_cancelled(self.wait_for_lease()).await else {
                return;
            };
            polled.set(1.0);
            let end = Arc::clone(&lease.end);
            tokio::select! {
                () = shutdown.cancelled() => {
                    lease.release().await;
                    return;
                }
                () = lease.keep() => {}
                () = self.measures.run(self.hypervisor.driver.as_ref(), &end) => {}
                () = self.poll_until_unreachable(&end) => {
                    lease.release().await;
                    // Gives the other replicas time to take the lease.
                    shutdown.run_until_cancelled(sleep(LEASE_CHECK * 2)).await;
                }
            }
        }
    }

    /// Waits until the lease is free and takes it. Meanwhile, the reachability of the hypervisor is checked directly
    /// until this replica has reached it once, and then taken from the inventory.
    async fn wait_for_lease(&self) -> Held<'_> {
        let name = self.hypervisor.name.as_str();
        let mut next_check = Instant::now();
        loop {
            let taking = self.inventory.take_lease(name, &self.owner, self.settings.lease);
            if let Some(lease) = taking.await {
                return lease;
            }
            if self.hypervisor.was_reached() {
                match self.inventory.hypervisor(name) {
                    Some(state) if state.reachable && !state.late => self.hypervisor.note_answer(),
                    Some(_) => self
                        .hypervisor
                        .note_failure("another replica cannot list its VMs"),
                    None => {}
                }
            } else if Instant::now() >= next_check {
                match self.hypervisor.driver.check().await {
                    Ok(()) => self.hypervisor.note_answer(),
                    Err(error) => self.hypervisor.note_failure(&error),
                }
                next_check = Instant::now() + RETRY_PAUSE;
            }
            sleep(LEASE_CHECK).await;
        }
    }

    /// Polls the hypervisor every interval, and soon after each operation; returns after repeated failures.
    async fn poll_until_unreachable(&self, lease_end: &LeaseEnd) {
        let mut failures = 0;
        while failures < MAX_FAILURES {
            let began = Instant::now();
            let mut next = began + self.settings.interval;
            if self.poll(lease_end).await.is_ok() {
                failures = 0;
            } else {
                failures += 1;
                next = next.min(began + RETRY_PAUSE);
            }
            let soonest = Instant::now() + MIN_PAUSE;
            tokio::select! {
                () = sleep_until(next.max(soonest)) => {}
                () = self.hypervisor.operation_ended() => sleep_until(soonest).await,
            }
        }
    }

    /// Lists the VMs of the hypervisor and writes what has changed.
    async fn poll(&self, lease_end: &LeaseEnd) -> Result<(), DriverError> {
        let name = &self.hypervisor.name;
        let began = Instant::now();
        let listed = self.list(lease_end).await;
        // If listing the VMs took longer than the lease, another replica may have stored a newer list: discard this
        // one.
        if lease_end.has_passed() {
            return listed.map(drop);
        }
        let result = if listed.is_ok() { "complete" } else { "failed" };
        counter!("vmwatch_hypervisor_lists_total", "hypervisor" => name.clone(), "result" => result)
            .increment(1);
        histogram!("vmwatch_hypervisor_list_seconds", "hypervisor" => name.clone()).record(began.elapsed());
        match listed {
            Ok(found) => {
                self.hypervisor.note_answer();
                if self.store(found).await {
                    let now = unix_millis();
                    self.listed_at_ms.store(now, Ordering::Relaxed);
                    self.write_state(true, false, Some(now)).await;
                }
                Ok(())
            }
            Err(error) => {
                self.hypervisor.note_failure(&error);
                let last = self.listed_at_ms.load(Ordering::Relaxed);
                self.write_state(false, false, (last > 0).then_some(last)).await;
                Err(error)
            }
        }
    }

    /// Lists the VMs. If this takes longer than the interval, the inventory shows that the list is late.
    async fn list(&self, lease_end: &LeaseEnd) -> Result<Vec<Found>, DriverError> {
        let mut listing = self.hypervisor.driver.list();
        tokio::select! {
            listed = &mut listing => return listed,
            () = sleep(self.settings.interval) => {}
        }
        // If the lease has expired because this replica was suspended, another replica polls the hypervisor, so the
        // list is not late.
        if lease_end.has_passed() {
            return listing.await;
        }
        warn!(
            hypervisor = self.hypervisor.name,
            "listing the VMs takes longer than the polling interval; the previous list stays in use"
        );
        let reachable = self.inventory.hypervisor(&self.hypervisor.name);
        let reachable = reachable.is_some_and(|state| state.reachable);
        let ((), listed) = tokio::join!(self.write_state(reachable, true, None), listing);
        listed
    }

    /// Writes the state of the hypervisor, if it has changed or must be renewed. Without `listed_at_ms`, the stored
    /// time of the last complete list is kept.
    async fn write_state(&self, reachable: bool, late: bool, listed_at_ms: Option<u64>) {
        if !self.is_current().await {
            return;
        }
        let known = self.inventory.hypervisor(&self.hypervisor.name);
        let before = known.as_ref().and_then(|known| known.listed_at_ms);
        let state = InventoryHypervisor {
            reachable,
            late,
            listed_at_ms: if reachable {
                listed_at_ms.or(before)
            } else {
                // Another replica may have listed the VMs later than this one.
                listed_at_ms.max(before)
            },
            interval_ms: u64::try_from(self.settings.interval.as_millis()).unwrap_or(u64::MAX),
            keep_ms: u64::try_from(self.settings.last_hypervisor_keep.as_millis()).ok(),
        };
        let renewal = u128::from(state.listed_at_ms.unwrap_or(0).abs_diff(before.unwrap_or(0)));
        let unchanged = known.is_some_and(|mut known| {
            known.listed_at_ms = state.listed_at_ms;
            known == state
        });
        if unchanged && renewal < RENEWAL.as_millis() {
            return;
        }
        let key = InventoryKey::Hypervisor(&self.hypervisor.name);
        if let Err(error) = self.inventory.put(key, &state).await {
            warn!(hypervisor = self.hypervisor.name, %error, "writing the state of a hypervisor failed; retrying at the next poll");
        }
    }

    /// Waits until the table of VMs has all records of the KV bucket; returns false if that failed. Creates the bucket if it
    /// is missing.
    async fn is_current(&self) -> bool {
        if self.inventory.catch_up().await {
            return true;
        }
        if let Err(error) = self.inventory.ensure_buckets(self.settings.replicas).await {
            debug!(%error, "checking the KV bucket of the inventory failed");
        }
        false
    }

    /// Writes the differences between this list and the inventory, and publishes changed states. Returns whether the
    /// inventory now equals the list; if not, the next poll writes the remaining differences.
    async fn store(&self, found: Vec<Found>) -> bool {
        let name = self.hypervisor.name.as_str();
        if found.len() >= MAX_LISTED {
            warn!(
                hypervisor = name,
                most = MAX_LISTED,
                "the hypervisor has more VMs than can be listed; the remaining VMs are missing from the list"
            );
        }
        if !self.is_current().await {
            return false;
        }
        let writing = stream::iter(self.changes(found)).map(|change| self.apply(change));
        let mut writing = writing.buffer_unordered(CONCURRENT_WRITES);
        let (mut failed, mut last) = (0_u32, None);
        while let Some(done) = writing.next().await {
            if let Err(error) = done {
                failed += 1;
                last = Some(error);
            }
        }
        if let Some(error) = last {
            warn!(hypervisor = name, failed, %error, "writing VMs into the inventory failed; retrying at the next poll");
        }
        failed == 0
    }

    /// The differences between this list and the inventory. The first list of a hypervisor publishes no events.
    fn changes(&self, found: Vec<Found>) -> Vec<Change> {
        let name = self.hypervisor.name.as_str();
        let table = self.inventory.vms.read();
        let is_first = table.hypervisor(name).is_none();
        let changed_at_ms = unix_millis();
        let found: HashMap<_, _> = found.into_iter().map(|vm| (vm.id.clone(), vm)).collect();
        let gone = table.vms(name).filter(|(id, _)| !found.contains_key(*id));
        let mut changes: Vec<_> = gone
            .map(|(id, _)| Change {
                id: id.clone(),
                vm: None,
                is_event: !table.is_elsewhere(name, id),
            })
            .collect();
        for (id, vm) in found {
            let known = table.vm(name, &id);
            let known_labels = known.map(|known| &known.labels);
            let labels = match vm.labels {
                Some(found) => {
                    if known_labels != Some(&found.labels) {
                        counter!("vmwatch_hypervisor_labels_omitted_total", "hypervisor" => name.to_owned())
                            .increment(found.omitted);
                    }
                    found.labels
                }
                None => known_labels.cloned().unwrap_or_default(),
            };
            let new = InventoryVm {
                name: vm.name,
                state: vm.state.state,
                labels,
                refused: state_machine::refused(vm.state),
                changed_at_ms,
            };
            if known.is_some_and(|known| known.is_same_as(&new)) {
                continue;
            }
            // A record of an older version has no refusals; adding them is no event.
            let is_changed = known.is_none_or(|known| {
                known.state != new.state || !known.refused.is_empty() && known.refused != new.refused
            });
            changes.push(Change {
                id,
                is_event: is_changed && !is_first,
                vm: Some(new),
            });
        }
        changes
    }

    async fn apply(&self, change: Change) -> Result<(), super::WriteError> {
        let Change { id, vm, is_event } = change;
        let key = InventoryKey::Vm(&self.hypervisor.name, id.clone());
        match &vm {
            Some(vm) => self.inventory.put(key, vm).await?,
            None => self.inventory.delete(key.to_string()).await?,
        }
        if is_event {
            self.events.publish_state(id, vm.map(|vm| vm.state)).await;
        }
        Ok(())
    }
}
