//! Checks VMs whose agents are silent, before an alert says so: an operation may have stopped the VM, or it was
//! removed.

use std::{collections::HashMap, sync::Arc};

use metrics::counter;
use mongodb::bson::doc;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};
use vmwatch_api::{InstanceId, lifecycle::Target, vms::Get, wire::FaultKind};
use vmwatch_bus::Bus;

use super::operations::{self, Operations};
use crate::{known_vms::Power, store::Store};

/// Maximum number of checks at the same time.
const AT_ONCE: usize = 16;
/// Time after which a VM is checked again, in milliseconds.
const AGAIN_MS: u64 = 30_000;
/// Pause after a failed check, in milliseconds, and number of failed checks after which a VM counts as silent.
const RETRY_MS: u64 = 5000;
const MAX_FAILURES: u32 = 6;

/// Why an agent is silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// For no known reason.
    Silent,
    /// An operation stopped the VM.
    Stopped,
    /// The VM was removed from vmwatch.
    Removed,
    /// lifecycle-svc or metrics-svc did not answer.
    Unknown,
}

/// The result of the last check of a VM.
#[derive(Debug, Clone, Copy)]
struct Checked {
    verdict: Verdict,
    power: Power,
    at_ms: u64,
    /// Number of failed checks in a row.
    failures: u32,
}

#[derive(Debug, Default)]
struct Vm {
    last: Option<Checked>,
    is_running: bool,
}

/// The checks of VMs that are silent.
pub(super) struct Checks {
    bus: Bus,
    store: Store,
    operations: Arc<Operations>,
    running: JoinSet<(InstanceId, Power, Verdict)>,
    vms: HashMap<InstanceId, Vm>,
}

impl Checks {
    pub(super) fn new(bus: &Bus, store: &Store, operations: &Arc<Operations>) -> Self {
        Self {
            bus: bus.clone(),
            store: store.clone(),
            operations: Arc::clone(operations),
            running: JoinSet::new(),
            vms: HashMap::new(),
        }
    }

    /// Takes the results of checks that have ended. Returns the VMs that were removed.
    pub(super) fn take_results(&mut self, now_ms: u64) -> Vec<InstanceId> {
        let mut removed = Vec::new();
        while let Some(ended) = self.running.try_join_next() {
            let (vm, power, verdict) = match ended {
                Ok(result) => result,
                Err(error) => {
                    warn!(%error, "a check of a silent VM panicked");
                    // All checks that seem to be running are repeated.
                    self.vms.values_mut().for_each(|vm| vm.is_running = false);
                    continue;
                }
            };
            if verdict == Verdict::Removed {
                info!(%vm, "the VM was removed; its alerts end");
                self.vms.remove(&vm);
                removed.push(vm);
                continue;
            }
            let entry = self.vms.entry(vm).or_default();
            let failures = entry.last.map_or(0, |last| last.failures);
            entry.is_running = false;
            entry.last = Some(Checked {
                verdict,
                power,
                at_ms: now_ms,
                failures: if verdict == Verdict::Unknown {
                    failures + 1
                } else {
                    0
                },
            });
        }
        removed
    }

    /// Forgets old results of VMs that are no longer silent.
    pub(super) fn keep(&mut self, now_ms: u64, is_silent: impl Fn(&InstanceId) -> bool) {
        self.vms.retain(|id, vm| {
            let is_new = vm
                .last
                .is_some_and(|last| now_ms.saturating_sub(last.at_ms) < AGAIN_MS);
            vm.is_running || is_new || is_silent(id)
        });
    }

    /// Why the VM is silent; `None` while that is being checked.
    pub(super) fn verdict(&mut self, vm: &InstanceId, power: Power, now_ms: u64) -> Option<Verdict> {
        if power == Power::On {
            return Some(Verdict::Silent);
        }
        let known = self.vms.get(vm);
        if known.is_some_and(|known| known.is_running) {
            return None;
        }
        let last = known
            .and_then(|known| known.last)
            .filter(|last| last.power == power);
        if let Some(last) = last {
            let age_ms = now_ms.saturating_sub(last.at_ms);
            match last.verdict {
                Verdict::Unknown if last.failures >= MAX_FAILURES => return Some(Verdict::Silent),
                Verdict::Unknown if age_ms < RETRY_MS => return None,
                Verdict::Unknown => {}
                known if age_ms < AGAIN_MS => return Some(known),
                _ => {}
            }
        }
        if self.running.len() < AT_ONCE {
            self.start(vm, power);
        }
        None
    }

    fn start(&mut self, id: &InstanceId, power: Power) {
        self.vms.entry(id.clone()).or_default().is_running = true;
        let (bus, store, operations) = (self.bus.clone(), self.store.clone(), Arc::clone(&self.operations));
        let id = id.clone();
        self.running.spawn(async move {
            let verdict = check(&bus, &store, &operations, &id, power).await;
            (id, power, verdict)
        });
    }
}

async fn check(bus: &Bus, store: &Store, operations: &Operations, vm: &InstanceId, power: Power) -> Verdict {
    if power == Power::Unlisted {
        let target = Target::from(vm.clone());
        let found = bus
            .call::<Get>(&operations::context(operations::DEADLINE), &target)
            .await;
        if found.is_err_and(|fault| fault.kind == FaultKind::NotFound) {
            let deleted = store.progress.delete_one(doc! { "_id": vm.as_str() }).await;
            if let Err(error) = deleted {
                debug!(%error, %vm, "deleting the progress of a removed VM failed; retrying");
                return Verdict::Unknown;
            }
            return Verdict::Removed;
        }
    }
    match operations.has_stopped(vm).await {
        Ok(true) => Verdict::Stopped,
        Ok(false) => Verdict::Silent,
        Err(error) => {
            counter!("vmwatch_alert_sources_failed_total", "source" => "operations").increment(1);
            debug!(%error, %vm, "reading the operations of a silent VM failed; retrying");
            Verdict::Unknown
        }
    }
}
