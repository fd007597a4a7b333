//! Several hypervisors as one: an instance is found on the right one, and one that hangs stalls no other's machines.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use moka::sync::Cache;
use shared::api::{
    InstanceId,
    lifecycle::{ListedMachine, MachineState},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    config::{CallLimits, HypervisorSpec},
    driver::{self, Driver, DriverError, TlsError},
    machine::Action,
};

/// Where instances were last seen: some 10 MB at the most.
const REMEMBERED: u64 = 100_000;
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
}

/// Where a machine is, and in which state.
#[derive(Debug)]
pub(crate) struct Located {
    pub(crate) hypervisor: Arc<Hypervisor>,
    pub(crate) state: MachineState,
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
            }))
        };
        Ok(Self {
            hypervisors: specs.into_iter().map(open).collect::<Result<_, _>>()?,
            seen: Cache::new(REMEMBERED),
        })
    }

    /// Finds the machine: first where it was last seen, then everywhere at once.
    pub(crate) async fn locate(&self, id: &InstanceId) -> Result<Located, DriverError> {
        if let Some(hypervisor) = self.seen.get(id) {
            match hypervisor.driver.state(id).await {
                Err(DriverError::NotFound) => self.seen.invalidate(id),
                answer => return answer.map(|state| Located { hypervisor, state }),
            }
        }
        let mut answers: FuturesUnordered<_> = self
            .hypervisors
            .iter()
            .map(|hypervisor| async move { (hypervisor, hypervisor.driver.state(id).await) })
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
                Err(error) => {
                    warn!(hypervisor = hypervisor.name, %error, "no state");
                    silent = Some(DriverError::Unavailable(format!(
                        "the hypervisor {} does not answer: {error}",
                        hypervisor.name
                    )));
                }
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
                Ok(found) => listing
                    .machines
                    .extend(found.into_iter().map(|machine| ListedMachine {
                        instance_id: machine.id,
                        name: machine.name,
                        hypervisor: hypervisor.name.clone(),
                        state: machine.state,
                    })),
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
    /// Tells it what to do with the machine.
    pub(crate) async fn tell(&self, id: &InstanceId, action: Action) -> Result<(), DriverError> {
        match action {
            Action::Start => self.driver.start(id).await,
            Action::Shutdown => self.driver.shutdown(id).await,
            Action::Reboot { hard } => self.driver.reboot(id, hard).await,
            Action::Destroy => self.driver.destroy(id).await,
        }
    }

    async fn watch(self: Arc<Self>) {
        loop {
            let answer = self.driver.check().await;
            let was = self.reachable.swap(answer.is_ok(), Ordering::Relaxed);
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
