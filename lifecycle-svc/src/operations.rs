//! Operations on VMs. Each operation takes effect once and ends with its real outcome, even if replicas fail meanwhile.
//!
//! Every operation has a record in a KV bucket, which is created before anything is done. The id of the record is a
//! hash of the idempotency key and its scope, so creating the record also claims the operation: of several equal
//! requests, on whichever replicas, one creates the record and carries out the operation. The others wait for its end
//! and return the same answer.
//!
//! The replica that carries out an operation holds a lease on it, which is stored in the record, and renews the lease.
//! When the lease expires, another replica adopts the operation. If the action was never sent to the hypervisor, the
//! new replica sends it if the deadline allows. A start or stop with unknown outcome ends according to the state of the
//! VM; a reboot with unknown outcome ends as "outcome unknown".

mod claim;
mod leased;
mod record;
mod run;
mod store;
mod trail;
mod view;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use metrics::counter;
use tokio::{sync::Semaphore, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use vmwatch_api::{
    InstanceId, Kind, Principal,
    lifecycle::{Machine, Operation, OperationFilter, OperationId, OperationPage, OperationState},
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Bus, Context, audit::Audit, serve::Refused};
use vmwatch_service::lifetime::until_done;

use self::{
    claim::Claims,
    leased::Aborted,
    record::{End, Record, answer},
    run::Run,
    store::{Store, Stored, Written},
    trail::Trail,
    view::View,
};
pub(crate) use self::{
    record::Command,
    store::{OPERATION_BUCKET, bucket},
};
use crate::{config::OperationSettings, events::Events, fleet::Fleet, lease::Lease};

/// Maximum length of an idempotency key in bytes.
const MAX_KEY_BYTES: usize = 128;
/// Maximum number of adopted operations that this replica carries out concurrently.
const MAX_CONCURRENT_ADOPTED: usize = 32;
/// Bounds of the interval at which an operation's record is polled while another request or replica carries it out.
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(50);
const MAX_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Carries out the operations of this replica and follows those of all replicas.
pub(crate) struct Operations {
    settings: OperationSettings,
    fleet: Arc<Fleet>,
    store: Store,
    claims: Claims,
    trail: Trail,
    view: View,
    /// Random name under which this replica holds leases on operations.
    owner: String,
    /// Operations that this replica is carrying out, so that it does not adopt its own operations.
    in_progress: Mutex<HashSet<OperationId>>,
}

impl Operations {
    /// Opens the KV bucket of operations and the audit stream, and reads the bucket; waits for the bus. Returns `None`
    /// at shutdown.
    pub(crate) async fn open(
        bus: &Bus,
        settings: OperationSettings,
        fleet: Arc<Fleet>,
        events: Events,
        shutdown: &CancellationToken,
    ) -> Result<Option<Arc<Self>>, getrandom::Error> {
        let store = until_done("the KV bucket of operations", shutdown, || {
            Store::open(bus, &settings, events.clone())
        });
        let Some(store) = store.await else {
            return Ok(None);
        };
        let audit = Audit::new(bus, settings.audit_required);
        if until_done("the audit stream, which auth-svc creates", shutdown, || {
            audit.check()
        })
        .await
        .is_none()
        {
            return Ok(None);
        }
        let view = View::follow(bus, Arc::clone(&fleet), shutdown);
        if shutdown.run_until_cancelled(view.filled()).await.is_none() {
            return Ok(None);
        }
        Ok(Some(Arc::new(Self {
            settings,
            fleet,
            store,
            claims: Claims::new(bus),
            trail: Trail::new(audit),
            view,
            owner: random_id()?.to_string(),
            in_progress: Mutex::default(),
        })))
    }

    /// Starts two tasks that run until shutdown: one adopts operations whose lease has expired; the other writes audit
    /// records with the numbers of refused requests that were only counted.
    pub(crate) fn watch(self: &Arc<Self>, shutdown: &CancellationToken) {
        let (this, until) = (Arc::clone(self), shutdown.clone());
        tokio::spawn(async move { until.run_until_cancelled(this.adopt()).await });
        let (refusals, until) = (Arc::clone(self.trail.refusals()), shutdown.clone());
        tokio::spawn(async move { refusals.run(until).await });
    }

    /// Carries out an operation, or waits for the end of an equal operation, and returns the result.
    pub(crate) async fn submit(
        self: &Arc<Self>,
        context: &Context,
        command: Command,
    ) -> Result<Machine, Fault> {
        let requested = self.new_record(context, command)?;
        self.check_space().await?;
        // Of several identical requests to this replica, only one tries to create the record.
        if let Some(in_progress) = InProgress::try_begin(self, &requested.operation.id)
            && let Some((record, revision)) = self.claim(context, &requested).await?
        {
            let ended = self.begin(record, revision).await;
            drop(in_progress);
            match ended {
                Ok(operation) => return answer(operation),
                Err(Aborted::LeaseLost) => {}
                Err(Aborted::NotWritten(error)) => return Err(error.into()),
            }
        }
        answer(self.wait_for_end(context, &requested).await?)
    }

    fn new_record(&self, context: &Context, command: Command) -> Result<Record, Fault> {
        let user = context
            .principal
            .as_ref()
            .map_or("", |principal| principal.user.as_str());
        let id = match context.idempotency_key.as_deref() {
            None => random_id().map_err(|error| {
                Fault::new(
                    FaultKind::Internal,
                    "the operating system's source of random numbers failed",
                )
                .caused_by(error)
            })?,
            Some(key) if (1..=MAX_KEY_BYTES).contains(&key.len()) => {
                OperationId::from_idempotency_key(user, &command.instance_id, &command.method, key)
            }
            Some(_) => {
                let rule = format!("the idempotency key must be 1 to {MAX_KEY_BYTES} bytes");
                return Err(Fault::new(FaultKind::Invalid, rule));
            }
        };
        Ok(Record::new(id, command, context, self.lease()))
    }

    /// Refuses new operations when the KV bucket is more than nine tenths full, because running operations may need the
    /// rest.
    async fn check_space(&self) -> Result<(), Fault> {
        let most = self.settings.max_bytes.unsigned_abs() / 10 * 9;
        if self.view.bytes_at_most() <= most {
            return Ok(());
        }
        let bytes = self.store.bytes().await?;
        self.view.measured(bytes);
        if bytes <= most {
            return Ok(());
        }
        Err(Fault::new(
            FaultKind::Unavailable,
            "the storage for operation records is nearly full; an administrator can raise VMWATCH_OPERATIONS_MAX_BYTES",
        ))
    }

    /// Creates a lease on an operation for this replica that begins now.
    fn lease(&self) -> Lease {
        Lease {
            owner: self.owner.clone(),
            until_ms: Lease::until(self.settings.lease),
        }
    }

    /// Creates the operation's record, or returns `None` if the operation was requested before. If JetStream does not
    /// answer, this retries until the deadline: the record may have been created, and without the retry the operation
    /// would be carried out only by the replica that adopts it later.
    async fn claim(&self, context: &Context, requested: &Record) -> Result<Option<Stored>, Fault> {
        let id = &requested.operation.id;
        loop {
            let failed = match self.store.create(requested).await {
                Ok(Written::At(revision)) => return Ok(Some((requested.clone(), revision))),
                Ok(Written::Conflict) => match self.store.read(id).await {
                    // A stored record that is equal, including its timestamps, was created by an earlier attempt of
                    // this call.
                    Ok(stored) => return Ok(stored.filter(|(first, _)| first == requested)),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if context.remaining().is_zero() || failed.is_final() {
                return Err(failed.into());
            }
            debug!(operation = %id, error = %failed, "creating the operation record failed; retrying");
            sleep(MAX_POLL_INTERVAL).await;
        }
    }

    /// Writes the audit record of an operation whose record was just created, then carries out the operation.
    async fn begin(self: &Arc<Self>, record: Record, revision: u64) -> Result<Operation, Aborted> {
        let audited = self.trail.begin(&record).await;
        let run = Run::new(Arc::clone(self), record, revision);
        let Err(error) = audited else {
            return run.drive().await;
        };
        warn!(%error, "writing the audit record failed; the operation is refused");
        let why =
            "the action could not be recorded in the audit, so it was not carried out; try again shortly";
        run.end_without_acting(End::from_fault(&Fault::new(FaultKind::Unavailable, why)))
            .await
    }

    /// Waits until the caller's deadline for the end of an operation that another request or replica carries out.
    async fn wait_for_end(&self, context: &Context, requested: &Record) -> Result<Operation, Fault> {
        let id = &requested.operation.id;
        let mut pause = MIN_POLL_INTERVAL;
        loop {
            match self.store.read(id).await {
                Ok(Some((first, _))) if !first.is_same_request(requested) => {
                    let reused = "this idempotency key was used for the same action with other parameters; \
                                  use another key";
                    return Err(Fault::new(FaultKind::Conflict, reused));
                }
                Ok(Some((first, _))) if first.operation.state.is_final() => return Ok(first.operation),
                // The operation has no record yet: another request is just creating it.
                Ok(_) => {}
                Err(error) => {
                    debug!(operation = %id, %error, "reading the operation record failed; retrying");
                }
            }
            if context.remaining().is_zero() {
                return Err(Fault::new(FaultKind::Timeout, "the operation has not ended yet"));
            }
            sleep(pause).await;
            pause = (pause * 2).min(MAX_POLL_INTERVAL);
        }
    }

    /// Resumes operations whose lease has expired. Every replica tries this, and compare-and-set lets only one succeed
    /// per operation.
    async fn adopt(self: Arc<Self>) {
        let permits = Arc::new(Semaphore::new(MAX_CONCURRENT_ADOPTED));
        loop {
            sleep(self.settings.lease / 3).await;
            for id in self.view.orphans(unix_millis()) {
                let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                    return;
                };
                let this = Arc::clone(&self);
                tokio::spawn(async move {
                    if let Err(error) = this.resume(&id).await {
                        warn!(operation = %id, %error, "resuming an operation of another replica failed; retrying later");
                    }
                    drop(permit);
                });
            }
        }
    }

    /// Adopts an operation if its lease has expired, and carries it to its end.
    async fn resume(self: &Arc<Self>, id: &OperationId) -> Result<(), Aborted> {
        let Some(in_progress) = InProgress::try_begin(self, id) else {
            return Ok(());
        };
        let stored = self.store.read(id).await.map_err(Aborted::NotWritten)?;
        let Some((mut record, revision)) = stored else {
            self.view.forget(id);
            return Ok(());
        };
        let state = record.operation.state;
        if record.newer || state.is_final() || record.lease.until_ms >= unix_millis() {
            return Ok(());
        }
        // The previous owner may have crashed before it wrote the audit record, so write it (again).
        if state == OperationState::Requested
            && let Err(error) = self.trail.begin(&record).await
        {
            warn!(operation = %id, %error, "taking over an operation of another replica failed: its audit record cannot be written; retrying later");
            return Ok(());
        }
        record.lease = self.lease();
        record.note(
            state,
            "adopted: the lease of the replica that carried it out has expired",
        );
        let written = self
            .store
            .replace(&record, revision)
            .await
            .map_err(Aborted::NotWritten)?;
        let Written::At(revision) = written else {
            return Ok(());
        };
        counter!("vmwatch_operations_adopted_total").increment(1);
        info!(operation = %id, %state, "took over the operation of another replica");
        Run::new(Arc::clone(self), record, revision).drive().await?;
        drop(in_progress);
        Ok(())
    }

    /// Writes audit records with the numbers of refused requests counted so far, when the service stops.
    pub(crate) async fn finish(&self) {
        self.trail.refusals().finish().await;
    }

    /// Writes an audit record of an action that was refused because of the user's role or scope.
    pub(crate) async fn refused(&self, refused: Refused) {
        if refused.method.kind == Kind::Command {
            self.trail.refused(&refused).await;
        }
    }

    /// Returns an operation if the principal may see its VM.
    pub(crate) async fn get(
        &self,
        principal: Option<&Principal>,
        id: &OperationId,
    ) -> Result<Operation, Fault> {
        let stored = self.store.read(id).await?;
        stored
            .map(|(record, _)| record.operation)
            .filter(|operation| sees(principal, &operation.instance_id))
            .ok_or_else(no_such_operation)
    }

    /// Returns a page of the newest operations on VMs that the principal may see.
    pub(crate) fn list(
        &self,
        principal: Option<&Principal>,
        filter: &OperationFilter,
    ) -> Result<OperationPage, Fault> {
        let keep = u64::try_from(self.settings.keep.as_millis()).unwrap_or(u64::MAX);
        let oldest = unix_millis().saturating_sub(keep);
        let newest = self.view.newest(usize::from(filter.limit.get()), |operation| {
            operation.requested_at_ms >= oldest
                && filter
                    .before
                    .as_ref()
                    .is_none_or(|position| position.is_behind(operation))
                && filter.state.is_none_or(|state| operation.state == state)
                && filter
                    .instance_id
                    .as_ref()
                    .is_none_or(|id| operation.instance_id == *id)
                && sees(principal, &operation.instance_id)
        });
        Ok(newest?)
    }
}

fn random_id() -> Result<OperationId, getrandom::Error> {
    let mut bits = [0; 16];
    getrandom::fill(&mut bits)?;
    Ok(OperationId::from_random(bits))
}

fn sees(principal: Option<&Principal>, instance: &InstanceId) -> bool {
    principal.is_some_and(|principal| principal.scope.allows(instance))
}

fn no_such_operation() -> Fault {
    Fault::new(FaultKind::NotFound, "there is no operation with this id")
}

/// Marks an operation as carried out by this replica, until this value is dropped.
struct InProgress {
    operations: Arc<Operations>,
    id: OperationId,
}

impl InProgress {
    fn try_begin(operations: &Arc<Operations>, id: &OperationId) -> Option<Self> {
        let free = operations.lock_in_progress().insert(id.clone());
        free.then(|| Self {
            operations: Arc::clone(operations),
            id: id.clone(),
        })
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.operations.lock_in_progress().remove(&self.id);
    }
}

impl Operations {
    fn lock_in_progress(&self) -> std::sync::MutexGuard<'_, HashSet<OperationId>> {
        self.in_progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
