//! Compares the rate at which vmwatch stores samples with plain inserts into the same database.
//!
//! **Through vmwatch**: a round publishes the same messages as a fleet of agents would, as fast as the stream
//! acknowledges it, and ends when the stream is empty, that is, when everything is written with a majority write
//! concern and acknowledged. The measured time includes publishing, on the same cores; publishing is much faster than
//! storing and does not limit the round.
//!
//! **Raw**: one process inserts the same documents, prepared in memory, with the official driver: unordered
//! `insert_many`, with the same write concern and batch size, into collections with the same indexes in the same
//! database. The warm-up selects the fastest number of concurrent batches. As in metrics-svc, each batch goes into both
//! collections concurrently.
//!
//! Rounds of the two kinds alternate. Their order is swapped from pair to pair, and the same pause precedes each round,
//! so that gradual changes (a growing index, pending page writes, other load on the machine) affect both kinds alike.
//! At the end all documents are counted.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use agent::Part;
use anyhow::ensure;
use bson::Document;
use clap::Args;
use futures::{StreamExt, TryStreamExt, stream};
use metrics_svc::{
    documents::Documents,
    store::{RowKind, RowStore},
};
use testkit::{Program, Stack};
use vmwatch_api::time::UtcOffset;
use vmwatch_service::config::UTC_OFFSET;

use crate::{
    fleet::Fleet,
    report::{Bound, Report, number},
    statistics::Series,
    store, usage,
};

/// Command-line options of `bench ingest`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of simulated VMs that send samples
    #[arg(long, default_value_t = 200)]
    vms: u32,
    /// Number of processes of each simulated VM
    #[arg(long, default_value_t = 100)]
    processes: u32,
    /// Minutes of samples that are stored in one round
    #[arg(long, default_value_t = 3)]
    minutes: u32,
    /// Number of measured pairs of rounds
    #[arg(long, default_value_t = 7)]
    pairs: u32,
}

/// The numbers of concurrent batches that the warm-up of the raw insert tries.
const CONCURRENCY: [usize; 3] = [1, 2, 4];
/// Pause before each round, because the database still writes pages of the previous round.
const SETTLE: Duration = Duration::from_secs(3);
/// The default of `VMWATCH_BATCH_ROWS`, with which metrics-svc runs.
const BATCH_ROWS: usize = 2000;
/// The processes whose CPU time is counted.
const PROCESSES: [&str; 4] = ["nats-server", "vmwatch-metrics", "database", "bench"];

/// The data of a round, prepared in memory for both ways of storing it.
struct Load {
    parts: Vec<(String, Part)>,
    batches: Vec<Arc<Documents>>,
    documents: usize,
}

/// The result of a round.
struct Round {
    documents_per_second: f64,
    /// CPU time that each process in [`PROCESSES`] used per stored document, in microseconds.
    cpu: [f64; 4],
}

struct Bench {
    stack: Stack,
    raw: Arc<RowStore>,
    offset: UtcOffset,
    fleet: Fleet,
    minutes: u32,
    /// The first minute of samples in the next round.
    next: SystemTime,
    sent: usize,
    inserted: usize,
}

pub(crate) async fn run(options: Options, report: &mut Report) -> anyhow::Result<()> {
    let stack = store::stack().start().await;
    report.describe(&stack)?;
    report.section("Ingestion");
    let mut bench = Bench::new(stack, &options).await?;
    let concurrency = bench.warm_up().await?;
    let (mut through, mut raw) = (Vec::new(), Vec::new());
    for pair in 1..=options.pairs {
        let load = bench.load()?;
        let (ours, theirs);
        if pair.is_multiple_of(2) {
            ours = bench.through(&load).await?;
            theirs = bench.raw(&load, concurrency).await?;
        } else {
            theirs = bench.raw(&load, concurrency).await?;
            ours = bench.through(&load).await?;
        }
        println!(
            "pair {pair} of {}: {} documents/s through vmwatch, {} documents/s by raw inserts",
            options.pairs,
            number(ours.documents_per_second, 0),
            number(theirs.documents_per_second, 0)
        );
        through.push(ours);
        raw.push(theirs);
    }
    bench.count().await?;
    let metrics = bench.stack.replica(Program::Metrics, 0).process.id();
    tell(
        report,
        &through,
        &raw,
        concurrency,
        usage::peak_resident_mb(metrics)?,
    );
    Ok(())
}

impl Bench {
    async fn new(stack: Stack, options: &Options) -> anyhow::Result<Self> {
        Ok(Self {
            raw: Arc::new(store::open(&stack, "raw_").await?),
            stack,
            offset: UTC_OFFSET.default.parse()?,
            fleet: Fleet::new(options.vms, options.processes)?,
            minutes: options.minutes,
            next: SystemTime::now() - Duration::from_hours(12),
            sent: 0,
            inserted: 0,
        })
    }

    /// Runs one round of each kind, and returns the number of concurrent batches with which the raw insert is fastest.
    async fn warm_up(&mut self) -> anyhow::Result<usize> {
        let load = self.load()?;
        let through = self.through(&load).await?;
        println!(
            "warm-up: {} documents/s through vmwatch",
            number(through.documents_per_second, 0)
        );
        let mut best = (1, 0.0);
        for concurrency in CONCURRENCY {
            let load = self.load()?;
            let rate = self.raw(&load, concurrency).await?.documents_per_second;
            println!(
                "warm-up: {} documents/s by raw inserts with {concurrency} concurrent batches",
                number(rate, 0)
            );
            if rate > best.1 {
                best = (concurrency, rate);
            }
        }
        Ok(best.0)
    }

    /// Prepares the samples of the next minutes, as messages and as documents.
    fn load(&mut self) -> anyhow::Result<Load> {
        let mut load = Load {
            parts: Vec::new(),
            batches: Vec::new(),
            documents: self.fleet.rows_per_minute() * self.minutes as usize,
        };
        let mut batch = Documents::default();
        for _ in 0..self.minutes {
            for sample in self.fleet.minute(self.next, self.offset) {
                let documents = Documents::from_sample(&sample, self.offset, SystemTime::now())?;
                batch.vms.extend(documents.vms);
                batch.processes.extend(documents.processes);
                if batch.vms.len() + batch.processes.len() >= BATCH_ROWS {
                    load.batches.push(Arc::new(std::mem::take(&mut batch)));
                }
                load.parts.extend(store::parts(sample)?);
            }
            self.next += Duration::from_mins(1);
        }
        load.batches.push(Arc::new(batch));
        Ok(load)
    }

    /// Stores a round through vmwatch, measured from the first publish until the stream is empty.
    async fn through(&mut self, load: &Load) -> anyhow::Result<Round> {
        tokio::time::sleep(SETTLE).await;
        let before = self.cpu()?;
        let started = Instant::now();
        store::publish(self.stack.bus.jetstream_for_tests(), &load.parts).await?;
        store::drained(self.stack.bus.jetstream_for_tests()).await?;
        self.sent += load.documents;
        self.round(load, started, before)
    }

    /// Stores the same documents with the database driver alone.
    async fn raw(&mut self, load: &Load, concurrency: usize) -> anyhow::Result<Round> {
        tokio::time::sleep(SETTLE).await;
        let before = self.cpu()?;
        let started = Instant::now();
        stream::iter(load.batches.iter().cloned())
            .map(|batch| tokio::spawn(insert(Arc::clone(&self.raw), batch)))
            .buffer_unordered(concurrency)
            .map_err(anyhow::Error::from)
            .try_for_each(async |inserted| inserted.map_err(anyhow::Error::from))
            .await?;
        self.inserted += load.documents;
        self.round(load, started, before)
    }

    fn round(&self, load: &Load, started: Instant, before: [f64; 4]) -> anyhow::Result<Round> {
        #[expect(
            clippy::cast_precision_loss,
            reason = "the number of documents is near 100,000"
        )]
        let documents = load.documents as f64;
        let documents_per_second = documents / started.elapsed().as_secs_f64();
        let mut cpu = self.cpu()?;
        for (after, before) in cpu.iter_mut().zip(before) {
            *after = (*after - before) * 1e6 / documents;
        }
        Ok(Round {
            documents_per_second,
            cpu,
        })
    }

    /// Returns the CPU time that each process in [`PROCESSES`] has used since its start, in seconds.
    fn cpu(&self) -> anyhow::Result<[f64; 4]> {
        Ok([
            usage::cpu_seconds(self.stack.nats.server.id())?,
            usage::cpu_seconds(self.stack.replica(Program::Metrics, 0).process.id())?,
            usage::cpu_seconds(self.stack.database.server.id())?,
            usage::cpu_seconds(std::process::id())?,
        ])
    }

    /// Checks that no row was lost or duplicated, which would invalidate the rates.
    async fn count(&self) -> anyhow::Result<()> {
        let mut raw = 0;
        for kind in [RowKind::Vm, RowKind::Process] {
            raw += self.raw.collection(kind).count_documents(bson::doc! {}).await?;
        }
        for (name, expected, stored) in [
            ("through vmwatch", self.sent, self.rows_in_blocks().await?),
            ("raw", self.inserted, raw),
        ] {
            println!("{name}: {expected} rows sent, {stored} stored");
            ensure!(
                stored == expected as u64,
                "{name}: {expected} rows were sent, but {stored} are stored"
            );
        }
        Ok(())
    }

    /// Returns the number of rows in the blocks that vmwatch has stored.
    async fn rows_in_blocks(&self) -> anyhow::Result<u64> {
        let blocks = self.stack.database.handle().collection::<Document>("blocks");
        let mut found = blocks
            .find(bson::doc! {})
            .projection(bson::doc! { "rows": 1 })
            .await?;
        let mut rows = 0;
        while let Some(block) = found.try_next().await? {
            rows += u64::try_from(block.get_i32("rows")?)?;
        }
        Ok(rows)
    }
}

/// Inserts a batch into both collections concurrently, as metrics-svc does.
async fn insert(rows: Arc<RowStore>, batch: Arc<Documents>) -> mongodb::error::Result<()> {
    let into = async |kind, documents: &[_]| {
        if documents.is_empty() {
            return Ok(());
        }
        let insert = rows.collection(kind).insert_many(documents).ordered(false);
        insert.await.map(drop)
    };
    let (vms, processes) = tokio::join!(
        into(RowKind::Vm, &batch.vms),
        into(RowKind::Process, &batch.processes)
    );
    vms.and(processes)
}

fn tell(report: &mut Report, through: &[Round], raw: &[Round], concurrency: usize, resident_mb: f64) {
    let rates =
        |rounds: &[Round]| -> Series { rounds.iter().map(|round| round.documents_per_second).collect() };
    let pairs = through.iter().zip(raw);
    let ratios: Series = pairs
        .map(|(through, raw)| through.documents_per_second / raw.documents_per_second)
        .collect();
    let ratio = rates(through).median() / rates(raw).median();
    let row = |name: &str, series: &Series, decimals| {
        let cells = [series.median(), series.min(), series.max()].map(|value| number(value, decimals));
        let [median, min, max] = cells;
        [name.to_owned(), median, min, max]
    };
    let heading = ["", "median", "min", "max"].map(str::to_owned);
    report.table(&[
        heading,
        row("through vmwatch, documents/s", &rates(through), 0),
        row(
            &format!("raw insert, {concurrency} concurrent batches, documents/s"),
            &rates(raw),
            0,
        ),
        row("ratio per pair", &ratios, 3),
    ]);

    let cpu = |rounds: &[Round], index: usize| -> f64 {
        let used: Series = rounds
            .iter()
            .filter_map(|round| round.cpu.get(index).copied())
            .collect();
        used.median()
    };
    let mut rows = vec![["CPU time, µs/document", "through vmwatch", "raw insert"].map(str::to_owned)];
    for (index, process) in PROCESSES.iter().enumerate() {
        let (through, raw) = (cpu(through, index), cpu(raw, index));
        report.figure(format!("ingest_cpu_us_per_document_{process}"), through);
        report.figure(format!("raw_cpu_us_per_document_{process}"), raw);
        rows.push([(*process).to_owned(), number(through, 1), number(raw, 1)]);
    }
    report.table(&rows);

    report.figure("ingest_documents_per_second", rates(through).median());
    report.figure("raw_documents_per_second", rates(raw).median());
    let text = "documents/s, through vmwatch ÷ raw insert";
    report.target("ingest_to_raw_ratio", text, ratio, 2, Bound::AtLeast(0.8));
    report.figure("ingest_to_raw_ratio_min_pair", ratios.min());
    report.figure("ingest_to_raw_ratio_max_pair", ratios.max());
    let text = "peak resident memory of metrics-svc during ingestion, MB";
    let bound = Bound::AtMost(60.0);
    report.target("ingest_metrics_resident_peak_mb", text, resident_mb, 1, bound);
}
