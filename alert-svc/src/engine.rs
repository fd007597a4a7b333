//! Evaluates rules, in the replica that holds the lease.
//!
//! ```text
//! VMWATCH_EVALUATION ──> records ──> samples ─┐
//! inventory, labels, faults, operations ──────┼─> machine ──> writer ──> alerts ──> acknowledge records
//! stream of samples, arrivals ──> silence ────┘
//! ```
//!
//! [`machine`], [`samples`], [`delay`], [`parts`] and [`silence`] do no I/O. A change of an alert is written before the
//! records that caused it are acknowledged, and evaluating a record again makes the same alerts; so nothing is lost or
//! doubled if the program is killed at any moment.

mod checks;
mod delay;
#[cfg(test)]
mod examples;
mod handover;
mod health;
mod intake;
mod machine;
mod operations;
#[cfg(test)]
mod outages;
mod parts;
mod progress;
mod records;
mod samples;
mod silence;
mod sources;
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
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::{
    InstanceId,
    alerts::{Alert, RecordId},
    time::unix_millis,
};
use vmwatch_bus::Bus;
use vmwatch_service::lifetime::until_done;

use self::{
    checks::Checks,
    intake::{Batch, Lag},
    machine::{ConditionKey, Machine},
    operations::Operations,
    progress::Saver,
    records::{Received, Records},
    samples::Samples,
    silence::{Mass, Standstills},
    sources::Sources,
    watched::Watched,
    writer::{Work, Writer},
};
use crate::{
    AlertError, definitions::DefinitionsHandle, events::Events, known_vms::KnownVms, lease::Freshness,
    notify::Delivery, store::Store,
};

/// Interval at which everything but samples is evaluated.
const TICK: Duration = Duration::from_secs(1);
/// Number of works that the writer has waiting.
const WORKS: usize = 4;
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
    /// VMs that may have been removed and are still to be checked.
    suspects: Vec<InstanceId>,
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
            suspects: Vec::new(),
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

    fn export(&self, now_ms: u64) {
        #[expect(clippy::cast_precision_loss, reason = "the numbers are far below 2^52")]
        let number = |value: u64| value as f64;
        gauge!("vmwatch_alert_conditions").set(number(self.machine.len() as u64));
        gauge!("vmwatch_alert_rules").set(number(self.machine.rules().len() as u64));
        gauge!("vmwatch_alert_lag_milliseconds").set(number(self.lag.behind_ms(now_ms)));
    }
}

/// A moment that is far enough away that nothing waits for it.
fn never() -> Instant {
    Instant::now() + Duration::from_hours(24)
}
