//! Evaluates rules, in the replica that holds the lease.
//!
//! ```text
//! VMWATCH_EVALUATION ──> records ──> samples ─┐
//! inventory, labels, faults, operations ──────┼─> machine ──> writer ──> alerts ──> acknowledge records
//! stream of samples, arrivals ──> silence ────┘
//! ```
//!
//! [`machine`], [`samples`], [`parts`] and [`silence`] do no I/O. A change of an alert is written before the records
//! that caused it are acknowledged, and evaluating a record again makes the same alerts; so nothing is lost or doubled
//! if the program is killed at any moment.

mod checks;
#[cfg(test)]
mod examples;
mod health;
mod intake;
mod machine;
mod operations;
mod parts;
mod progress;
mod records;
mod samples;
mod silence;
#[cfg(test)]
mod tests;
mod tick;
pub(crate) mod watched;
mod writer;

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::TryStreamExt;
use metrics::gauge;
use mongodb::bson::doc;
use tokio::{
    sync::{
        Notify,
        mpsc::{self, error::TrySendError},
        watch,
    },
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::{
    alerts::{Alert, AlertState, RecordId, rules::Rule},
    time::unix_millis,
};
use vmwatch_bus::Bus;
use vmwatch_service::lifetime::until_done;

use self::{
    checks::Checks,
    health::Faults,
    intake::{Batch, Lag},
    machine::{ConditionKey, Machine, Step, Transition},
    operations::{FailuresByVm, Operations},
    progress::{Position, Saver},
    records::{Received, Records},
    samples::Samples,
    silence::{Health, Mass, Standstills},
    watched::Watched,
    writer::{Change, Work, Write, Writer},
};
use crate::{
    AlertError,
    definitions::DefinitionsHandle,
    events::Events,
    known_vms::{KnownVms, VmFacts},
    lease::Freshness,
    notify::Delivery,
    store::Store,
};

/// Interval at which everything but samples is evaluated.
const TICK: Duration = Duration::from_secs(1);
/// Number of works that the writer has waiting.
const WORKS: usize = 4;
/// Number of works that wait for the writer. Beyond it, only the flow of samples is evaluated.
const MAX_WAITING: usize = 8;
/// Maximum number of conditions that are reported as lost and not yet forgotten.
const MAX_LOST: usize = 1024;
/// How long to wait for the inventory and the labels, which do not exist if lifecycle-svc has never run.
const FIRST_READ: Duration = Duration::from_secs(2);

/// What the engine needs.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) bus: Bus,
    pub(crate) store: Store,
    pub(crate) definitions: DefinitionsHandle,
    pub(crate) known: KnownVms,
    pub(crate) events: Events,
    /// Notified when alerts have changed.
    pub(crate) changed: Arc<Notify>,
    pub(crate) delivery: Arc<Delivery>,
}

/// The sources that tasks of their own read.
struct Sources {
    health: watch::Receiver<Option<Health>>,
    faults: watch::Receiver<Option<Arc<Faults>>>,
    /// `None` until they were read for the first time.
    failures: watch::Receiver<Option<Arc<FailuresByVm>>>,
}

/// What the engine does next.
enum Next {
    Tick,
    Definitions,
    /// Forget a condition whose alert is not open in the database.
    Lost(ConditionKey),
    /// The writer has room for a work.
    Room,
    BatchIsDue,
    Record(Box<Result<Received, AlertError>>),
}

struct Engine {
    setup: Setup,
    freshness: Freshness,
    machine: Machine,
    samples: Samples,
    watched: Watched,
    /// Whether the watched names must be written.
    names_are_due: bool,
    standstills: Standstills,
    mass: Mass,
    was_not_receiving: bool,
    checks: Checks,
    saver: Saver,
    sources: Sources,
    records: Option<Records>,
    lag: Lag,
    /// Position of the newest evaluated record.
    evaluated: u64,
    saved: u64,
    batch: Batch,
    /// Works for which the writer has no room yet.
    waiting: VecDeque<Work>,
    queue: mpsc::Sender<Work>,
    written: watch::Receiver<u64>,
    lost: mpsc::Receiver<ConditionKey>,
    /// Open alerts that only the database had at the last comparison.
    unknown: HashSet<RecordId>,
    ticks: u64,
    /// The tick at which the stream of evaluation records is opened again.
    retry_at: u64,
}

/// Evaluates rules until the lease is lost or the program stops.
pub(crate) async fn run(setup: Setup, freshness: Freshness, term: CancellationToken) {
    let loaded = until_done("the stored alerts", &term, || load(&setup)).await;
    let (Some(loaded), Some(Some(_))) = (loaded, term.run_until_cancelled(setup.definitions.filled()).await)
    else {
        return;
    };
    term.run_until_cancelled(setup.known.filled(FIRST_READ)).await;
    let mut tasks = JoinSet::new();
    let mut engine = Engine::start(setup, freshness, loaded, &mut tasks, &term);
    engine.work(&term).await;
    term.cancel();
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            warn!(%error, "a background task of the evaluation of rules panicked");
        }
    }
    let position = engine.position();
    let Engine {
        saver,
        mut samples,
        standstills,
        ..
    } = engine;
    saver.finish(&mut samples, &standstills, position).await;
}

/// What the database has of earlier evaluations.
struct Loaded {
    open: Vec<Alert>,
    samples: Samples,
    stored: progress::Stored,
}

async fn load(setup: &Setup) -> Result<Loaded, AlertError> {
    let mut samples = Samples::default();
    let stored = progress::read(&setup.store, &mut samples).await?;
    Ok(Loaded {
        open: open_alerts(&setup.store).await?,
        samples,
        stored,
    })
}

/// All alerts that are pending, firing or acknowledged.
async fn open_alerts(store: &Store) -> Result<Vec<Alert>, AlertError> {
    let found = store.alerts.find(doc! { "open": true }).await?;
    let found = found.map_ok(|stored| stored.alert);
    Ok(found.try_collect().await?)
}

impl Engine {
    fn start(
        setup: Setup,
        freshness: Freshness,
        loaded: Loaded,
        tasks: &mut JoinSet<()>,
        term: &CancellationToken,
    ) -> Self {
        let now_ms = unix_millis();
        let operations = Arc::new(Operations::new(&setup.bus));
        let (queue, works) = mpsc::channel(WORKS);
        let (written_sender, written) = watch::channel(0);
        let (lost_sender, lost) = mpsc::channel(MAX_LOST);
        let writer = Writer {
            bus: setup.bus.clone(),
            freshness: freshness.clone(),
            store: setup.store.clone(),
            events: setup.events.clone(),
            operations: Arc::clone(&operations),
            changed: Arc::clone(&setup.changed),
            written: written_sender,
            lost: lost_sender,
        };
        tasks.spawn(writer.run(works, term.clone()));
        let sources = Sources::follow(&setup.bus, &operations, tasks, term);
        let saved = loaded.stored.saved_sequence;
        let mut engine = Self {
            checks: Checks::new(&setup.bus, &setup.store, &operations),
            saver: Saver::new(&setup.store, saved, now_ms),
            setup,
            freshness,
            machine: Machine::default(),
            samples: loaded.samples,
            watched: Watched::default(),
            names_are_due: true,
            standstills: loaded.stored.standstills,
            mass: Mass::default(),
            was_not_receiving: false,
            sources,
            records: None,
            lag: Lag::new(now_ms),
            evaluated: 0,
            saved,
            batch: Batch::default(),
            waiting: VecDeque::new(),
            queue,
            written,
            lost,
            unknown: HashSet::new(),
            ticks: 0,
            retry_at: 0,
        };
        let mut out = Vec::new();
        let definitions = engine.setup.definitions.current();
        engine.machine.set_rules(&definitions, now_ms, &mut out);
        engine.log_rules();
        for alert in &loaded.open {
            engine.machine.restore(alert, now_ms, &mut out);
        }
        engine.hand_over(out);
        engine
    }

    /// Evaluates records and everything else, until the lease is lost or the program stops.
    async fn work(&mut self, term: &CancellationToken) {
        let mut definitions = self.setup.definitions.changes();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Without a certain lease, another replica may evaluate the records.
            let reads = self.records.is_some() && self.waiting.is_empty() && self.freshness.is_fresh();
            let next = tokio::select! {
                biased;
                () = term.cancelled() => return,
                _ = ticks.tick() => Next::Tick,
                Ok(()) = definitions.changed() => Next::Definitions,
                Some(key) = self.lost.recv() => Next::Lost(key),
                permit = self.queue.reserve(), if !self.waiting.is_empty() => match permit {
                    Ok(_) => Next::Room,
                    Err(_) => return,
                },
                () = sleep_until(self.batch.due()), if !self.batch.is_empty() => Next::BatchIsDue,
                received = intake::next(&mut self.records), if reads => Next::Record(Box::new(received)),
            };
            match next {
                Next::Tick => {
                    term.run_until_cancelled(self.tick()).await;
                }
                Next::Definitions => {
                    definitions.borrow_and_update();
                    self.take_definitions();
                }
                Next::Lost(key) => self.machine.forget(&key),
                Next::Room => self.send_waiting(),
                Next::BatchIsDue => self.finish_batch(),
                Next::Record(received) => self.receive(*received),
            }
        }
    }

    /// Uses new rules.
    fn take_definitions(&mut self) {
        let definitions = self.setup.definitions.current();
        let mut out = Vec::new();
        self.machine.set_rules(&definitions, unix_millis(), &mut out);
        self.log_rules();
        self.hand_over(out);
        self.names_are_due = true;
    }

    fn log_rules(&self) {
        let rules = self.machine.rules().iter();
        let rules: Vec<&str> = rules.map(|rule| rule.id.as_str()).collect();
        debug!(?rules, "evaluating these rules");
    }

    /// Hands changes to the writer that no record caused.
    fn hand_over(&mut self, transitions: Vec<Transition>) {
        if transitions.is_empty() {
            return;
        }
        // Changes of the same condition stay in their order.
        self.finish_batch();
        let writes = self.writes(transitions);
        self.send(writes, None);
    }

    fn send(&mut self, writes: Vec<Write>, acknowledges: Option<async_nats::jetstream::Message>) {
        self.waiting.push_back(Work {
            writes,
            acknowledges,
            sequence: self.evaluated,
        });
        self.send_waiting();
    }

    /// Gives the writer the works that wait, as far as it has room.
    fn send_waiting(&mut self) {
        while let Some(work) = self.waiting.pop_front() {
            if let Err(TrySendError::Full(work) | TrySendError::Closed(work)) = self.queue.try_send(work) {
                self.waiting.push_front(work);
                return;
            }
        }
    }

    fn position(&self) -> Position {
        Position {
            evaluated: self.evaluated,
            written: *self.written.borrow(),
        }
    }

    /// Whether the writer is so late that only the flow of samples is evaluated.
    fn is_stuck(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    fn export(&self, now_ms: u64) {
        #[expect(clippy::cast_precision_loss, reason = "the numbers are far below 2^52")]
        let export = |name: &'static str, value: u64| gauge!(name).set(value as f64);
        export("vmwatch_alert_conditions", self.machine.len() as u64);
        export("vmwatch_alert_rules", self.machine.rules().len() as u64);
        export("vmwatch_alert_lag_milliseconds", self.lag.behind_ms(now_ms));
    }

    /// The writes for changes.
    fn writes(&self, transitions: Vec<Transition>) -> Vec<Write> {
        let writes = transitions
            .into_iter()
            .filter_map(|transition| self.write(transition));
        writes.collect()
    }

    fn write(&self, transition: Transition) -> Option<Write> {
        let Transition {
            key,
            step,
            at_ms,
            since_ms,
            value,
        } = transition;
        let facts = |key: &ConditionKey| match &key.vm {
            Some(vm) => self.setup.known.facts(vm),
            None => VmFacts::default(),
        };
        let change = match step {
            Step::Begin { fires } => {
                // A rule that was removed since ends its conditions anyway.
                let rule = self.machine.rule(&key.rule)?;
                let fired_ms = fires.then_some(at_ms);
                Change::Begin(Box::new(new_alert(
                    rule,
                    &key,
                    facts(&key),
                    since_ms,
                    fired_ms,
                    value,
                )))
            }
            Step::Fire => Change::Fire {
                value,
                facts: Box::new(facts(&key)),
            },
            Step::Refresh => Change::Refresh { value },
            Step::Resolve { held_ms } => Change::Resolve { value, held_ms },
            Step::Withdraw => Change::Withdraw,
        };
        Some(Write { key, at_ms, change })
    }
}

impl Sources {
    fn follow(
        bus: &Bus,
        operations: &Arc<Operations>,
        tasks: &mut JoinSet<()>,
        term: &CancellationToken,
    ) -> Self {
        let (health_sender, health) = watch::channel(None);
        let (faults_sender, faults) = watch::channel(None);
        let (failures_sender, failures) = watch::channel(None);
        let (stream, agents) = (bus.clone(), bus.clone());
        let newest = Arc::clone(operations);
        let token = term.clone();
        tasks.spawn(async move {
            let following = async {
                tokio::join!(
                    health::follow_stream(stream, health_sender),
                    health::follow_faults(agents, faults_sender),
                    newest.follow(failures_sender),
                )
            };
            token.run_until_cancelled(Box::pin(following)).await;
        });
        Self {
            health,
            faults,
            failures,
        }
    }
}

/// A new alert of a condition.
fn new_alert(
    rule: &Rule,
    key: &ConditionKey,
    facts: VmFacts,
    since_ms: u64,
    fired_ms: Option<u64>,
    value: Option<f64>,
) -> Alert {
    let vm = key.vm.as_ref().map_or("", |vm| vm.as_str());
    let (revision, since) = (rule.revision.to_string(), since_ms.to_string());
    Alert {
        id: RecordId::from_parts(&[rule.id.as_str(), &revision, vm, &key.subject, &since]),
        rule_id: rule.id.clone(),
        rule_name: rule.spec.name.clone(),
        severity: rule.spec.severity,
        condition: rule.spec.condition.clone(),
        instance_id: key.vm.clone(),
        vm_name: facts.name,
        hypervisor: facts.hypervisors.first().map(std::string::ToString::to_string),
        labels: facts.labels,
        subject: key.subject.clone(),
        state: if fired_ms.is_some() {
            AlertState::Firing
        } else {
            AlertState::Pending
        },
        value,
        since_ms,
        fired_ms,
        acknowledged_ms: None,
        acknowledged_by: None,
        resolved_ms: None,
        ended_by: None,
        culprits: None,
        revision: 1,
    }
}

/// A moment that is far enough away that nothing waits for it.
fn never() -> Instant {
    Instant::now() + Duration::from_hours(24)
}
