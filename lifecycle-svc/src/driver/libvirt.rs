//! Driver for the VMs of one libvirt connection.
//!
//! Calls to libvirt block and cannot be cancelled. Each call runs on its own thread and holds a permit of its
//! hypervisor, so that a hanging host uses up only its own permits. All calls share the connection, which libvirt
//! allows. The connection is kept for the life of the process, because the state of `test:///` VMs lives in it.

mod connection;
mod labels;
mod list;
mod states;
mod threads;

use std::sync::Arc;

use async_trait::async_trait;
use domain_stats::DomainStats;
use tokio::{sync::Semaphore, time::Instant};
use uuid::Uuid;
use virt::{
    connect::Connect,
    domain::Domain,
    error::{Error, ErrorNumber},
    sys,
};
use vmwatch_api::{InstanceId, lifecycle::MachineState};

use self::{
    connection::{CallError, Shared},
    labels::LabelReads,
    states::{reason_of, state_of},
};
use super::{Driver, DriverError, Found, MAX_LISTED, NO_PERMIT, VmState, one_line};
use crate::{config::CallLimits, fence::Fence};

/// Driver for one libvirt connection.
#[derive(Debug)]
pub(super) struct Libvirt {
    connection: Arc<Shared>,
    limits: CallLimits,
    permits: Arc<Semaphore>,
    /// The only permit for listing VMs. It is separate from the permits of actions, so that a list that hangs does not
    /// delay actions; meanwhile no second list is started.
    list_permit: Arc<Semaphore>,
    /// The only permit for reading counters, so that this never delays actions or lists.
    stats_permit: Arc<Semaphore>,
    label_reads: LabelReads,
}

impl Libvirt {
    pub(super) fn new(uri: String, limits: CallLimits) -> Self {
        Self {
            connection: Arc::new(Shared::new(uri)),
            limits,
            permits: Arc::new(Semaphore::new(limits.at_once)),
            list_permit: Arc::new(Semaphore::new(1)),
            stats_permit: Arc::new(Semaphore::new(1)),
            label_reads: LabelReads::default(),
        }
    }

    /// Runs a blocking libvirt call. At the time limit the caller gets an error, but the call keeps its permit until it
    /// returns.
    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connect) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, DriverError> {
        self.call_with_permit(&self.permits, work).await
    }

    async fn call_with_permit<T: Send + 'static>(
        &self,
        permits: &Arc<Semaphore>,
        work: impl FnOnce(&Connect) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, DriverError> {
        let end = Instant::now() + self.limits.timeout;
        let permit = tokio::time::timeout_at(end, Arc::clone(permits).acquire_owned())
            .await
            .map_err(|_| NO_PERMIT)?
            .map_err(|closed| DriverError::Unavailable(closed.to_string()))?;
        let connection = Arc::clone(&self.connection);
        let called = threads::run(move || {
            let outcome = connection.call(work);
            drop(permit);
            outcome
        });
        let called = called.map_err(|error| DriverError::Unavailable(error.to_string()))?;
        match tokio::time::timeout_at(end, called).await {
            Ok(Ok(outcome)) => outcome.map_err(DriverError::from),
            Ok(Err(_)) => Err(DriverError::Unavailable(
                "the call into libvirt panicked".to_owned(),
            )),
            Err(_) => Err(DriverError::Timeout),
        }
    }

    async fn with_domain<T: Send + 'static>(
        &self,
        id: &InstanceId,
        work: impl FnOnce(&Domain) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, DriverError> {
        let uuid = uuid_of(id).ok_or(DriverError::NotFound)?;
        self.call(move |connect| work(&Domain::lookup_by_uuid(connect, uuid)?))
            .await
    }

    /// Whether the VM was saved to disk, from where a start restores it.
    async fn is_saved(&self, id: &InstanceId) -> bool {
        let saved = self.with_domain(id, |domain| domain.has_managed_save(0)).await;
        saved.unwrap_or(false)
    }

    /// Performs an action on a VM, unless its fence has closed by the time that the call gets a thread.
    async fn act(
        &self,
        id: &InstanceId,
        fence: &Fence,
        work: impl FnOnce(&Domain, MachineState) -> Result<(), Error> + Send + 'static,
    ) -> Result<(), DriverError> {
        let fence = fence.clone();
        let acted = self.with_domain(id, move |domain| {
            let state = state_of(domain)?;
            Ok(match fence.check() {
                Ok(()) => Ok(work(domain, state)?),
                Err(closed) => Err(closed),
            })
        });
        acted.await?
    }
}

/// Adds what to do if a VM cannot be restored from its saved state.
fn with_remedy(cause: &str) -> String {
    one_line(&format!(
        "the VM was not restored from its saved state; correct the cause, or discard the state with virsh managedsave-remove, which loses the guest's memory: {cause}"
    ))
}

#[async_trait]
impl Driver for Libvirt {
    async fn check(&self) -> Result<(), DriverError> {
        self.call(|connect| connect.get_lib_version().map(drop)).await
    }

    async fn state(&self, id: &InstanceId) -> Result<VmState, DriverError> {
        Ok(self.with_domain(id, state_of).await?.into())
    }

    async fn failure_reason(&self, id: &InstanceId) -> Result<Option<String>, DriverError> {
        self.with_domain(id, |domain| {
            let reason = reason_of(domain.get_state()?);
            // A state that could not be restored is kept.
            let is_saved = reason.is_some() && domain.has_managed_save(0)?;
            Ok(reason.map(|reason| if is_saved { with_remedy(&reason) } else { reason }))
        })
        .await
    }

    async fn start(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError> {
        let starting = self.act(id, fence, |domain, state| match state {
            MachineState::Paused => domain.resume().map(drop),
            MachineState::Suspended => domain.pm_wakeup(0).map(drop),
            _ => domain.create().map(drop),
        });
        match starting.await {
            Err(DriverError::Conflict(message) | DriverError::Rejected(message))
                if self.is_saved(id).await =>
            {
                Err(DriverError::Rejected(with_remedy(&message)))
            }
            started => started,
        }
    }

    async fn shutdown(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError> {
        self.act(id, fence, |domain, _| domain.shutdown().map(drop)).await
    }

    async fn reboot(&self, id: &InstanceId, hard: bool, fence: &Fence) -> Result<(), DriverError> {
        self.act(id, fence, move |domain, _| {
            if hard {
                domain.reset().map(drop)
            } else {
                domain.reboot(sys::VIR_DOMAIN_REBOOT_DEFAULT)
            }
        })
        .await
    }

    async fn destroy(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError> {
        self.act(id, fence, |domain, _| domain.destroy()).await
    }

    async fn list(&self) -> Result<Vec<Found>, DriverError> {
        let label_reads = self.label_reads.clone();
        self.call_with_permit(&self.list_permit, move |connect| {
            list::read(connect, &label_reads)
        })
        .await
    }

    async fn stats(&self) -> Result<Vec<(InstanceId, DomainStats)>, DriverError> {
        self.call_with_permit(&self.stats_permit, |connect| {
            let stats = domain_stats::read(connect, MAX_LISTED)?.into_iter();
            let stats = stats.filter_map(|stats| {
                let uuid = Uuid::from_bytes(stats.uuid).hyphenated().to_string();
                Some((uuid.parse().ok()?, stats))
            });
            Ok(stats.collect())
        })
        .await
    }
}

/// Converts an instance id to libvirt's UUID. libvirt also accepts UUIDs without hyphens; they are rejected here, so
/// that each VM has only one id.
fn uuid_of(id: &InstanceId) -> Option<Uuid> {
    Uuid::try_parse(id.as_str())
        .ok()
        .filter(|uuid| uuid.hyphenated().to_string().eq_ignore_ascii_case(id.as_str()))
}

impl From<CallError> for DriverError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Lost(error) => Self::Unavailable(one_line(error.message())),
            CallError::Refused(error) => match error.code() {
                ErrorNumber::NoDomain => Self::NotFound,
                ErrorNumber::OperationInvalid => Self::Conflict(one_line(error.message())),
                ErrorNumber::OperationTimeout => Self::Timeout,
                _ => Self::Rejected(one_line(error.message())),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use vmwatch_api::time::unix_millis;

    use super::*;

    const LIMITS: CallLimits = CallLimits {
        timeout: Duration::from_secs(30),
        at_once: 1,
    };

    /// Performs one of the four actions on a VM of libvirt's built-in test driver.
    async fn act(libvirt: &Libvirt, id: &InstanceId, verb: usize, fence: &Fence) -> Result<(), DriverError> {
        match verb {
            0 => libvirt.shutdown(id, fence).await,
            1 => libvirt.reboot(id, true, fence).await,
            2 => libvirt.destroy(id, fence).await,
            _ => libvirt.start(id, fence).await,
        }
    }

    #[tokio::test]
    async fn action_that_waited_for_permit_is_not_sent_after_deadline() {
        let libvirt = Libvirt::new("test:///default".to_owned(), LIMITS);
        let id = libvirt.list().await.unwrap()[0].id.clone();
        assert_eq!(libvirt.state(&id).await, Ok(MachineState::Running.into()));
        for verb in 0..4 {
            let (release, released) = mpsc::channel::<()>();
            let deadline_ms = unix_millis() + 50;
            let fence = Fence::until(deadline_ms);
            // A hanging call holds the hypervisor's only permit until the deadline of the action has passed.
            let hanging = libvirt.call(move |_| {
                let _ = released.recv();
                Ok(())
            });
            let acting = act(&libvirt, &id, verb, &fence);
            let passing = async {
                while unix_millis() < deadline_ms {
                    tokio::task::yield_now().await;
                }
                drop(release);
            };
            let (hung, acted, ()) = tokio::join!(hanging, acting, passing);
            assert_eq!(hung, Ok(()));
            assert_eq!(acted, Err(DriverError::NotBegun("the deadline has passed")));
            assert_eq!(libvirt.state(&id).await, Ok(MachineState::Running.into()));
        }
        let open = Fence::until(u64::MAX);
        assert_eq!(libvirt.destroy(&id, &open).await, Ok(()));
        assert_eq!(libvirt.state(&id).await, Ok(MachineState::ShutOff.into()));
    }

    /// If reading the counters shared a permit with actions or lists, it would wait here, and would delay these.
    #[tokio::test]
    async fn counters_are_read_with_a_permit_of_their_own() {
        let libvirt = Libvirt::new("test:///default".to_owned(), LIMITS);
        let id = libvirt.list().await.unwrap()[0].id.clone();
        let _of_actions = libvirt.permits.acquire().await.unwrap();
        let _of_lists = libvirt.list_permit.acquire().await.unwrap();
        let read = tokio::time::timeout(LIMITS.timeout / 2, libvirt.stats());
        let stats = read.await.unwrap().unwrap();
        let ids: Vec<_> = stats.into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids, [id]);
    }

    #[test]
    fn libvirt_vm_ids_must_be_hyphenated_uuids() {
        assert!(uuid_of(&"6695eb01-f6a4-8304-79aa-97f2502e193f".parse().unwrap()).is_some());
        for other in ["vm-1", "6695eb01f6a4830479aa97f2502e193f", "6695eb01-f6a4"] {
            assert_eq!(uuid_of(&other.parse().unwrap()), None, "{other}");
        }
    }
}
