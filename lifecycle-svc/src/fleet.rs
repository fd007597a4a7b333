//! All configured hypervisors: finds the one that runs a VM, and keeps a hanging hypervisor from delaying the others.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use moka::sync::Cache;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::{
    InstanceId,
    lifecycle::{ListedMachine, MachineState},
};

use crate::{
    config::{CallLimits, HypervisorSpec},
    driver::{self, Driver, DriverError, TlsError},
    fence::Fence,
    state_machine::Action,
};

/// Size of the cache of VM locations: about 10 MB at most.
const REMEMBERED: u64 = 100_000;
/// For this long a read first asks the hypervisor that last had the VM, before it asks all.
const SEEN_FOR: Duration = Duration::from_mins(5);
/// How long an operation waits for the other hypervisors once one has reported the VM. A hypervisor that takes longer
/// is not waited for again until it has answered a call, so that a hanging host does not delay every operation.
const OTHERS_WAIT: Duration = Duration::from_millis(500);
/// Interval of the health check of each hypervisor.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// All hypervisors of this service.
#[derive(Debug)]
pub(crate) struct Fleet {
    hypervisors: Vec<Arc<Hypervisor>>,
    seen: Cache<InstanceId, Arc<Hypervisor>>,
}

/// A configured hypervisor.
#[derive(Debug)]
pub(crate) struct Hypervisor {
    pub(crate) name: String,
    pub(crate) driver: Arc<dyn Driver>,
    reachable: AtomicBool,
    /// Whether it exceeded [`OTHERS_WAIT`] and has not answered any call since.
    unresponsive: AtomicBool,
    /// The VMs that it had according to its last answers: at most as many as one hypervisor lists.
    vms: Mutex<HashSet<InstanceId>>,
}

/// The hypervisor that has a VM, and the VM's state.
#[derive(Debug)]
pub(crate) struct Located {
    pub(crate) hypervisor: Arc<Hypervisor>,
    pub(crate) state: MachineState,
}

/// Why no hypervisor can be chosen to act on a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OwnerError {
    /// No hypervisor has the VM, or one that may have it is unreachable.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// Several hypervisors have the VM. Nothing is done whatever their states: two copies must never write to one disk.
    #[error("the VM is defined on {}; remove it from all but one of them", .0.join(" and "))]
    Several(Vec<String>),
    /// Another hypervisor had the VM and is unreachable now.
    #[error("{0} is unreachable and had this VM when it last answered, so that it may still run there")]
    LastOn(String),
}

/// All VMs of the hypervisors that answered, and the names of those that did not.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) vms: Vec<ListedMachine>,
    pub(crate) unreachable: Vec<String>,
}

impl Fleet {
    pub(crate) fn open(specs: Vec<HypervisorSpec>, limits: CallLimits) -> Result<Self, TlsError> {
        let open = |spec: HypervisorSpec| -> Result<_, TlsError> {
            Ok(Arc::new(Hypervisor {
                name: spec.name,
                driver: driver::open(spec.endpoint, limits)?,
                reachable: AtomicBool::new(false),
                unresponsive: AtomicBool::new(false),
                vms: Mutex::default(),
            }))
        };
        Ok(Self {
            hypervisors: specs.into_iter().map(open).collect::<Result<_, _>>()?,
            seen: Cache::builder()
                .max_capacity(REMEMBERED)
                .time_to_live(SEEN_FOR)
                .build(),
        })
    }

    /// Finds the VM for an operation: asks every hypervisor and refuses if several have it. With `starting` it also
    /// refuses while a hypervisor that had the VM is unreachable.
    pub(crate) async fn owner(&self, id: &InstanceId, starting: bool) -> Result<Located, OwnerError> {
        let mut answers: FuturesUnordered<_> = self
            .hypervisors
            .iter()
            .map(|hypervisor| async move { (hypervisor, hypervisor.state(id).await) })
            .collect();
        let mut owners = Vec::new();
        let mut unanswered: Vec<_> = self.hypervisors.iter().collect();
        let mut failure = DriverError::NotFound;
        let mut end = None;
        loop {
            let all_unresponsive = unanswered.iter().all(|hypervisor| hypervisor.is_unresponsive());
            let next = match end {
                None => answers.next().await,
                // Take answers that have arrived already, without waiting for more.
                Some(_) if all_unresponsive => answers.next().now_or_never().flatten(),
                Some(end) => timeout_at(end, answers.next()).await.ok().flatten(),
            };
            let Some((hypervisor, answer)) = next else { break };
            match answer {
                Ok(state) => {
                    let hypervisor = Arc::clone(hypervisor);
                    owners.push(Located { hypervisor, state });
                    end.get_or_insert_with(|| Instant::now() + OTHERS_WAIT);
                }
                Err(DriverError::NotFound) => {}
                Err(error) => {
                    failure = hypervisor.report_failure(&error);
                    continue;
                }
            }
            unanswered.retain(|other| !Arc::ptr_eq(other, hypervisor));
        }
        for hypervisor in &unanswered {
            hypervisor.unresponsive.store(true, Ordering::Relaxed);
        }
        let last_on = unanswered.into_iter().find(|hypervisor| hypervisor.had_vm(id));
        match (owners.pop(), last_on) {
            // The VM may be on a hypervisor that did not answer.
            (None, _) => Err(failure.into()),
            (Some(last), _) if !owners.is_empty() => {
                owners.push(last);
                Err(OwnerError::Several(self.names(&owners)))
            }
            (Some(_), Some(hypervisor)) if starting => Err(OwnerError::LastOn(hypervisor.name.clone())),
            (Some(owner), _) => {
                self.seen.insert(id.clone(), Arc::clone(&owner.hypervisor));
                Ok(owner)
            }
        }
    }

    /// The names of these hypervisors, in the order of the settings.
    fn names(&self, owners: &[Located]) -> Vec<String> {
        let is_owner = |hypervisor: &&Arc<Hypervisor>| {
            owners
                .iter()
                .any(|owner| Arc::ptr_eq(&owner.hypervisor, hypervisor))
        };
        let names = self.hypervisors.iter().filter(is_owner);
        names.map(|hypervisor| hypervisor.name.clone()).collect()
    }

    /// Finds the VM for a read: asks the hypervisor that last had it, then all of them concurrently.
    pub(crate) async fn locate(&self, id: &InstanceId) -> Result<Located, DriverError> {
        if let Some(hypervisor) = self.seen.get(id) {
            match hypervisor.state(id).await {
                Err(DriverError::NotFound) => self.seen.invalidate(id),
                answer => return answer.map(|state| Located { hypervisor, state }),
            }
        }
        let mut answers: FuturesUnordered<_> = self
            .hypervisors
            .iter()
            .map(|hypervisor| async move { (hypervisor, hypervisor.state(id).await) })
            .collect();
        let mut failure = None;
        while let Some((hypervisor, answer)) = answers.next().await {
            match answer {
                Ok(state) => {
                    let hypervisor = Arc::clone(hypervisor);
                    self.seen.insert(id.clone(), Arc::clone(&hypervisor));
                    return Ok(Located { hypervisor, state });
                }
                Err(DriverError::NotFound) => {}
                Err(error) => failure = Some(hypervisor.report_failure(&error)),
            }
        }
        // The VM may be on a hypervisor that did not answer.
        Err(failure.unwrap_or(DriverError::NotFound))
    }

    /// All VMs of all hypervisors that answer.
    pub(crate) async fn list(&self) -> Listing {
        let mut answers: FuturesUnordered<_> = self
            .hypervisors
            .iter()
            .map(|hypervisor| async move { (hypervisor, hypervisor.driver.list().await) })
            .collect();
        let mut listing = Listing::default();
        while let Some((hypervisor, answer)) = answers.next().await {
            match answer {
                Ok(found) => {
                    hypervisor.unresponsive.store(false, Ordering::Relaxed);
                    *hypervisor.lock_vms() = found.iter().map(|vm| vm.id.clone()).collect();
                    let listed = found.into_iter().map(|vm| ListedMachine {
                        instance_id: vm.id,
                        name: vm.name,
                        hypervisor: hypervisor.name.clone(),
                        state: vm.state,
                    });
                    listing.vms.extend(listed);
                }
                Err(error) => {
                    warn!(hypervisor = hypervisor.name, %error, "listing VMs failed");
                    listing.unreachable.push(hypervisor.name.clone());
                }
            }
        }
        listing
    }

    /// Whether any hypervisor passed its last health check.
    pub(crate) fn reachable(&self) -> bool {
        self.hypervisors
            .iter()
            .any(|hypervisor| hypervisor.reachable.load(Ordering::Relaxed))
    }

    /// Starts the health check of each hypervisor, until shutdown.
    pub(crate) fn watch(&self, shutdown: &CancellationToken) {
        for hypervisor in &self.hypervisors {
            tokio::spawn(
                shutdown
                    .clone()
                    .run_until_cancelled_owned(Arc::clone(hypervisor).watch()),
            );
        }
    }
}

impl Hypervisor {
    /// Sends an action on the VM if the fence is still open when a permit is free.
    pub(crate) async fn send(
        &self,
        id: &InstanceId,
        action: Action,
        fence: &Fence,
    ) -> Result<(), DriverError> {
        match action {
            Action::Start => self.driver.start(id, fence).await,
            Action::Shutdown => self.driver.shutdown(id, fence).await,
            Action::Reboot { hard } => self.driver.reboot(id, hard, fence).await,
            Action::Destroy => self.driver.destroy(id, fence).await,
        }
    }

    /// The state of the VM.
    pub(crate) async fn state(&self, id: &InstanceId) -> Result<MachineState, DriverError> {
        let answer = self.driver.state(id).await;
        match &answer {
            Ok(_) => {
                self.lock_vms().insert(id.clone());
            }
            Err(DriverError::NotFound) => {
                self.lock_vms().remove(id);
            }
            Err(_) => return answer,
        }
        self.unresponsive.store(false, Ordering::Relaxed);
        answer
    }

    fn is_unresponsive(&self) -> bool {
        self.unresponsive.load(Ordering::Relaxed)
    }

    /// Whether it had the VM according to its last answers.
    fn had_vm(&self, id: &InstanceId) -> bool {
        self.lock_vms().contains(id)
    }

    fn lock_vms(&self) -> MutexGuard<'_, HashSet<InstanceId>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a failed state request and returns the error for the caller.
    fn report_failure(&self, error: &DriverError) -> DriverError {
        warn!(hypervisor = self.name, %error, "reading the VM's state failed");
        DriverError::Unavailable(format!("the hypervisor {} does not answer: {error}", self.name))
    }

    async fn watch(self: Arc<Self>) {
        loop {
            let answer = self.driver.check().await;
            let was = self.reachable.swap(answer.is_ok(), Ordering::Relaxed);
            if answer.is_ok() {
                self.unresponsive.store(false, Ordering::Relaxed);
            }
            match answer {
                Ok(()) if !was => info!(hypervisor = self.name, "hypervisor reachable"),
                Err(error) if was => warn!(hypervisor = self.name, %error, "hypervisor unreachable"),
                Err(error) => tracing::debug!(hypervisor = self.name, %error, "hypervisor still unreachable"),
                Ok(()) => {}
            }
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }
}
