//! Measures reads of the newest rows of VMs with short and long histories.
//!
//! The measured VMs differ only in how far back their rows go. They keep reporting during the benchmark, so that their
//! newest rows are as recent as those of a live VM. Their collections also contain other VMs. Each query runs for each
//! VM in rotating order, both over the bus and directly against the row store. The result is the ratio of two medians:
//! that of the VM with the longest history to that of the VM with the shortest. One more VM with a long history stopped
//! reporting years ago.

use std::time::{Duration, Instant, SystemTime};

use anyhow::ensure;
use bson::{Document, doc};
use clap::Args;
use metrics_svc::{
    deadline::Deadline,
    documents::Documents,
    reads::PageQuery,
    store::{RowKind, RowStore},
};
use testkit::{Program, Stack};
use vmwatch_api::{
    InstanceId, Principal, Role, Scope,
    metrics::{Latest, LatestByName, Limit, ProcessByName, ProcessLatest, Rows, VmLatest},
    time::{CreateDate, UtcOffset},
};
use vmwatch_bus::{Bus, Context};
use vmwatch_service::config::UTC_OFFSET;

use crate::{
    fleet::{self, PROCESS_INTERVAL, VM_INTERVAL, VM_SAMPLES_PER_MINUTE},
    gateway::KEPT_SETTING,
    report::{Bound, Report, number},
    statistics::Series,
    store,
};

/// Command-line options of `bench latest`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Lengths of the histories in rows of each kind, separated by commas, shortest first
    #[arg(long, value_delimiter = ',', default_values_t = [100, 10_000, 1_000_000])]
    rows: Vec<u32>,
    /// Number of times that each query is repeated
    #[arg(long, default_value_t = 200)]
    repeats: u32,
}

/// The number of other VMs in the collections, and the number of VM rows and of process rows of each.
const OTHERS: (u32, u32) = (50, 1000);
/// For the VM that has stopped reporting: the number of its VM rows and of its process rows, and the time since its
/// last row.
const SILENT: (u32, Duration) = (100_000, Duration::from_hours(24 * 365 * 3));
/// Time limit for metrics-svc to store the time of the last sample, which it does some seconds after it stored the
/// rows.
const NOTED_WITHIN: Duration = Duration::from_mins(5);
/// Number of processes of each VM.
const PROCESSES: u32 = 10;
const BATCH_ROWS: usize = 2000;
/// The deadline of a query, as a gateway sets it.
const LIMIT: Duration = Duration::from_secs(5);

/// A query, with its limit of rows.
#[derive(Clone, Copy)]
struct Question {
    name: &'static str,
    kind: RowKind,
    cmd: Option<&'static str>,
    rows: u16,
}

const QUESTIONS: [Question; 3] = [
    Question {
        name: "vm",
        kind: RowKind::Vm,
        cmd: None,
        rows: 10,
    },
    Question {
        name: "processes",
        kind: RowKind::Process,
        cmd: None,
        rows: 4,
    },
    Question {
        name: "by_name",
        kind: RowKind::Process,
        cmd: Some("nginx"),
        rows: 4,
    },
];

/// Where a query is sent: to metrics-svc over the bus, or directly to the row store.
#[derive(Clone, Copy)]
enum Route {
    Bus,
    Store,
}

const ROUTES: [(Route, &str); 2] = [(Route::Bus, "over the bus"), (Route::Store, "store alone")];

/// A VM whose rows are read.
struct Subject {
    /// The column of this VM in the report.
    column: usize,
    name: String,
    id: InstanceId,
    /// The time of this VM's newest row of each kind; `None` if the VM is silent.
    newest: Option<[SystemTime; 2]>,
    /// Latencies in milliseconds, by query and destination.
    took: Vec<Series>,
}

pub(crate) async fn run(options: Options, report: &mut Report) -> anyhow::Result<()> {
    // The cache is off, because cached answers would not depend on the history.
    let stack = store::stack()
        .set(Program::Metrics, KEPT_SETTING, "0s")
        .start()
        .await;
    report.describe(&stack)?;
    report.section("Newest rows and the length of the history");
    let mut bench = Bench {
        store: store::open(&stack, "").await?,
        bus: stack.bus.clone(),
        offset: UTC_OFFSET.default.parse()?,
        stack,
    };
    let mut subjects = bench.fill(&options.rows).await?;
    for repeat in 0..options.repeats {
        bench.top_up(&mut subjects).await?;
        // The order rotates, because the VM that is queried first fills caches for the others.
        subjects.rotate_left(1);
        for (index, question) in QUESTIONS.iter().enumerate() {
            for (column, (route, _)) in ROUTES.iter().enumerate() {
                for subject in &mut subjects {
                    let started = Instant::now();
                    let rows = bench.ask(*route, question, &subject.id).await?;
                    let took = started.elapsed().as_secs_f64() * 1e3;
                    if repeat == 0 {
                        // The first answers warm the caches; they are checked and not timed.
                        check(question, &subject.name, &rows)?;
                    } else if let Some(series) = subject.took.get_mut(index * ROUTES.len() + column) {
                        series.push(took);
                    }
                }
            }
        }
    }
    subjects.sort_by_key(|subject| subject.column);
    tell(report, &subjects);
    Ok(())
}

struct Bench {
    store: RowStore,
    bus: Bus,
    offset: UtcOffset,
    stack: Stack,
}

impl Bench {
    async fn fill(&mut self, sizes: &[u32]) -> anyhow::Result<Vec<Subject>> {
        let (others, rows) = OTHERS;
        println!("storing {others} other VMs with {rows} rows of each kind");
        for other in 0..others {
            self.history(&format!("other-{other}").parse()?, rows, SystemTime::now())
                .await?;
        }
        let (rows, silence) = SILENT;
        println!(
            "storing a silent VM with {} rows of each kind through metrics-svc",
            number(f64::from(rows), 0)
        );
        let silent: InstanceId = "silent".parse()?;
        self.report(&silent, rows, SystemTime::now() - silence).await?;
        let mut subjects = Vec::new();
        // The longest history is stored first, because it takes longest to store: the VMs stored after it get their
        // newest rows soon before the queries begin.
        for (column, &size) in sizes.iter().enumerate().rev() {
            println!(
                "storing a VM with {} rows of each kind",
                number(f64::from(size), 0)
            );
            let id: InstanceId = format!("rows-{size}").parse()?;
            let now = SystemTime::now();
            self.history(&id, size, now).await?;
            let name = number(f64::from(size), 0);
            subjects.push(Subject::new(column, name, id, Some([now; 2])));
        }
        let name = "silent for 3 years".to_owned();
        subjects.push(Subject::new(sizes.len(), name, silent, None));
        Ok(subjects)
    }

    /// Stores the rows of the silent VM like [`Bench::history`], but by publishing samples to metrics-svc, which also
    /// stores the time of a VM's last sample.
    async fn report(&self, id: &InstanceId, rows: u32, end: SystemTime) -> anyhow::Result<()> {
        let mut parts = Vec::new();
        for index in (0..rows).rev() {
            // As with an agent, a sample that has process rows also has the VM's row of the same time.
            let with_processes =
                index % VM_SAMPLES_PER_MINUTE == 0 && index / VM_SAMPLES_PER_MINUTE < rows / PROCESSES;
            let processes = if with_processes { PROCESSES } else { 0 };
            let at = end - VM_INTERVAL * index;
            parts.extend(store::parts(fleet::sample_at(
                id,
                at,
                self.offset,
                true,
                processes,
            ))?);
        }
        store::publish(self.bus.jetstream_for_tests(), &parts).await?;
        store::drained(self.bus.jetstream_for_tests()).await?;
        let last = CreateDate::at(end, self.offset);
        testkit::eventually(
            "metrics-svc has stored the time of the last sample",
            NOTED_WITHIN,
            async || {
                let instances = self
                    .stack
                    .database
                    .handle()
                    .collection::<Document>("vm_samples_instances");
                let noted = instances
                    .find_one(doc! { "_id": id.as_str(), "newest.create_date": last.as_str() })
                    .await;
                noted
                    .map_err(|error| error.to_string())?
                    .map(drop)
                    .ok_or("the time is not stored".to_owned())
            },
        )
        .await;
        Ok(())
    }

    /// Inserts `rows` rows of each kind; the newest is dated `end`.
    async fn history(&self, id: &InstanceId, rows: u32, end: SystemTime) -> anyhow::Result<()> {
        let mut batch = Documents::default();
        for index in (0..rows).rev() {
            self.add(&mut batch, id, end - VM_INTERVAL * index, true, 0)?;
            self.insert_if(&mut batch, BATCH_ROWS).await?;
        }
        for index in (0..rows / PROCESSES).rev() {
            self.add(&mut batch, id, end - PROCESS_INTERVAL * index, false, PROCESSES)?;
            self.insert_if(&mut batch, BATCH_ROWS).await?;
        }
        self.insert_if(&mut batch, 1).await
    }

    /// Inserts the rows that have become due since the last call.
    async fn top_up(&self, subjects: &mut [Subject]) -> anyhow::Result<()> {
        let mut batch = Documents::default();
        let now = SystemTime::now();
        for subject in subjects {
            let Some([vm, processes]) = &mut subject.newest else {
                continue;
            };
            while *vm + VM_INTERVAL <= now {
                *vm += VM_INTERVAL;
                self.add(&mut batch, &subject.id, *vm, true, 0)?;
            }
            while *processes + PROCESS_INTERVAL <= now {
                *processes += PROCESS_INTERVAL;
                self.add(&mut batch, &subject.id, *processes, false, PROCESSES)?;
            }
        }
        self.insert_if(&mut batch, 1).await
    }

    fn add(
        &self,
        batch: &mut Documents,
        id: &InstanceId,
        at: SystemTime,
        vm: bool,
        processes: u32,
    ) -> anyhow::Result<()> {
        let sample = fleet::sample_at(id, at, self.offset, vm, processes);
        let documents = Documents::from_sample(&sample, self.offset, SystemTime::now())?;
        batch.vms.extend(documents.vms);
        batch.processes.extend(documents.processes);
        Ok(())
    }

    async fn insert_if(&self, batch: &mut Documents, least: usize) -> anyhow::Result<()> {
        if batch.vms.len() + batch.processes.len() < least {
            return Ok(());
        }
        let batch = std::mem::take(batch);
        for (kind, documents) in [(RowKind::Vm, batch.vms), (RowKind::Process, batch.processes)] {
            if !documents.is_empty() {
                self.store
                    .collection(kind)
                    .insert_many(documents)
                    .ordered(false)
                    .await?;
            }
        }
        Ok(())
    }

    async fn ask(&self, route: Route, question: &Question, id: &InstanceId) -> anyhow::Result<Rows> {
        let limit = Limit::new(u64::from(question.rows)).unwrap_or_default();
        match route {
            Route::Store => {
                let query = PageQuery {
                    kind: question.kind,
                    instance: id,
                    cmd: question.cmd,
                    limit,
                    before: None,
                };
                Ok(self.store.latest(query, Deadline::after(LIMIT)).await?.rows)
            }
            Route::Bus => {
                let context = Context::new(LIMIT).as_principal(Principal {
                    user: "bench".to_owned(),
                    role: Role::Viewer,
                    scope: Scope::All,
                });
                let latest = Latest {
                    instance_id: id.clone(),
                    limit,
                    before: None,
                };
                let rows = match (question.kind, question.cmd) {
                    (RowKind::Vm, _) => self.bus.call::<VmLatest>(&context, &latest).await,
                    (RowKind::Process, None) => self.bus.call::<ProcessLatest>(&context, &latest).await,
                    (RowKind::Process, Some(cmd)) => {
                        let by_name = LatestByName {
                            instance_id: id.clone(),
                            limit,
                            proc_name: Some(cmd.to_owned()),
                            before: None,
                        };
                        self.bus.call::<ProcessByName>(&context, &by_name).await
                    }
                };
                Ok(rows?.rows)
            }
        }
    }
}

impl Subject {
    fn new(column: usize, name: String, id: InstanceId, newest: Option<[SystemTime; 2]>) -> Self {
        Self {
            column,
            name,
            id,
            newest,
            took: vec![Series::default(); QUESTIONS.len() * ROUTES.len()],
        }
    }
}

/// Checks that the answer has the requested number of rows, newest first.
fn check(question: &Question, subject: &str, rows: &Rows) -> anyhow::Result<()> {
    let rows: Vec<serde_json::Value> = serde_json::from_str(rows.as_json())?;
    let dates: Vec<_> = rows
        .iter()
        .filter_map(|row| row.get("create_date")?.as_str())
        .collect();
    let name = question.name;
    ensure!(
        dates.len() == usize::from(question.rows),
        "{name}, {subject}: {} rows instead of {}",
        dates.len(),
        question.rows
    );
    ensure!(
        dates.is_sorted_by(|newer, older| newer >= older),
        "{name}, {subject}: rows out of order: {dates:?}"
    );
    Ok(())
}

fn tell(report: &mut Report, subjects: &[Subject]) {
    let mut heading = vec!["median (95 %), ms".to_owned()];
    heading.extend(subjects.iter().map(|subject| subject.name.clone()));
    heading.push("longest ÷ shortest".to_owned());
    let mut rows = vec![heading];
    for (index, question) in QUESTIONS.iter().enumerate() {
        for (column, (_, route)) in ROUTES.iter().enumerate() {
            let series = subjects
                .iter()
                .filter_map(|subject| subject.took.get(index * ROUTES.len() + column));
            let series: Vec<_> = series.collect();
            let limit = question.rows;
            let mut row = vec![format!("{} (limit {limit}), {route}", question.name)];
            row.extend(series.iter().map(|took| {
                format!(
                    "{} ({})",
                    number(took.median(), 2),
                    number(took.quantile(0.95), 2)
                )
            }));
            // The last VM is the silent one.
            let live = series.split_last().map_or(&[][..], |(_, live)| live);
            let ratio = match live {
                [shortest, .., longest] => longest.median() / shortest.median(),
                _ => f64::NAN,
            };
            row.push(number(ratio, 2));
            rows.push(row);
            let route = route.replace(' ', "_");
            let name = format!("latest_{}_{route}_longest_to_shortest", question.name);
            match column {
                0 => {
                    let text = format!(
                        "time to read the newest rows ({}), longest ÷ shortest history",
                        question.name
                    );
                    report.target(&name, &text, ratio, 2, Bound::AtMost(1.5));
                }
                _ => report.figure(name, ratio),
            }
            for (subject, took) in subjects.iter().zip(&series) {
                report.figure(
                    format!("latest_{}_{route}_ms_{}", question.name, subject.id),
                    took.median(),
                );
            }
        }
    }
    report.table(&rows);
}
