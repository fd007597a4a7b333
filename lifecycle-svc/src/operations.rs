//! Commands that act once and end truthfully, whatever dies meanwhile.
//!
//! Every command is a record in a bucket, made before anything is done. The record's id is the hash of the command's
//! idempotency key and its scope, so that making it is also the claim: of many equal commands, on whichever replicas,
//! one makes the record and carries it out; the others wait for its end and give the same answer.
//!
//! Who carries a command out holds a lease on it, in the record, and renews it. When a lease runs out, another replica
//! adopts the command: what was never begun is begun if its deadline allows, a start or stop whose fate is unclear
//! looks at the machine and ends by what it sees, and a reboot ends as "outcome unknown".

mod held;
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
    held::Stopped,
    record::{End, Lease, Record, answer},
    run::Run,
    store::{Store, Stored, Written},
    trail::Trail,
    view::View,
};
pub(crate) use self::{
    record::Command,
    store::{OPERATION_BUCKET, bucket},
};
use crate::{config::OperationSettings, events::Events, fleet::Fleet};

/// The longest idempotency key.
const LONGEST_KEY: usize = 128;
/// Adopted commands carried out at once.
const ADOPTED_AT_ONCE: usize = 32;
/// Between two looks at a record that another request or replica works on.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LAST_LOOK: Duration = Duration::from_millis(500);

/// All commands of this replica, and what it knows of the others'.
pub(crate) struct Operations {
    settings: OperationSettings,
    fleet: Arc<Fleet>,
    store: Store,
    trail: Trail,
    view: View,
    /// This replica, in leases.
    owner: String,
    /// The commands that this replica carries out right now: never to be adopted by itself.
    at_work: Mutex<HashSet<OperationId>>,
}

impl Operations {
    /// Opens the bucket and the audit, and reads the bucket; waits for the bus. `None` at shutdown.
    pub(crate) async fn open(
        bus: &Bus,
        settings: OperationSettings,
        fleet: Arc<Fleet>,
        events: Events,
        shutdown: &CancellationToken,
    ) -> Result<Option<Arc<Self>>, getrandom::Error> {
        let store = until_done("the bucket of records", shutdown, || {
            Store::open(bus, &settings, events.clone())
        });
        let Some(store) = store.await else {
            return Ok(None);
        };
        let audit = Audit::new(bus, settings.audit_required);
        if until_done("the audit stream, which auth-svc makes", shutdown, || {
            audit.check()
        })
        .await
        .is_none()
        {
            return Ok(None);
        }
        let view = View::follow(bus, shutdown);
        if shutdown.run_until_cancelled(view.filled()).await.is_none() {
            return Ok(None);
        }
        Ok(Some(Arc::new(Self {
            settings,
            fleet,
            store,
            trail: Trail::new(audit),
            view,
            owner: random_id()?.to_string(),
            at_work: Mutex::default(),
        })))
    }

    /// Adopts what lost its owner, and appends counted refusals to the audit, until shutdown.
    pub(crate) fn watch(self: &Arc<Self>, shutdown: &CancellationToken) {
        let (this, until) = (Arc::clone(self), shutdown.clone());
        tokio::spawn(async move { until.run_until_cancelled(this.adopt()).await });
        let (refusals, until) = (Arc::clone(self.trail.refusals()), shutdown.clone());
        tokio::spawn(async move { refusals.run(until).await });
    }

    /// Carries out a command, or waits for the end of the same one, and answers by that end.
    pub(crate) async fn submit(
        self: &Arc<Self>,
        context: &Context,
        command: Command,
    ) -> Result<Machine, Fault> {
        let asked = self.asked(context, command)?;
        self.check_room().await?;
        // Of the same command several times on this replica, one makes the record.
        if let Some(at_work) = AtWork::unless_already(self, &asked.operation.id)
            && let Some((record, revision)) = self.claim(context, &asked).await?
        {
            let ended = self.begin(record, revision).await;
            drop(at_work);
            match ended {
                Ok(operation) => return answer(operation),
                Err(Stopped::Overtaken) => {}
                Err(Stopped::Unwritten(error)) => return Err(error.into()),
            }
        }
        answer(self.end_of(context, &asked).await?)
    }

    fn asked(&self, context: &Context, command: Command) -> Result<Record, Fault> {
        let user = context
            .principal
            .as_ref()
            .map_or("", |principal| principal.user.as_str());
        let id = match context.idempotency_key.as_deref() {
            None => random_id().map_err(|error| {
                Fault::new(FaultKind::Internal, "the system's random source does not answer").caused_by(error)
            })?,
            Some(key) if (1..=LONGEST_KEY).contains(&key.len()) => {
                OperationId::of_key(user, &command.instance_id, command.verb, key)
            }
            Some(_) => {
                let rule = format!("the idempotency key must be 1 to {LONGEST_KEY} bytes");
                return Err(Fault::new(FaultKind::Invalid, rule));
            }
        };
        Ok(Record::new(id, command, context, self.lease()))
    }

    /// Refuses new commands while the last tenth of the bucket is left, which those that are under way may need.
    async fn check_room(&self) -> Result<(), Fault> {
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
            "the store of the records of commands is nearly full; its size and age are settings of the service",
        ))
    }

    /// A lease of this replica that begins now.
    fn lease(&self) -> Lease {
        Lease {
            owner: self.owner.clone(),
            until_ms: Lease::until(self.settings.lease),
        }
    }

    /// Makes the record, or finds that it was made before. While no answer comes it is tried again until the deadline,
    /// since a record whose answer was lost would otherwise be carried out by whoever adopts it.
    async fn claim(&self, context: &Context, asked: &Record) -> Result<Option<Stored>, Fault> {
        let id = &asked.operation.id;
        loop {
            let failed = match self.store.create(asked).await {
                Ok(Written::At(revision)) => return Ok(Some((asked.clone(), revision))),
                Ok(Written::Overtaken) => match self.store.read(id).await {
                    // Equal to the last time stamp: it is the very one that was made here.
                    Ok(stored) => return Ok(stored.filter(|(first, _)| first == asked)),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if context.remaining().is_zero() || failed.is_final() {
                return Err(failed.into());
            }
            debug!(operation = %id, error = %failed, "its record is made again");
            sleep(LAST_LOOK).await;
        }
    }

    /// Carries out a command whose record was just made, once it is in the audit.
    async fn begin(self: &Arc<Self>, record: Record, revision: u64) -> Result<Operation, Stopped> {
        let audited = self.trail.begin(&record.operation).await;
        let run = Run::new(Arc::clone(self), record, revision);
        let Err(error) = audited else {
            return run.drive().await;
        };
        warn!(%error, "a command is not in the audit: not carried out");
        let why = "the command could not be put into the audit, so it was not carried out; try again shortly";
        run.without_acting(End::of(&Fault::new(FaultKind::Unavailable, why)))
            .await
    }

    /// Waits for the end of a command that somebody else carries out, until the caller's deadline.
    async fn end_of(&self, context: &Context, asked: &Record) -> Result<Operation, Fault> {
        let id = &asked.operation.id;
        let mut pause = FIRST_LOOK;
        loop {
            match self.store.read(id).await {
                Ok(Some((first, _))) if first.operation.hard != asked.operation.hard => {
                    let reused = "this idempotency key was used for the same command with other parameters; \
                                  use another key";
                    return Err(Fault::new(FaultKind::Conflict, reused));
                }
                Ok(Some((first, _))) if first.operation.state.is_final() => return Ok(first.operation),
                // Where there is none yet, its request is just making it.
                Ok(_) => {}
                Err(error) => debug!(operation = %id, %error, "its record is read again"),
            }
            if context.remaining().is_zero() {
                return Err(Fault::new(FaultKind::Timeout, "the command has not ended yet"));
            }
            sleep(pause).await;
            pause = (pause * 2).min(LAST_LOOK);
        }
    }

    /// Looks for commands whose lease ran out, and carries them on. Each replica does; the bucket lets one succeed.
    async fn adopt(self: Arc<Self>) {
        let permits = Arc::new(Semaphore::new(ADOPTED_AT_ONCE));
        loop {
            sleep(self.settings.lease / 3).await;
            for id in self.view.orphans(unix_millis()) {
                let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                    return;
                };
                let this = Arc::clone(&self);
                tokio::spawn(async move {
                    if let Err(error) = this.carry_on(&id).await {
                        warn!(operation = %id, %error, "not carried on");
                    }
                    drop(permit);
                });
            }
        }
    }

    /// Takes over a command, if its lease really has run out, and carries it to its end.
    async fn carry_on(self: &Arc<Self>, id: &OperationId) -> Result<(), Stopped> {
        let Some(at_work) = AtWork::unless_already(self, id) else {
            return Ok(());
        };
        let stored = self.store.read(id).await.map_err(Stopped::Unwritten)?;
        let Some((mut record, revision)) = stored else {
            self.view.forget(id);
            return Ok(());
        };
        let state = record.operation.state;
        if record.newer || state.is_final() || record.lease.until_ms >= unix_millis() {
            return Ok(());
        }
        // Whoever died may have died before it could say so.
        if state == OperationState::Requested
            && let Err(error) = self.trail.begin(&record.operation).await
        {
            warn!(operation = %id, %error, "not adopted yet: it is not in the audit");
            return Ok(());
        }
        record.lease = self.lease();
        record.note(state, "adopted: the replica that carried it out no longer does");
        let written = self
            .store
            .replace(&record, revision)
            .await
            .map_err(Stopped::Unwritten)?;
        let Written::At(revision) = written else {
            return Ok(());
        };
        counter!("vmwatch_operations_adopted_total").increment(1);
        info!(operation = %id, %state, "adopted");
        Run::new(Arc::clone(self), record, revision).drive().await?;
        drop(at_work);
        Ok(())
    }

    /// Appends the counted refusals, when the service ends.
    pub(crate) async fn finish(&self) {
        self.trail.refusals().finish().await;
    }

    /// Appends a command that was refused because of the user's role or scope to the audit.
    pub(crate) async fn refused(&self, refused: Refused) {
        if refused.method.kind == Kind::Command {
            self.trail.refused(&refused).await;
        }
    }

    /// A command's record, for who may see its machine.
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

    /// A page of the newest commands on machines that the principal may see.
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
                    .is_none_or(|place| place.is_behind(operation))
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

/// A command that this replica carries out, for as long as this lives.
struct AtWork {
    operations: Arc<Operations>,
    id: OperationId,
}

impl AtWork {
    fn unless_already(operations: &Arc<Operations>, id: &OperationId) -> Option<Self> {
        let free = operations.lock_at_work().insert(id.clone());
        free.then(|| Self {
            operations: Arc::clone(operations),
            id: id.clone(),
        })
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.operations.lock_at_work().remove(&self.id);
    }
}

impl Operations {
    fn lock_at_work(&self) -> std::sync::MutexGuard<'_, HashSet<OperationId>> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
