//! All configured hypervisors. Finds the hypervisor that runs a VM, and keeps a hanging hypervisor from delaying the
//! others.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use moka::sync::Cache;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};
use tracing::{debug, info, warn};
use vmwatch_api::InstanceId;

use crate::{
    config::{CallLimits, HypervisorSpec},
    driver::{self, Driver, DriverError, TlsError, VmState},
    fence::Fence,
    inventory::Inventory,
    state_machine::{Action, describe_state},
};

/// Maximum number of VMs in the cache of locations, which then takes about 10 MB.
const REMEMBERED: u64 = 100_000;
/// How long the last known hypervisor of a VM is remembered. A read of the VM asks that hypervisor first, and all
/// hypervisors only if it no longer has the VM.
const SEEN_FOR: Duration = Duration::from_mins(5);
/// How long an operation waits for the remaining hypervisors once one has reported the VM. Later operations do not wait
/// for a hypervisor that took longer, until it has answered a call again; so a hanging host does not delay every
/// operation.
const OTHERS_WAIT: Duration = Duration::from_millis(500);

/// All hypervisors that this service is configured to use.
pub(crate) struct Fleet {
    hypervisors: Vec<Arc<Hypervisor>>,
    inventory: Arc<Inventory>,
    /// How long an unreachable hypervisor that had a VM prevents its start elsewhere.
    last_hypervisor_keep: Duration,
    seen: Cache<InstanceId, Arc<Hypervisor>>,
}

/// A hypervisor that the setting `VMWATCH_HYPERVISORS` names.
#[derive(Debug)]
pub(crate) struct Hypervisor {
    pub(crate) name: String,
    pub(crate) driver: Arc<dyn Driver>,
    /// Whether the hypervisor answered when any replica last listed its VMs.
    reachable: AtomicBool,
    /// Whether a warning about the current failures was logged.
    failure_logged: AtomicBool,
    /// Whether this replica has ever reached the hypervisor.
    was_reached: AtomicBool,
    /// Whether the hypervisor took longer than [`OTHERS_WAIT`] and has not answered any call since.
    unresponsive: AtomicBool,
    /// Wakes the task that lists the VMs of this hypervisor after an operation has ended.
    operation_ended: Notify,
}

/// The hypervisor that has a VM, and the VM's state.
#[derive(Debug)]
pub(crate) struct Located {
    pub(crate) hypervisor: Arc<Hypervisor>,
    pub(crate) vm: VmState,
}

/// The VM that an operation acts on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) id: &'a InstanceId,
    /// The hypervisor that the request names.
    pub(crate) hypervisor: Option<&'a str>,
    /// Whether the operation starts the VM.
    pub(crate) starting: bool,
}

/// Why no hypervisor can be chosen to act on a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OwnerError {
    /// No hypervisor has the VM, or a hypervisor that may have it is unreachable.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// Several hypervisors have the VM, and the request names none. The action is refused whatever the states of the VM,
    /// because two copies of a VM must never write to the same disk.
    #[error("the VM is defined on {}; remove it from all but one of these hypervisors, or name the one that shall act", .0.join(" and "))]
    Several(Vec<String>),
    /// Another hypervisor than the named one has the VM too, and the VM is not off there.
    #[error("the VM is {state} on {on}, so a start here would run a second copy; shut it down on {on} first")]
    NotOffElsewhere { state: &'static str, on: String },
    /// The request names a hypervisor that answered that it does not have the VM.
    #[error("the hypervisor {0} does not have this VM; name one that has it")]
    NotOn(String),
    /// The request names a hypervisor that is not in the settings.
    #[error("there is no hypervisor with the name {0}; the list of VMs shows the names")]
    NoSuchHypervisor(String),
    /// A start that was sent to another hypervisor may still take effect.
    #[error(
        "a start of this VM on {0} was not answered and may still take effect; name {0} as the hypervisor, or try again in 15 minutes"
    )]
    Unsettled(String),
    /// A hypervisor that had the VM is unreachable now, so the VM may still run there.
    #[error(
        "{0} is unreachable and had this VM when it last answered, so the VM may still run there; start it when {0} answers again, or after VMWATCH_LAST_HYPERVISOR_KEEP if that host is switched off"
    )]
    LastOn(String),
}

/// What the hypervisors answered about a VM.
struct Answers {
    owners: Vec<Located>,
    /// The hypervisors that failed or did not answer in time.
    unanswered: Vec<Arc<Hypervisor>>,
    /// Why a hypervisor did not answer; [`DriverError::NotFound`] if all did.
    failure: DriverError,
}

impl Fleet {
    pub(crate) fn open(
        specs: Vec<HypervisorSpec>,
        limits: CallLimits,
        last_hypervisor_keep: Duration,
        inventory: Arc<Inventory>,
    ) -> Result<Self, TlsError> {
        let open = |spec: HypervisorSpec| -> Result<_, TlsError> {
            Ok(Arc::new(Hypervisor {
                name: spec.name,
                driver: driver::open(spec.endpoint, limits)?,
                reachable: AtomicBool::new(false),
                failure_logged: AtomicBool::new(false),
                was_reached: AtomicBool::new(false),
                unresponsive: AtomicBool::new(false),
                operation_ended: Notify::new(),
            }))
        };
        Ok(Self {
            hypervisors: specs.into_iter().map(open).collect::<Result<_, _>>()?,
            inventory,
            last_hypervisor_keep,
            seen: Cache::builder()
                .max_capacity(REMEMBERED)
                .time_to_live(SEEN_FOR)
                .build(),
        })
    }

    /// Finds the hypervisor that is to act on the VM: the named one, or else the only one that has the VM. Asks every
    /// hypervisor. A start is refused while a hypervisor that recently had the VM is unreachable, and while the VM is not
    /// off on another hypervisor.
    pub(crate) async fn owner(&self, wanted: Wanted<'_>) -> Result<Located, OwnerError> {
        if let Some(name) = wanted.hypervisor
            && !self.hypervisor_names().contains(&name)
        {
            return Err(OwnerError::NoSuchHypervisor(name.to_owned()));
        }
        let Answers {
            owners,
            unanswered,
            failure,
        } = self.ask_all(wanted).await;
        let last_on = unanswered
            .iter()
            .find(|hypervisor| {
                self.inventory
                    .had(&hypervisor.name, wanted.id, self.last_hypervisor_keep)
            })
            .map(|hypervisor| hypervisor.name.clone());
        let is_wanted = |owner: &Located| wanted.hypervisor.is_none_or(|name| owner.hypervisor.name == name);
        if wanted.hypervisor.is_none() && owners.len() > 1 {
            return Err(OwnerError::Several(self.names(&owners)));
        }
        let (mut chosen, others): (Vec<_>, Vec<_>) = owners.into_iter().partition(is_wanted);
        let Some(owner) = chosen.pop() else {
            // A hypervisor that did not answer may have the VM, so its error is returned instead of "not found".
            return Err(match wanted.hypervisor {
                Some(name) if !unanswered.iter().any(|other| other.name == name) => {
                    OwnerError::NotOn(name.to_owned())
                }
                _ => failure.into(),
            });
        };
        if wanted.starting {
            if let Some(other) = others.into_iter().find(|other| !other.vm.state.is_off()) {
                return Err(OwnerError::NotOffElsewhere {
                    state: describe_state(other.vm.state),
                    on: other.hypervisor.name.clone(),
                });
            }
            if let Some(hypervisor) = last_on {
                return Err(OwnerError::LastOn(hypervisor));
            }
        }
        self.seen.insert(wanted.id.clone(), Arc::clone(&owner.hypervisor));
        Ok(owner)
    }

    /// Asks every hypervisor for the VM. Once the named hypervisor, or without one any that has the VM, has answered, the
    /// others have [`OTHERS_WAIT`] to answer.
    async fn ask_all(&self, wanted: Wanted<'_>) -> Answers {
        let mut answers: FuturesUnordered<_> = self
            .hypervisors
            .iter()
            .map(|hypervisor| async move { (hypervisor, hypervisor.state(wanted.id).await) })
            .collect();
        let mut owners = Vec::new();
        let mut unanswered: Vec<_> = self.hypervisors.iter().map(Arc::clone).collect();
        let mut failure = DriverError::NotFound;
        let mut end = None;
        loop {
            let all_unresponsive = unanswered.iter().all(|hypervisor| hypervisor.is_unresponsive());
            let next = match end {
                None => answers.next().await,
                // All hypervisors that have not answered yet are known to hang: take the answers that have arrived,
                // without waiting for more.
                Some(_) if all_unresponsive => answers.next().now_or_never().flatten(),
                Some(end) => timeout_at(end, answers.next()).await.ok().flatten(),
            };
            let Some((hypervisor, answer)) = next else { break };
            if wanted
                .hypervisor
                .map_or(answer.is_ok(), |name| hypervisor.name == name)
            {
                end.get_or_insert_with(|| Instant::now() + OTHERS_WAIT);
            }
            match answer {
                Ok(vm) => owners.push(Located {
                    hypervisor: Arc::clone(hypervisor),
                    vm,
                }),
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
        Answers {
            owners,
            unanswered,
            failure,
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

    /// Finds the hypervisor that has the VM, for a read: asks the hypervisor that last had the VM and, if that is
    /// unknown or no longer has the VM, all hypervisors concurrently. If several have the VM, one on which it is not off
    /// comes first, then the order of the settings.
    pub(crate) async fn locate(&self, id: &InstanceId) -> Result<Located, DriverError> {
        let is_disputed = self.inventory.is_disputed(id);
        if let Some(hypervisor) = self.seen.get(id)
            && !is_disputed
        {
            match hypervisor.state(id).await {
                Err(DriverError::NotFound) => self.seen.invalidate(id),
                answer => return answer.map(|vm| Located { hypervisor, vm }),
            }
        }
        if is_disputed {
            return self.locate_disputed(id).await;
        }
        let mut answers: FuturesUnordered<_> = self
            .hypervisors
            .iter()
            .map(|hypervisor| async move { (hypervisor, hypervisor.state(id).await) })
            .collect();
        let mut failure = None;
        while let Some((hypervisor, answer)) = answers.next().await {
            match answer {
                Ok(vm) => {
                    let hypervisor = Arc::clone(hypervisor);
                    self.seen.insert(id.clone(), Arc::clone(&hypervisor));
                    return Ok(Located { hypervisor, vm });
                }
                Err(DriverError::NotFound) => {}
                Err(error) => failure = Some(hypervisor.report_failure(&error)),
            }
        }
        // A hypervisor that did not answer may have the VM, so its error is returned instead of "not found".
        Err(failure.unwrap_or(DriverError::NotFound))
    }

    async fn locate_disputed(&self, id: &InstanceId) -> Result<Located, DriverError> {
        let wanted = Wanted {
            id,
            hypervisor: None,
            starting: false,
        };
        let Answers { owners, failure, .. } = self.ask_all(wanted).await;
        let position = |owner: &Located| {
            let mut all = self.hypervisors.iter();
            all.position(|hypervisor| Arc::ptr_eq(hypervisor, &owner.hypervisor))
        };
        let first = owners
            .into_iter()
            .min_by_key(|owner| (owner.vm.state.is_off(), position(owner)));
        first.ok_or(failure)
    }

    /// All hypervisors, in the order of the settings.
    pub(crate) fn hypervisors(&self) -> &[Arc<Hypervisor>] {
        &self.hypervisors
    }

    /// Names of all hypervisors, in the order of the settings.
    pub(crate) fn hypervisor_names(&self) -> Vec<&str> {
        let names = self.hypervisors.iter().map(|hypervisor| hypervisor.name.as_str());
        names.collect()
    }

    /// Lists the VMs of this hypervisor soon, if this replica polls it.
    pub(crate) fn poll_soon(&self, hypervisor: &str) {
        for known in self.hypervisors.iter().filter(|known| known.name == hypervisor) {
            known.operation_ended.notify_one();
        }
    }

    /// Whether at least one hypervisor answered when its VMs were last listed.
    pub(crate) fn reachable(&self) -> bool {
        self.hypervisors
            .iter()
            .any(|hypervisor| hypervisor.reachable.load(Ordering::Relaxed))
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
    pub(crate) async fn state(&self, id: &InstanceId) -> Result<VmState, DriverError> {
        let answer = self.driver.state(id).await;
        if matches!(answer, Ok(_) | Err(DriverError::NotFound)) {
            self.unresponsive.store(false, Ordering::Relaxed);
        }
        answer
    }

    /// Records that the hypervisor answered a request to list its VMs or a check that it is reachable.
    pub(crate) fn note_answer(&self) {
        self.unresponsive.store(false, Ordering::Relaxed);
        self.was_reached.store(true, Ordering::Relaxed);
        self.failure_logged.store(false, Ordering::Relaxed);
        if !self.reachable.swap(true, Ordering::Relaxed) {
            info!(hypervisor = self.name, "hypervisor reachable");
        }
    }

    /// Records that the hypervisor did not answer a request to list its VMs or a check that it is reachable.
    pub(crate) fn note_failure(&self, error: &(impl fmt::Display + ?Sized)) {
        self.reachable.store(false, Ordering::Relaxed);
        if self.failure_logged.swap(true, Ordering::Relaxed) {
            debug!(hypervisor = self.name, %error, "hypervisor still unreachable");
        } else {
            warn!(hypervisor = self.name, %error, "hypervisor unreachable");
        }
    }

    /// Whether this replica has ever reached the hypervisor.
    pub(crate) fn was_reached(&self) -> bool {
        self.was_reached.load(Ordering::Relaxed)
    }

    /// Waits until an operation on a VM of this hypervisor has ended.
    pub(crate) async fn operation_ended(&self) {
        self.operation_ended.notified().await;
    }

    fn is_unresponsive(&self) -> bool {
        self.unresponsive.load(Ordering::Relaxed)
    }

    /// Logs a failed request for the VM's state and returns the error for the caller.
    fn report_failure(&self, error: &DriverError) -> DriverError {
        warn!(hypervisor = self.name, %error, "reading the state of a VM from the hypervisor failed");
        DriverError::Unavailable(format!("the hypervisor {} does not answer: {error}", self.name))
    }
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.hypervisors).finish()
    }
}
