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
    reads::PageQuery,
    store::{RowKind, RowStore},
};
use testkit::{Program, Stack};
use vmwatch_api::{
    InstanceId, Principal, Role, Scope,
    metrics::{Latest, LatestByName, Limit, ProcessByName, ProcessLatest, Rows, Sample, VmLatest},
    time::{CreateDate, UtcOffset},
};
use vmwatch_blocks::Encoder;
use vmwatch_bus::{Bus, Context};
use vmwatch_service::config::UTC_OFFSET;

use crate::{
    blocks::BlockWriter,
    fleet::{self, PROCESS_INTERVAL, VM_INTERVAL, VM_SAMPLES_PER_MINUTE},
    gateway::KEPT_SETTING,
    report::{Bound, Report, number},
    samples::{self, Message},
    statistics::Series,
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
    let stack = samples::stack()
        .set(Program::Metrics, KEPT_SETTING, "0s")
        .start()
        .await;
    report.describe(&stack)?;
    report.section("Newest rows and the length of the history");
    let mut bench = Bench {
        store: samples::open(stack.database.uri()).await?,
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

    /// Stores `rows` rows of each kind through metrics-svc, which also stores the time of a VM's last sample, and waits
    /// until it has stored that time.
    async fn report(&self, id: &InstanceId, rows: u32, end: SystemTime) -> anyhow::Result<()> {
        self.publish(history(id, rows, end, self.offset)).await?;
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

    /// Stores `rows` rows of each kind; the newest is dated `end`. Those of earlier hours are written as blocks of level 1,
    /// the others are stored through metrics-svc.
    async fn history(&self, id: &InstanceId, rows: u32, end: SystemTime) -> anyhow::Result<()> {
        let mut writer = BlockWriter::new(&self.stack.database.handle(), self.offset)?;
        let compacted = whole_hour(end)? - Duration::from_hours(1);
        let mut recent = Vec::new();
        for (at, sample) in history(id, rows, end, self.offset) {
            if at < compacted {
                writer.add(&sample).await?;
            } else {
                recent.push((at, sample));
            }
        }
        writer.finish().await?;
        self.publish(recent).await
    }

    /// Stores the rows that have become due since the last call.
    async fn top_up(&self, subjects: &mut [Subject]) -> anyhow::Result<()> {
        let mut samples = Vec::new();
        let now = SystemTime::now();
        for subject in subjects {
            let Some([vm, processes]) = &mut subject.newest else {
                continue;
            };
            while *vm + VM_INTERVAL <= now {
                *vm += VM_INTERVAL;
                let due = *processes + PROCESS_INTERVAL <= *vm;
                if due {
                    *processes = *vm;
                }
                samples.push(sample(&subject.id, *vm, self.offset, due));
            }
        }
        self.publish(samples).await
    }

    async fn publish(&self, samples: impl IntoIterator<Item = (SystemTime, Sample)>) -> anyhow::Result<()> {
        let mut encoder = Encoder::new()?;
        let messages = samples
            .into_iter()
            .map(|(_, sample)| Message::encode(&sample, &mut encoder));
        let jetstream = self.bus.jetstream_for_tests();
        samples::publish(jetstream, messages.collect::<Result<_, _>>()?).await?;
        samples::drained(jetstream).await
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
                    (RowKind::Vm | RowKind::Filesystem | RowKind::Hypervisor, _) => {
                        self.bus.call::<VmLatest>(&context, &latest).await
                    }
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

/// The samples of a VM with `rows` rows of each kind; the last is taken at `end`. As with an agent, a sample that has
/// process rows also has the VM's row of the same time.
fn history(
    id: &InstanceId,
    rows: u32,
    end: SystemTime,
    offset: UtcOffset,
) -> impl Iterator<Item = (SystemTime, Sample)> {
    (0..rows).rev().map(move |index| {
        let processes =
            index % VM_SAMPLES_PER_MINUTE == 0 && index / VM_SAMPLES_PER_MINUTE < rows / PROCESSES;
        sample(id, end - VM_INTERVAL * index, offset, processes)
    })
}

fn sample(id: &InstanceId, at: SystemTime, offset: UtcOffset, processes: bool) -> (SystemTime, Sample) {
    let processes = if processes { PROCESSES } else { 0 };
    (at, fleet::sample_at(id, at, offset, true, processes))
}

/// Start of the hour that contains a time.
fn whole_hour(at: SystemTime) -> anyhow::Result<SystemTime> {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH)?.as_secs() % 3600;
    Ok(at - Duration::from_secs(seconds))
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
