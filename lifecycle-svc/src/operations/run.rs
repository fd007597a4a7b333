//! Carrying one command out, as the holder of its lease.
//!
//! ```text
//!        ┌─────────────────────────────────────┐
//!        v                                     │ wait a little
//!   look at the machine ──> machine::next ──> Wait
//!        ^                    │     └──> Done, Refuse, Fail, Unknown ──> audit, record, end
//!        │                   Act
//!        └── tell the driver <┴── record that it is told
//! ```
//!
//! What is to be done is written before it is done, by compare-and-set: whoever
//! finds a record that says "running" knows that the hypervisor may have been told, and who finds "requested" knows
//! that it was not.

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
    held::{Held, Stopped},
    record::{End, Record, plain_state},
};
use crate::{
    driver::DriverError,
    fleet::{Hypervisor, Located, Unowned},
    machine::{self, Action, Progress, Step, Told},
};

/// Between two looks at a machine: soon at first, since most commands take effect at once.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LAST_LOOK: Duration = Duration::from_secs(2);
/// How long a machine may take to show that it obeyed an act of which no answer came, once the deadline for another
/// has passed.
const SETTLE: Duration = Duration::from_secs(10);
/// A command that this replica carries out.
pub(super) struct Run {
    operations: Arc<Operations>,
    held: Held,
    told: Told,
    /// When the hypervisor was last told, or the command was adopted.
    told_at: Instant,
    /// The hypervisor that was told. Until it is to be told again it alone is asked for the VM's state.
    on: Option<Arc<Hypervisor>>,
    /// The hypervisor's words on the last act that failed.
    words: Option<String>,
}

impl Run {
    /// Carries out a command whose record was just written at this revision.
    pub(super) fn new(operations: Arc<Operations>, record: Record, revision: u64) -> Self {
        let told = match record.operation.state {
            OperationState::Requested => Told::Nothing,
            _ => Told::Unclear,
        };
        let store = operations.store.clone();
        let lease = operations.settings.lease;
        Self {
            operations,
            held: Held::new(store, record, revision, lease),
            told,
            told_at: Instant::now(),
            on: None,
            words: None,
        }
    }

    /// Carries it out to its end.
    pub(super) async fn drive(mut self) -> Result<Operation, Stopped> {
        let end = self.carry_out().await?;
        self.finish(end).await?;
        Ok(self.held.record.operation)
    }

    /// Ends it before anything is done.
    pub(super) async fn without_acting(mut self, end: End) -> Result<Operation, Stopped> {
        self.finish(end).await?;
        Ok(self.held.record.operation)
    }

    async fn carry_out(&mut self) -> Result<End, Stopped> {
        let verb = self.operation().verb;
        let mut pause = FIRST_LOOK;
        loop {
            match self.look().await? {
                Look::End(end) => return Ok(end),
                Look::Silent => {}
                Look::At(located) => match machine::next(verb, located.state, self.progress()) {
                    Step::Done => return Ok(End::Succeeded(located.state)),
                    Step::Refuse(why) => return Ok(self.failed(FaultKind::Conflict, why)),
                    Step::Fail(why) => {
                        self.hear_why(&located.hypervisor).await?;
                        return Ok(self.failed(FaultKind::Backend, why));
                    }
                    Step::Unknown => return Ok(End::Unknown(UNKNOWN.to_owned())),
                    Step::Act if !self.is_late() => {
                        // No act without asking every hypervisor just before: another may have the VM by now.
                        if self.on.take().is_some() {
                            continue;
                        }
                        if let Some(end) = self.act(&located.hypervisor).await? {
                            return Ok(end);
                        }
                        pause = FIRST_LOOK;
                        continue;
                    }
                    step @ (Step::Act | Step::Wait) => {
                        if let Some(end) = self.out_of_time(located.state, step == Step::Act) {
                            return Ok(end);
                        }
                    }
                },
            }
            self.held.during(sleep(pause)).await?;
            pause = (pause * 2).min(LAST_LOOK);
        }
    }

    /// What the hypervisor says of the machine, or how the command ends because it says nothing.
    async fn look(&mut self) -> Result<Look, Stopped> {
        Ok(match self.find().await? {
            Ok(located) => {
                self.held.record.operation.hypervisor = Some(located.hypervisor.name.clone());
                Look::At(located)
            }
            Err(Unowned::Driver(DriverError::NotFound)) => Look::End(self.absent()),
            Err(Unowned::Driver(error)) if self.told == Told::Nothing => {
                Look::End(End::of(&Fault::from(error)))
            }
            Err(refusal @ (Unowned::Several(_) | Unowned::LastOn(_))) => Look::End(self.disputed(&refusal)),
            Err(Unowned::Driver(error)) => {
                debug!(operation = %self.operation().id, %error, "no state; it is asked again");
                let silent = format!("the hypervisor does not answer: {error}");
                self.out_of_limit(&silent).map_or(Look::Silent, Look::End)
            }
        })
    }

    /// Asks the hypervisor that was told, or all of them.
    async fn find(&mut self) -> Result<Result<Located, Unowned>, Stopped> {
        let id = self.operation().instance_id.clone();
        if let Some(hypervisor) = self.on.clone() {
            match self.held.during(hypervisor.ask(&id)).await? {
                // It was moved, perhaps.
                Err(DriverError::NotFound) => self.on = None,
                Err(error) => return Ok(Err(error.into())),
                Ok(state) => return Ok(Ok(Located { hypervisor, state })),
            }
        }
        let fleet = Arc::clone(&self.operations.fleet);
        let starting = self.operation().verb == Verb::Start;
        self.held
            .during(async move { fleet.owner(&id, starting).await })
            .await
    }

    /// The end of a command whose VM more than one hypervisor has, or may have.
    fn disputed(&self, refusal: &Unowned) -> End {
        match self.told {
            Told::Nothing => End::Failed {
                kind: FaultKind::Conflict,
                message: format!("{refusal}; nothing was done"),
            },
            Told::Accepted | Told::Unclear => End::Unknown(format!(
                "{refusal}; the command was sent before, and may or may not have been carried out"
            )),
        }
    }

    /// The end of a command whose machine is not there (any more).
    fn absent(&self) -> End {
        match (self.told, self.operation().verb) {
            (Told::Nothing, _) => End::of(&vmwatch_api::no_such_vm()),
            // A machine without a definition is gone once it is off.
            (_, Verb::Stop | Verb::ForceStop) => End::Succeeded(MachineState::ShutOff),
            (_, Verb::Start | Verb::Reboot | Verb::Unknown) => {
                self.failed(FaultKind::Backend, "the machine is gone")
            }
        }
    }

    /// Tells the hypervisor, once that is on record. An end where it refused for good.
    async fn act(&mut self, hypervisor: &Arc<Hypervisor>) -> Result<Option<End>, Stopped> {
        let operation = self.operation();
        let (id, verb) = (operation.instance_id.clone(), operation.verb);
        let Some(action) = machine::action(verb, operation.hard) else {
            let why = "this version of the service does not know the command";
            return Ok(Some(self.failed(FaultKind::Internal, why)));
        };
        self.held.record.acts += 1;
        let telling = format!("telling {} to {}", hypervisor.name, plain_action(action));
        self.held.record.note(OperationState::Running, telling);
        self.held.write_until(self.operation().deadline_ms).await?;
        info!(operation = %self.operation().id, instance = %id, hypervisor = hypervisor.name, %verb, "telling it");
        let fence = self.held.fence();
        let told = self.held.during(hypervisor.tell(&id, action, &fence)).await?;
        if let Err(DriverError::NotBegun(why)) = told {
            self.held.record.acts -= 1;
            let not_told = format!("not sent to {}: {why}", hypervisor.name);
            self.held.record.note(self.operation().state, not_told);
            return Ok(None);
        }
        self.told_at = Instant::now();
        self.on = Some(Arc::clone(hypervisor));
        match told {
            Ok(()) => {
                self.told = Told::Accepted;
                self.held
                    .record
                    .note(OperationState::Running, format!("{} took it", hypervisor.name));
                Ok(None)
            }
            Err(error) => self.told_in_vain(hypervisor, error).await,
        }
    }

    /// After an act that failed: no answer leaves it unclear; a refusal is final unless the machine is, or is becoming,
    /// what it was asked to be, since somebody else may have been faster.
    async fn told_in_vain(
        &mut self,
        hypervisor: &Arc<Hypervisor>,
        error: DriverError,
    ) -> Result<Option<End>, Stopped> {
        warn!(operation = %self.operation().id, hypervisor = hypervisor.name, %error, "it did not take it");
        let said = format!("{} said: {error}", hypervisor.name);
        self.held.record.note(OperationState::Running, said);
        self.words = Some(error.to_string());
        match error {
            DriverError::Timeout | DriverError::Unavailable(_) | DriverError::NotBegun(_) => {
                self.told = Told::Unclear;
                Ok(None)
            }
            DriverError::NotFound => Ok(None),
            DriverError::Conflict(_) | DriverError::Rejected(_) => {
                let (driver, id) = (
                    Arc::clone(&hypervisor.driver),
                    self.operation().instance_id.clone(),
                );
                let state = self.held.during(async move { driver.state(&id).await }).await?;
                let afresh = Progress {
                    told: Told::Nothing,
                    ..self.progress()
                };
                let goes_on = state
                    .map(|state| machine::next(self.operation().verb, state, afresh))
                    .is_ok_and(|step| matches!(step, Step::Done | Step::Wait));
                if !goes_on {
                    return Ok(Some(End::of(&Fault::from(error))));
                }
                // What was refused of a reboot is still to be done; the others are being done by somebody else.
                if self.operation().verb != Verb::Reboot {
                    self.told = Told::Accepted;
                }
                Ok(None)
            }
        }
    }

    /// Asks the hypervisor why the machine is not as it was asked to be.
    async fn hear_why(&mut self, hypervisor: &Arc<Hypervisor>) -> Result<(), Stopped> {
        let (driver, id) = (
            Arc::clone(&hypervisor.driver),
            self.operation().instance_id.clone(),
        );
        if let Ok(Some(words)) = self.held.during(async move { driver.why(&id).await }).await? {
            self.words = Some(words);
        }
        Ok(())
    }

    fn progress(&self) -> Progress {
        Progress {
            told: self.told,
            acts: self.held.record.acts,
            since: self.told_at.elapsed(),
        }
    }

    /// Whether nobody waits for the command any more, so that it is not to be begun.
    fn is_late(&self) -> bool {
        unix_millis() >= self.operation().deadline_ms
    }

    /// The end of a command that has no time left for what is to be done next.
    fn out_of_time(&self, state: MachineState, to_act: bool) -> Option<End> {
        if self.is_late() && self.told == Told::Nothing {
            let so_far = match &self.words {
                None => "the deadline passed before the hypervisor was told; nothing was done".to_owned(),
                Some(words) => format!("the deadline passed while the hypervisor refused it: {words}"),
            };
            return Some(End::TimedOut(so_far));
        }
        let state = plain_state(state);
        if self.is_late() && to_act && self.told_at.elapsed() >= SETTLE {
            return Some(End::TimedOut(format!(
                "the machine is {state}, and the deadline for telling the hypervisor again has passed"
            )));
        }
        self.out_of_limit(&format!("the machine is {state}"))
    }

    /// The end of a command that was followed for as long as any is.
    fn out_of_limit(&self, so_far: &str) -> Option<End> {
        let limit = self.operations.settings.limit;
        let asked_at = Duration::from_millis(self.operation().requested_at_ms);
        let followed = Duration::from_millis(unix_millis()).saturating_sub(asked_at);
        (followed >= limit).then(|| {
            let message = format!("{so_far}, {} s after it was asked", followed.as_secs());
            End::TimedOut(message)
        })
    }

    fn failed(&self, kind: FaultKind, why: &str) -> End {
        let words = self
            .words
            .as_ref()
            .map(|words| format!(" (the hypervisor said: {words})"));
        End::Failed {
            kind,
            message: format!("{why}{}", words.unwrap_or_default()),
        }
    }

    /// Puts the end into the audit, then into the record: a crash in between makes the audit say it twice rather than
    /// not at all.
    async fn finish(&mut self, end: End) -> Result<(), Stopped> {
        let mut ended = self.held.record.clone();
        ended.end(end);
        let operations = Arc::clone(&self.operations);
        self.held.during(operations.trail.end(&ended.operation)).await?;
        self.held.record = ended;
        let limit = u64::try_from(self.operations.settings.limit.as_millis()).unwrap_or(u64::MAX);
        let written = self.held.write_until(unix_millis().saturating_add(limit)).await;
        if let Err(stopped) = written {
            counter!("vmwatch_operations_unrecorded_total").increment(1);
            error!(operation = %self.operation().id, error = %stopped, "its end is not on record");
            return Err(stopped);
        }
        self.tell();
        Ok(())
    }

    fn operation(&self) -> &Operation {
        &self.held.record.operation
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
            instance = %operation.instance_id,
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

const UNKNOWN: &str = "the hypervisor may or may not have done it: no answer came, and it is not to be done twice; \
                       look at the machine before asking again";

/// What came of a look at the machine.
enum Look {
    At(Located),
    Silent,
    End(End),
}

const fn plain_action(action: Action) -> &'static str {
    match action {
        Action::Start => "make it run",
        Action::Shutdown => "ask its system to shut down",
        Action::Reboot { hard: false } => "reboot it",
        Action::Reboot { hard: true } => "reset it",
        Action::Destroy => "cut its power",
    }
}
