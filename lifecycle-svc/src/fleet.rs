//! Several hypervisors as one: an instance is found on the right one, and one that hangs stalls no other's machines.

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
    machine::Action,
};

/// Where instances were last seen: some 10 MB at the most.
const REMEMBERED: u64 = 100_000;
/// For how long a read asks the hypervisor where the machine was last seen, before it asks all.
const SEEN_FOR: Duration = Duration::from_mins(5);
/// How long a command waits for the other hypervisors once one has its machine. One that takes longer is not waited for
/// again until it has answered something: a host that hangs stalls no other's machines.
const OTHERS_WAIT: Duration = Duration::from_millis(500);
/// How often it is asked whether a hypervisor answers.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// All hypervisors of this service.
#[derive(Debug)]
pub(crate) struct Fleet {
    hypervisors: Vec<Arc<Hypervisor>>,
    seen: Cache<InstanceId, Arc<Hypervisor>>,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Hypervisor {
    pub(crate) name: String,
    pub(crate) driver: Arc<dyn Driver>,
    reachable: AtomicBool,
    /// Whether it kept a command waiting and has answered nothing since.
    silent: AtomicBool,
    /// The machines that it had when it last said so: at most as many as one hypervisor lists.
    had: Mutex<HashSet<InstanceId>>,
}

/// Where a machine is, and in which state.
#[derive(Debug)]
pub(crate) struct Located {
    pub(crate) hypervisor: Arc<Hypervisor>,
    pub(crate) state: MachineState,
}

/// Why no hypervisor is told to do something with a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unowned {
    /// None has it, or the one that may have it does not answer.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// More than one has it. Whatever their states say, two copies must never write to one disk.
    #[error("the VM is defined on {}; remove it from all but one of them", .0.join(" and "))]
    Several(Vec<String>),
    /// Another one had it and is unreachable now.
    #[error("{0} is unreachable and had this VM when it last answered, so that it may still run there")]
    LastOn(String),
}

/// All machines of the hypervisors that answered, and the names of the others.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) machines: Vec<ListedMachine>,
    pub(crate) silent: Vec<String>,
}

impl Fleet {
    pub(crate) fn open(specs: Vec<HypervisorSpec>, limits: CallLimits) -> Result<Self, TlsError> {
        let open = |spec: HypervisorSpec| -> Result<_, TlsError> {
            Ok(Arc::new(Hypervisor {
                name: spec.name,
                driver: driver::open(spec.endpoint, limits)?,
                reachable: AtomicBool::new(false),
                silent: AtomicBool::new(false),
                had: Mutex::default(),
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

    /// Finds the machine for a command: asks every hypervisor, and refuses if more than one has it. `starting` also
    /// refuses while one that had it does not answer.
    pub(crate) async fn owner(&self, id: &InstanceId, starting: bool) -> Result<Located, Unowned> {
        let mut answers: FuturesUnordered<_> = self
            .hypervisors
            .iter()
            .map(|hypervisor| async move { (hypervisor, hypervisor.ask(id).await) })
            .collect();
        let mut owners = Vec::new();
        let mut unanswered: Vec<_> = self.hypervisors.iter().collect();
        let mut silent = DriverError::NotFound;
        let mut end = None;
        loop {
            let all_silent = unanswered.iter().all(|hypervisor| hypervisor.is_silent());
            let next = match end {
                None => answers.next().await,
                // What has arrived, and no more.
                Some(_) if all_silent => answers.next().now_or_never().flatten(),
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
                    silent = hypervisor.no_answer(&error);
                    continue;
                }
            }
            unanswered.retain(|other| !Arc::ptr_eq(other, hypervisor));
        }
        for hypervisor in &unanswered {
            hypervisor.silent.store(true, Ordering::Relaxed);
        }
        let last_on = unanswered.into_iter().find(|hypervisor| hypervisor.had(id));
        match (owners.pop(), last_on) {
            // While one does not answer the machine may be there.
            (None, _) => Err(silent.into()),
            (Some(last), _) if !owners.is_empty() => {
                owners.push(last);
                Err(Unowned::Several(self.names(&owners)))
            }
            (Some(_), Some(hypervisor)) if starting => Err(Unowned::LastOn(hypervisor.name.clone())),
            (Some(owner), _) => {
                self.seen.insert(id.clone(), Arc::clone(&owner.hypervisor));
                Ok(owner)
            }
        }
    }

    /// The names of some hypervisors, in the order of the settings.
    fn names(&self, owners: &[Located]) -> Vec<String> {
        let is_owner = |hypervisor: &&Arc<Hypervisor>| {
            owners
                .iter()
                .any(|owner| Arc::ptr_eq(&owner.hypervisor, hypervisor))
        };
        let names = self.hypervisors.iter().filter(is_owner);
        names.map(|hypervisor| hypervisor.name.clone()).collect()
    }

    /// Finds the machine for a read: first where it was last seen, then everywhere at once.
    pub(crate) async fn locate(&self, id: &InstanceId) -> Result<Located, DriverError> {
        if let Some(hypervisor) = self.seen.get(id) {
            match hypervisor.ask(id).await {
                Err(DriverError::NotFound) => self.seen.invalidate(id),
                answer => return answer.map(|state| Located { hypervisor, state }),
            }
        }
        let mut answers: FuturesUnordered<_> = self
            .hypervisors
            .iter()
            .map(|hypervisor| async move { (hypervisor, hypervisor.ask(id).await) })
            .collect();
        let mut silent = None;
        while let Some((hypervisor, answer)) = answers.next().await {
            match answer {
                Ok(state) => {
                    let hypervisor = Arc::clone(hypervisor);
                    self.seen.insert(id.clone(), Arc::clone(&hypervisor));
                    return Ok(Located { hypervisor, state });
                }
                Err(DriverError::NotFound) => {}
                Err(error) => silent = Some(hypervisor.no_answer(&error)),
            }
        }
        // While one is silent the machine may be there.
        Err(silent.unwrap_or(DriverError::NotFound))
    }

    /// All machines of all hypervisors that answer.
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
                    hypervisor.silent.store(false, Ordering::Relaxed);
                    *hypervisor.lock_had() = found.iter().map(|machine| machine.id.clone()).collect();
                    let listed = found.into_iter().map(|machine| ListedMachine {
                        instance_id: machine.id,
                        name: machine.name,
                        hypervisor: hypervisor.name.clone(),
                        state: machine.state,
                    });
                    listing.machines.extend(listed);
                }
                Err(error) => {
                    warn!(hypervisor = hypervisor.name, %error, "no list");
                    listing.silent.push(hypervisor.name.clone());
                }
            }
        }
        listing
    }

    /// Whether any hypervisor answered when last asked.
    pub(crate) fn reachable(&self) -> bool {
        self.hypervisors
            .iter()
            .any(|hypervisor| hypervisor.reachable.load(Ordering::Relaxed))
    }

    /// Asks each hypervisor again and again whether it answers, until shutdown.
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
    /// Tells it what to do with the machine, if the fence is open when its turn comes.
    pub(crate) async fn tell(
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

    /// What it says of the machine.
    pub(crate) async fn ask(&self, id: &InstanceId) -> Result<MachineState, DriverError> {
        let answer = self.driver.state(id).await;
        match &answer {
            Ok(_) => {
                self.lock_had().insert(id.clone());
            }
            Err(DriverError::NotFound) => {
                self.lock_had().remove(id);
            }
            Err(_) => return answer,
        }
        self.silent.store(false, Ordering::Relaxed);
        answer
    }

    fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    /// Whether it had the machine when it last said so.
    fn had(&self, id: &InstanceId) -> bool {
        self.lock_had().contains(id)
    }

    fn lock_had(&self) -> MutexGuard<'_, HashSet<InstanceId>> {
        self.had.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs that it gave no answer about a machine, and makes the error that says so.
    fn no_answer(&self, error: &DriverError) -> DriverError {
        warn!(hypervisor = self.name, %error, "no state");
        DriverError::Unavailable(format!("the hypervisor {} does not answer: {error}", self.name))
    }

    async fn watch(self: Arc<Self>) {
        loop {
            let answer = self.driver.check().await;
            let was = self.reachable.swap(answer.is_ok(), Ordering::Relaxed);
            if answer.is_ok() {
                self.silent.store(false, Ordering::Relaxed);
            }
            match answer {
                Ok(()) if !was => info!(hypervisor = self.name, "reachable"),
                Err(error) if was => warn!(hypervisor = self.name, %error, "no longer reachable"),
                Err(error) => tracing::debug!(hypervisor = self.name, %error, "not reachable"),
                Ok(()) => {}
            }
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }
}
