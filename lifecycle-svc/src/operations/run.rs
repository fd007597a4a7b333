//! Carries out one operation while holding its lease.
//!
//! ```text
//!        ┌─────────────────────────────────────────────┐
//!        v                                             │ pause
//!   read the VM's state ──> state_machine::next ──────> Wait
//!        ^                          │     └──> Done, Refuse, Fail, Unknown ──> audit, record, end
//!        │                         Act
//!        └── send the action <──────┴── record that it is being sent
//! ```
//!
//! Each step is written by compare-and-set before it is taken: a record in state "running" means that the action may
//! have been sent, and "requested" means that it was not.

use std::{sync::Arc, time::Duration};

use metrics::{counter, histogram};
use tokio::time::{Instant, sleep};
use tracing::{debug, error, info, warn};
use vmwatch_api::{
    lifecycle::{MachineState, Operation, OperationState, Verb},
    time::unix_millis,
    wire::{Fault, FaultKind},
};

use super::{
    Operations,
    claim::{Claimed, Ended},
    leased::{Aborted, Leased},
    record::{End, Record},
};
use crate::{
    driver::DriverError,
    fleet::{Hypervisor, Located, OwnerError, Wanted},
    state_machine::{self, ActOutcome, Action, Progress, Step, describe_state},
};

/// Bounds of the interval at which the VM's state is polled. The interval is short at first, because most actions take
/// effect at once.
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(50);
const MAX_POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Time, counted from the last attempt to send the action, that the VM has to show its effect if the deadline allows no
/// further attempt.
const SETTLE: Duration = Duration::from_secs(10);

/// An operation that this replica carries out.
pub(super) struct Run {
    operations: Arc<Operations>,
    leased: Leased,
    outcome: ActOutcome,
    /// Time at which the action was last sent, or the operation was adopted.
    acted_at: Instant,
    /// Hypervisor that the action was sent to. Until the next attempt only this hypervisor is asked for the VM's state.
    sent_to: Option<Arc<Hypervisor>>,
    /// The hypervisor's message about the last attempt that failed.
    reason: Option<String>,
}

impl Run {
    /// Takes over an operation whose record was just written at this revision.
    pub(super) fn new(operations: Arc<Operations>, record: Record, revision: u64) -> Self {
        let outcome = match record.operation.state {
            OperationState::Requested => ActOutcome::NotSent,
            _ => ActOutcome::Unknown,
        };
        let store = operations.store.clone();
        let lease = operations.settings.lease;
        Self {
            operations,
            leased: Leased::new(store, record, revision, lease),
            outcome,
            acted_at: Instant::now(),
            sent_to: None,
            reason: None,
        }
    }

    /// Carries out the operation to its end.
    pub(super) async fn drive(mut self) -> Result<Operation, Aborted> {
        let end = self.carry_out().await?;
        self.release_claim(&end).await?;
        self.finish(end).await?;
        Ok(self.leased.record.operation)
    }

    /// Ends the operation without sending an action.
    pub(super) async fn end_without_acting(mut self, end: End) -> Result<Operation, Aborted> {
        self.finish(end).await?;
        Ok(self.leased.record.operation)
    }

    async fn carry_out(&mut self) -> Result<End, Aborted> {
        let (verb, hard) = (self.operation().verb, self.operation().hard);
        let mut pause = MIN_POLL_INTERVAL;
        loop {
            match self.observe().await? {
                Observation::End(end) => return Ok(end),
                Observation::Unreachable => {}
                Observation::State(located) => {
                    match state_machine::next(verb, hard, located.vm, self.progress()) {
                        Step::Done => return Ok(End::Succeeded(located.vm.state)),
                        Step::Refuse(why) => return Ok(self.failed(FaultKind::Conflict, why.text())),
                        Step::Fail(why) => {
                            self.fetch_reason(&located.hypervisor).await?;
                            return Ok(self.failed(FaultKind::Backend, why));
                        }
                        Step::Unknown => return Ok(End::Unknown(UNKNOWN.to_owned())),
                        Step::Act if !self.is_late() => {
                            // Ask every hypervisor immediately before each attempt, because the VM may have moved to
                            // another one.
                            if self.sent_to.take().is_some() {
                                continue;
                            }
                            match self.claim(&located.hypervisor).await? {
                                Claimed::Held => {
                                    if let Some(end) = self.act(&located.hypervisor).await? {
                                        return Ok(end);
                                    }
                                    pause = MIN_POLL_INTERVAL;
                                    continue;
                                }
                                Claimed::Taken => continue,
                                Claimed::ByOther => {
                                    if let Some(end) = self.out_of_time_for_claim(located.vm.state) {
                                        return Ok(end);
                                    }
                                }
                                Claimed::Unsettled(on) => {
                                    return Ok(self.disputed(&OwnerError::Unsettled(on)));
                                }
                            }
                        }
                        step @ (Step::Act | Step::Wait) => {
                            if let Some(end) = self.out_of_time(located.vm.state, step == Step::Act) {
                                return Ok(end);
                            }
                        }
                    }
                }
            }
            self.leased.during(sleep(pause)).await?;
            pause = (pause * 2).min(MAX_POLL_INTERVAL);
        }
    }

    /// Reads the VM's state. If it cannot be read within the time limit, ends the operation.
    async fn observe(&mut self) -> Result<Observation, Aborted> {
        Ok(match self.locate().await? {
            Ok(located) => {
                self.leased.record.operation.hypervisor = Some(located.hypervisor.name.clone());
                Observation::State(located)
            }
            Err(OwnerError::Driver(DriverError::NotFound)) => Observation::End(self.absent()),
            Err(OwnerError::Driver(error)) if self.outcome == ActOutcome::NotSent => {
                Observation::End(End::from_fault(&Fault::from(error)))
            }
            Err(OwnerError::Driver(error)) => {
                debug!(operation = %self.operation().id, %error, "reading the VM's state for an operation failed; retrying");
                let message = format!("the hypervisor does not answer: {error}");
                self.out_of_limit(&message)
                    .map_or(Observation::Unreachable, Observation::End)
            }
            Err(refusal) => Observation::End(self.disputed(&refusal)),
        })
    }

    /// Reads the VM's state from the hypervisor that the action was sent to, or else finds the VM among all
    /// hypervisors.
    async fn locate(&mut self) -> Result<Result<Located, OwnerError>, Aborted> {
        let id = self.operation().instance_id.clone();
        if let Some(hypervisor) = self.sent_to.clone() {
            match self.leased.during(hypervisor.state(&id)).await? {
                // The hypervisor no longer has the VM; it may have been migrated.
                Err(DriverError::NotFound) => self.sent_to = None,
                Err(error) => return Ok(Err(error.into())),
                Ok(vm) => return Ok(Ok(Located { hypervisor, vm })),
            }
        }
        let fleet = Arc::clone(&self.operations.fleet);
        let starting = self.operation().verb == Verb::Start;
        let named = self.operation().requested_hypervisor.clone();
        let locating = async move {
            let wanted = Wanted {
                id: &id,
                hypervisor: named.as_deref(),
                starting,
            };
            fleet.owner(wanted).await
        };
        self.leased.during(locating).await
    }

    /// Claims the VM before it is started, so that no other operation starts it on another hypervisor at the same time.
    async fn claim(&mut self, hypervisor: &Arc<Hypervisor>) -> Result<Claimed, Aborted> {
        if !self.needs_claim() {
            return Ok(Claimed::Held);
        }
        let (operations, on) = (Arc::clone(&self.operations), Arc::clone(hypervisor));
        let (id, operation_id) = (self.operation().instance_id.clone(), self.operation().id.clone());
        let was_sent = self.leased.record.acts > 0;
        let claiming = async move {
            operations
                .claims
                .take(&id, &on.name, &operation_id, was_sent)
                .await
        };
        let claimed = self.leased.during(claiming).await?;
        Ok(claimed.unwrap_or_else(|error| {
            warn!(operation = %self.operation().id, %error, "claiming the start of a VM failed; retrying");
            Claimed::ByOther
        }))
    }

    fn needs_claim(&self) -> bool {
        self.operation().verb == Verb::Start && self.operations.fleet.hypervisors().len() > 1
    }

    /// Releases the claim on starting the VM, before the end of the operation is recorded.
    async fn release_claim(&mut self, end: &End) -> Result<(), Aborted> {
        if !self.needs_claim() {
            return Ok(());
        }
        let ended = match (end, self.outcome) {
            (End::Succeeded(_), _) => Ended::Running,
            (End::Failed { .. }, ActOutcome::Unknown)
            | (End::TimedOut(_) | End::Unknown(_), ActOutcome::Accepted | ActOutcome::Unknown) => {
                Ended::Unsettled
            }
            (End::Failed { .. } | End::TimedOut(_) | End::Unknown(_), _) => Ended::Settled,
        };
        let operations = Arc::clone(&self.operations);
        let (id, operation_id) = (self.operation().instance_id.clone(), self.operation().id.clone());
        let releasing = async move { operations.claims.release(&id, &operation_id, ended).await };
        self.leased.during(releasing).await
    }

    /// How an operation ends if several hypervisors have its VM, or may have it.
    fn disputed(&self, refusal: &OwnerError) -> End {
        match self.outcome {
            ActOutcome::NotSent => End::Failed {
                kind: FaultKind::Conflict,
                message: format!("{refusal}; nothing was done"),
            },
            ActOutcome::Accepted | ActOutcome::Unknown => End::Unknown(format!(
                "{refusal}; the action was sent before, and may or may not have been carried out"
            )),
        }
    }

    /// How an operation ends if its VM does not exist, or no longer exists.
    fn absent(&self) -> End {
        match (self.outcome, self.operation().verb) {
            (ActOutcome::NotSent, _) => End::from_fault(&vmwatch_api::no_such_vm()),
            // libvirt removes a transient domain when it is shut off, so a missing VM means success here.
            (_, Verb::Stop | Verb::ForceStop) => End::Succeeded(MachineState::ShutOff),
            (_, Verb::Start | Verb::Reboot | Verb::Unknown) => {
                self.failed(FaultKind::Backend, "the VM no longer exists")
            }
        }
    }

    /// Records the attempt, then sends the action to the hypervisor. Returns how the operation ends if the hypervisor
    /// refused the action for good.
    async fn act(&mut self, hypervisor: &Arc<Hypervisor>) -> Result<Option<End>, Aborted> {
        let operation = self.operation();
        let (id, verb) = (operation.instance_id.clone(), operation.verb);
        let Some(action) = state_machine::action(verb, operation.hard) else {
            let why = "this version of the service does not know the action";
            return Ok(Some(self.failed(FaultKind::Internal, why)));
        };
        self.leased.record.acts += 1;
        let sending = format!("sending to {}: {}", hypervisor.name, describe_action(action));
        self.leased.record.note(OperationState::Running, sending);
        self.leased.write_with_retry(self.operation().deadline_ms).await?;
        info!(operation = %self.operation().id, instance_id = %id, hypervisor = hypervisor.name, %verb, "sending action to hypervisor");
        let fence = self.leased.fence();
        let sent = self.leased.during(hypervisor.send(&id, action, &fence)).await?;
        if let Err(DriverError::NotBegun(why)) = sent {
            self.leased.record.acts -= 1;
            let not_sent = format!("not sent to {}: {why}", hypervisor.name);
            self.leased.record.note(self.operation().state, not_sent);
            return Ok(None);
        }
        self.acted_at = Instant::now();
        self.sent_to = Some(Arc::clone(hypervisor));
        match sent {
            Ok(()) => {
                self.outcome = ActOutcome::Accepted;
                self.leased.record.note(
                    OperationState::Running,
                    format!("{} accepted it", hypervisor.name),
                );
                Ok(None)
            }
            Err(error) => self.act_failed(hypervisor, error).await,
        }
    }

    /// Handles a failed attempt. If the hypervisor did not answer, the outcome is unknown. A refusal is final, unless
    /// the VM already is in the wanted state or on its way there because another client was faster.
    async fn act_failed(
        &mut self,
        hypervisor: &Arc<Hypervisor>,
        error: DriverError,
    ) -> Result<Option<End>, Aborted> {
        warn!(operation = %self.operation().id, hypervisor = hypervisor.name, %error, "sending the action to the hypervisor failed");
        let said = format!("{} said: {error}", hypervisor.name);
        self.leased.record.note(OperationState::Running, said);
        self.reason = Some(error.to_string());
        match error {
            DriverError::Timeout | DriverError::Unavailable(_) | DriverError::NotBegun(_) => {
                self.outcome = ActOutcome::Unknown;
                Ok(None)
            }
            DriverError::NotFound => Ok(None),
            DriverError::Conflict(_) | DriverError::Rejected(_) => {
                let (driver, id) = (
                    Arc::clone(&hypervisor.driver),
                    self.operation().instance_id.clone(),
                );
                let state = self.leased.during(async move { driver.state(&id).await }).await?;
                let afresh = Progress {
                    outcome: ActOutcome::NotSent,
                    ..self.progress()
                };
                let operation = self.operation();
                let goes_on = state
                    .map(|vm| state_machine::next(operation.verb, operation.hard, vm, afresh))
                    .is_ok_and(|step| matches!(step, Step::Done | Step::Wait));
                if !goes_on {
                    return Ok(Some(End::from_fault(&Fault::from(error))));
                }
                // A reboot that was refused still has to be done; any other action is already being done by another
                // client.
                if self.operation().verb != Verb::Reboot {
                    self.outcome = ActOutcome::Accepted;
                }
                Ok(None)
            }
        }
    }

    /// Asks the hypervisor why the VM is not in the wanted state.
    async fn fetch_reason(&mut self, hypervisor: &Arc<Hypervisor>) -> Result<(), Aborted> {
        let (driver, id) = (
            Arc::clone(&hypervisor.driver),
            self.operation().instance_id.clone(),
        );
        if let Ok(Some(words)) = self
            .leased
            .during(async move { driver.failure_reason(&id).await })
            .await?
        {
            self.reason = Some(words);
        }
        Ok(())
    }

    fn progress(&self) -> Progress {
        Progress {
            outcome: self.outcome,
            acts: self.leased.record.acts,
            since: self.acted_at.elapsed(),
        }
    }

    /// Whether the deadline has passed, after which the action must not be sent any more.
    fn is_late(&self) -> bool {
        unix_millis() >= self.operation().deadline_ms
    }

    /// How the operation ends if no time is left for its next step; `None` if there is time.
    fn out_of_time(&self, state: MachineState, to_act: bool) -> Option<End> {
        if self.is_late() && self.outcome == ActOutcome::NotSent {
            let so_far = match &self.reason {
                None => "the deadline passed before the action was sent; nothing was done".to_owned(),
                Some(words) => {
                    format!("the deadline passed while the hypervisor refused the action: {words}")
                }
            };
            return Some(End::TimedOut(so_far));
        }
        let state = describe_state(state);
        if self.is_late() && to_act && self.acted_at.elapsed() >= SETTLE {
            return Some(End::TimedOut(format!(
                "the VM is {state}, and the deadline for another attempt has passed"
            )));
        }
        self.out_of_limit(&format!("the VM is {state}"))
    }

    /// Like [`Run::out_of_time`], for an operation that could not claim the start of the VM.
    fn out_of_time_for_claim(&self, state: MachineState) -> Option<End> {
        if self.is_late() && self.outcome == ActOutcome::NotSent {
            let text = "another operation is starting this VM; nothing was done; try again when that operation has ended, at the latest in 15 minutes";
            return Some(End::TimedOut(text.to_owned()));
        }
        self.out_of_time(state, false)
    }

    /// How the operation ends if it has reached its time limit; `None` if it has not.
    fn out_of_limit(&self, so_far: &str) -> Option<End> {
        let limit = self.operations.settings.limit;
        let asked_at = Duration::from_millis(self.operation().requested_at_ms);
        let followed = Duration::from_millis(unix_millis()).saturating_sub(asked_at);
        (followed >= limit).then(|| {
            let message = format!("{so_far}, {} s after the request", followed.as_secs());
            End::TimedOut(message)
        })
    }

    fn failed(&self, kind: FaultKind, why: &str) -> End {
        let words = self
            .reason
            .as_ref()
            .map(|words| format!(" (the hypervisor said: {words})"));
        End::Failed {
            kind,
            message: format!("{why}{}", words.unwrap_or_default()),
        }
    }

    /// Writes the end of the operation to the audit log first and then to the record. After a crash between the two
    /// writes the audit log may contain the end twice, but the end is never missing there.
    async fn finish(&mut self, end: End) -> Result<(), Aborted> {
        let mut ended = self.leased.record.clone();
        ended.end(end);
        let operations = Arc::clone(&self.operations);
        self.leased.during(operations.trail.end(&ended)).await?;
        self.leased.record = ended;
        let limit = u64::try_from(self.operations.settings.limit.as_millis()).unwrap_or(u64::MAX);
        let written = self
            .leased
            .write_with_retry(unix_millis().saturating_add(limit))
            .await;
        if let Err(stopped) = written {
            counter!("vmwatch_operations_unrecorded_total").increment(1);
            error!(operation = %self.operation().id, error = %stopped, "writing the end of an operation to its record failed");
            return Err(stopped);
        }
        self.tell();
        Ok(())
    }

    fn operation(&self) -> &Operation {
        &self.leased.record.operation
    }

    fn tell(&self) {
        let operation = self.operation();
        let took = unix_millis().saturating_sub(operation.requested_at_ms);
        let (verb, state) = (operation.verb.as_str(), operation.state.as_str());
        counter!("vmwatch_operations_total", "verb" => verb, "state" => state).increment(1);
        histogram!("vmwatch_operation_seconds", "verb" => verb)
            .record(Duration::from_millis(took).as_secs_f64());
        info!(
            operation = %operation.id,
            instance_id = %operation.instance_id,
            hypervisor = operation.hypervisor,
            user = operation.user,
            verb,
            state,
            took_ms = took,
            "{}",
            operation.history.last().map_or("", |event| event.text.as_str()),
        );
    }
}

const UNKNOWN: &str = "the action may or may not have taken effect: the hypervisor did not answer, and the action must not be repeated; \
                       check the VM before trying again";

/// Result of reading the state of the operation's VM.
enum Observation {
    State(Located),
    Unreachable,
    End(End),
}

const fn describe_action(action: Action) -> &'static str {
    match action {
        Action::Start => "start the VM",
        Action::Shutdown => "ask the guest to shut down",
        Action::Reboot { hard: false } => "reboot the guest",
        Action::Reboot { hard: true } => "reset the VM",
        Action::Destroy => "cut the VM's power",
    }
}
