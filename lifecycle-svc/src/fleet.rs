//! All configured hypervisors. Finds the hypervisor that runs a VM, and keeps a hanging hypervisor from delaying the
//! others.

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

/// Maximum number of VMs in the cache of locations, which then takes about 10 MB.
const REMEMBERED: u64 = 100_000;
/// For this long, a read asks the hypervisor that last had the VM before it asks all hypervisors.
const SEEN_FOR: Duration = Duration::from_mins(5);
/// How long an operation waits for the remaining hypervisors once one has reported the VM. No operation waits again for
/// a hypervisor that takes longer until that hypervisor has answered a call, so that a hanging host does not delay
/// every operation.
const OTHERS_WAIT: Duration = Duration::from_millis(500);
/// Interval of the health check of each hypervisor.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// All hypervisors that this service is configured to use.
#[derive(Debug)]
pub(crate) struct Fleet {
    hypervisors: Vec<Arc<Hypervisor>>,
    seen: Cache<InstanceId, Arc<Hypervisor>>,
}

/// A hypervisor that the setting `VMWATCH_HYPERVISORS` names.
#[derive(Debug)]
pub(crate) struct Hypervisor {
    pub(crate) name: String,
    pub(crate) driver: Arc<dyn Driver>,
    reachable: AtomicBool,
    /// Whether the hypervisor took longer than [`OTHERS_WAIT`] and has not answered any call since.
    unresponsive: AtomicBool,
    /// VMs that the hypervisor had when it last answered; at most [`MAX_LISTED`].
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
    /// No hypervisor has the VM, or a hypervisor that may have it is unreachable.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// Several hypervisors have the VM. The action is refused whatever the states of the VM, because two copies of a VM
    /// must never write to the same disk.
    #[error("the VM is defined on {}; remove it from all but one of these hypervisors", .0.join(" and "))]
    Several(Vec<String>),
    /// A hypervisor that had the VM is unreachable now, so the VM may still run there.
    #[error("{0} is unreachable and had this VM when it last answered, so that it may still run there")]
    LastOn(String),
}

/// All VMs of the hypervisors that answered, and the names of the hypervisors that did not.
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

    /// Finds the hypervisor that has the VM, for an operation: asks every hypervisor and refuses if several have the
    /// VM. With `starting` it also refuses while a hypervisor that had the VM is unreachable.
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
                // Every hypervisor that is still missing is known to hang: take the answers that have arrived, without
                // waiting for more.
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
            // A hypervisor that did not answer may have the VM, so its error is returned instead of "not found".
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

    /// Returns the names of these hypervisors, in the order of the settings.
    fn names(&self, owners: &[Located]) -> Vec<String> {
        let is_owner = |hypervisor: &&Arc<Hypervisor>| {
            owners
                .iter()
                .any(|owner| Arc::ptr_eq(&owner.hypervisor, hypervisor))
        };
        let names = self.hypervisors.iter().filter(is_owner);
        names.map(|hypervisor| hypervisor.name.clone()).collect()
    }

    /// Finds the hypervisor that has the VM, for a read: asks the one that last had the VM, then all of them
    /// concurrently.
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
        // A hypervisor that did not answer may have the VM, so its error is returned instead of "not found".
        Err(failure.unwrap_or(DriverError::NotFound))
    }

    /// Lists the VMs of all hypervisors that answer.
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
                    warn!(hypervisor = hypervisor.name, %error, "listing the VMs of a hypervisor failed");
                    listing.unreachable.push(hypervisor.name.clone());
                }
            }
        }
        listing
    }

    /// Whether at least one hypervisor passed its last health check.
    pub(crate) fn reachable(&self) -> bool {
        self.hypervisors
            .iter()
            .any(|hypervisor| hypervisor.reachable.load(Ordering::Relaxed))
    }

    /// Starts the periodic health check of each hypervisor until shutdown.
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
    /// Sends an action on the VM to this hypervisor, if the fence is still open when a permit becomes free.
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

    /// Reads the state of the VM from this hypervisor.
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

    /// Whether this hypervisor had the VM when it last answered.
    fn had_vm(&self, id: &InstanceId) -> bool {
        self.lock_vms().contains(id)
    }

    fn lock_vms(&self) -> MutexGuard<'_, HashSet<InstanceId>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a failed request for the VM's state and returns the error for the caller.
    fn report_failure(&self, error: &DriverError) -> DriverError {
        warn!(hypervisor = self.name, %error, "reading the state of a VM from the hypervisor failed");
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
