//! The parts of the simulation: agents, the stream of samples, metrics-svc, the engine of alert-svc, and the database.

use std::collections::VecDeque;

use tempfile::TempDir;
use testkit::{Database, Nats};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinSet, yield_now},
};
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    InstanceId,
    alerts::{AlertState, evaluation::EvaluationRecord, rules::RuleSpec},
    time::unix_millis,
};

use super::setup::{AGENTS, setup, vm};
use crate::{
    engine::{Engine, Setup, WORKS, examples::record, intake::Lag, load, silence::Health, writer},
    lease::Freshness,
    store::Store,
};

/// Interval of the samples of an agent, in seconds.
const INTERVAL: u64 = 10;

/// What is down during the outage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Nats,
    Database,
    Metrics,
    Alert,
}

pub(super) struct World {
    setup: Setup,
    term: CancellationToken,
    /// `None` while alert-svc is down.
    engine: Option<Engine>,
    works: mpsc::Receiver<writer::Work>,
    health: watch::Sender<Option<Health>>,
    /// When the stream of samples last answered.
    answered_ms: u64,
    pub(super) now_ms: u64,
    pub(super) down: Option<Part>,
    /// Whether the VM of the first agent has failed.
    pub(super) has_failed: bool,
    /// Samples that agents could not send.
    spooled: Vec<EvaluationRecord>,
    /// Samples that metrics-svc has not stored, in the order of their arrival.
    samples: VecDeque<EvaluationRecord>,
    /// Records that alert-svc has not evaluated.
    records: VecDeque<EvaluationRecord>,
    /// All changes of alerts that the database has.
    written: Vec<writer::Write>,
    _servers: (Nats, Database, TempDir),
}

impl Drop for World {
    fn drop(&mut self) {
        self.term.cancel();
    }
}

impl World {
    pub(super) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (nats, database) = tokio::join!(Nats::start(folder.path()), Database::start(folder.path()));
        let term = CancellationToken::new();
        let bus = nats.connect("a test").await;
        let setup = setup(bus, Store::new(&database.handle()), &term).await;
        let (_, works) = mpsc::channel(1);
        let now_ms = unix_millis();
        let mut world = Self {
            setup,
            term,
            engine: None,
            works,
            health: watch::Sender::new(None),
            answered_ms: now_ms,
            now_ms,
            down: None,
            has_failed: false,
            spooled: Vec::new(),
            samples: VecDeque::new(),
            records: VecDeque::new(),
            written: Vec::new(),
            _servers: (nats, database, folder),
        };
        world.start_engine().await;
        world
    }

    /// Starts the engine with what the database has, as at the start of alert-svc. The simulation does the work of its
    /// tasks: it writes changes and observes the stream of samples.
    pub(super) async fn start_engine(&mut self) {
        let loaded = load(&self.setup).await.unwrap();
        let mut tasks = JoinSet::new();
        // Without a fresh lease, the engine does not read the stream of evaluation records itself.
        let freshness = Freshness::expired();
        let mut engine = Engine::start(self.setup.clone(), freshness, loaded, &mut tasks, &self.term);
        let (queue, works) = mpsc::channel(WORKS);
        (engine.queue, self.works) = (queue, works);
        engine.sources.health = self.health.subscribe();
        self.engine = Some(engine);
    }

    /// Stops the engine, as at the end of alert-svc.
    pub(super) async fn stop_engine(&mut self) {
        let engine = self.engine.take().unwrap();
        let position = engine.position();
        let Engine {
            saver,
            mut samples,
            standstills,
            ..
        } = engine;
        saver.finish(&mut samples, &standstills, position).await;
    }

    pub(super) async fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now_ms += 1000;
            self.report();
            if !matches!(self.down, Some(Part::Nats | Part::Database | Part::Metrics)) {
                self.records.extend(self.samples.drain(..));
            }
            self.observe();
            self.evaluate().await;
            // The tasks that follow the inventory run as well.
            yield_now().await;
        }
    }

    /// Sends the samples of the agents that are due. After an outage of NATS, they send their spools first.
    fn report(&mut self) {
        let (now_ms, first) = (self.now_ms, u64::from(self.has_failed));
        let is_due = |agent: &u64| (now_ms / 1000 + agent).is_multiple_of(INTERVAL);
        let due = (first..AGENTS)
            .filter(is_due)
            .map(|agent| record(&vm(agent), now_ms));
        if self.down == Some(Part::Nats) {
            self.spooled.extend(due);
            return;
        }
        let spooled = self.spooled.drain(..).map(|record| EvaluationRecord {
            arrived_ms: now_ms,
            ..record
        });
        self.samples.extend(spooled.chain(due));
    }

    /// Observes the stream of samples, as the engine's own task does.
    fn observe(&mut self) {
        let health = if self.down == Some(Part::Nats) {
            Health {
                failing_since_ms: Some(self.answered_ms),
                oldest_ms: None,
            }
        } else {
            self.answered_ms = self.now_ms;
            Health {
                failing_since_ms: None,
                oldest_ms: self.samples.front().map(|oldest| oldest.arrived_ms),
            }
        };
        self.health.send_replace(Some(health));
    }

    async fn evaluate(&mut self) {
        let Some(engine) = &mut self.engine else {
            return;
        };
        if self.down != Some(Part::Nats) && engine.waiting.is_empty() {
            for record in self.records.drain(..) {
                engine.evaluate(&record);
            }
            engine.lag = Lag::none(self.now_ms);
            engine.finish_batch();
        }
        engine.tick_at(self.now_ms).await;
        if self.down == Some(Part::Database) {
            return;
        }
        while let Ok(work) = self.works.try_recv() {
            self.written.extend(work.writes);
            engine.send_waiting();
        }
    }

    /// What was written about the rules with such a condition and duration: VM, change, and seconds since this time.
    pub(super) fn changes(&self, is_about: impl Fn(&RuleSpec) -> bool, since_ms: u64) -> Vec<Seen> {
        let definitions = self.setup.definitions.current();
        let mut rules = definitions.rules.iter();
        let rule = rules.find(|rule| is_about(&rule.spec)).unwrap();
        let written = self.written.iter().filter(|write| write.key.rule == rule.id);
        let seen = written.map(|write| Seen {
            vm: write.key.vm.clone(),
            change: change(&write.change),
            second: write.at_ms.saturating_sub(since_ms) / 1000,
        });
        seen.collect()
    }
}

/// A change of an alert.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) vm: Option<InstanceId>,
    pub(super) change: &'static str,
    /// Seconds since the beginning of the outage.
    pub(super) second: u64,
}

fn change(change: &writer::Change) -> &'static str {
    match change {
        writer::Change::Begin(alert) if alert.state == AlertState::Firing => "fires",
        writer::Change::Begin(_) => "is pending",
        writer::Change::Fire { .. } => "fires",
        writer::Change::Refresh { .. } => "is refreshed",
        writer::Change::Resolve { .. } => "is resolved",
        writer::Change::Withdraw => "is withdrawn",
    }
}
