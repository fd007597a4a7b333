//! Compares the rate at which metrics-svc stores process rows with plain inserts of one document per row into the same
//! database.
//!
//! **Through vmwatch**: the consumer of the stream is paused while a round's samples are published, as agents publish
//! them. The round begins when the consumer is resumed, and ends when the stream is empty, that is, when everything is
//! written with a majority write concern and acknowledged.
//!
//! **Raw**: one process inserts the documents of the same kind of samples, prepared in memory, with the official driver:
//! unordered `insert_many`, with the same write concern, into collections with the indexes that vmwatch had when it
//! stored a document per row. The warm-up selects the fastest number of concurrent batches.
//!
//! Rounds of the two kinds alternate, and their order is swapped from pair to pair. Each has as many rows as its kind
//! stores in a few seconds. Before each round the rollups of earlier rounds are complete. At the end all rows are
//! counted.

use std::time::{Duration, Instant, SystemTime};

use anyhow::ensure;
use async_nats::jetstream::stream::Stream;
use bson::{Document, doc};
use futures::TryStreamExt;
use metrics_svc::documents::Documents;
use testkit::{Program, Stack};
use vmwatch_api::{metrics::SAMPLE_STREAM, time::UtcOffset};
use vmwatch_blocks::Encoder;
use vmwatch_service::config::UTC_OFFSET;

use super::{
    Scale,
    activity::{ACTIVITIES, PROCESSES, Vm},
    raw::{self, FlatRows},
};
use crate::{
    report::{Bound, Report, number},
    samples::{self, Message},
    statistics::Series,
    usage,
};

/// Number of VMs that send samples.
const VMS: u32 = 1000;
/// The consumer of the stream of samples.
pub(super) const CONSUMER: &str = "store";
/// Time between two samples of a VM, and how long ago the first one was taken. All samples fit into this time, so that
/// most of them are of the current hour, as samples of running agents are.
const STEP: Duration = Duration::from_secs(5);
const HISTORY: Duration = Duration::from_mins(15);
/// The numbers of concurrent batches that the warm-up of the raw insert tries.
const CONCURRENCY: [usize; 3] = [1, 2, 4];
/// Pause before each round, because the database still writes pages of the previous round.
const SETTLE: Duration = Duration::from_secs(2);
/// Time limit for the rollups of a round.
const ROLLED_UP: Duration = Duration::from_mins(3);
/// Duration for which the consumer is paused at most.
const PAUSE: Duration = Duration::from_mins(10);
/// The processes whose CPU time is counted.
const PARTS: [&str; 4] = ["nats-server", "metrics-svc", "database", "bench"];

/// The result of a round.
#[derive(Clone, Copy)]
struct Round {
    seconds: f64,
    rows: f64,
    /// CPU time that each process in [`PARTS`] used per process row, in microseconds.
    cpu: [f64; 4],
}

struct Bench {
    stack: Stack,
    stream: Stream,
    flat: FlatRows,
    offset: UtcOffset,
    vms: Vec<Vm>,
    encoder: Encoder,
    /// The time of the first samples in the next round.
    next: SystemTime,
    /// Number of process rows that were published, and that were inserted.
    published: u64,
    inserted: u64,
    /// Bytes of the published messages in the stream.
    stream_bytes: u64,
}

pub(crate) async fn run(scale: &Scale, report: &mut Report) -> anyhow::Result<f64> {
    report.section("Ingestion");
    let mut bench = Bench::start(report).await?;
    let (concurrency, samples, raw_samples) = bench.warm_up(scale.round).await?;
    let (mut through, mut raw) = (Vec::new(), Vec::new());
    for pair in 1..=scale.pairs {
        if pair.is_multiple_of(2) {
            through.push(bench.through(samples).await?);
            raw.push(bench.raw(raw_samples, concurrency).await?);
        } else {
            raw.push(bench.raw(raw_samples, concurrency).await?);
            through.push(bench.through(samples).await?);
        }
        let [ours, theirs] = [&through, &raw].map(|rounds| rounds.last().map_or(f64::NAN, Round::rate));
        println!(
            "pair {pair} of {}: {} process rows/s through vmwatch, {} by raw inserts",
            scale.pairs,
            number(ours, 0),
            number(theirs, 0)
        );
    }
    bench.count().await?;
    bench.report(report, &through, &raw, concurrency)?;
    usage::peak_resident_mb(bench.stack.replica(Program::Metrics, 0).process.id())
}

impl Bench {
    async fn start(report: &mut Report) -> anyhow::Result<Self> {
        let stack = [Program::Gateway, Program::Auth, Program::Lifecycle]
            .into_iter()
            .fold(Stack::builder().with_permissions(), |builder, program| {
                builder.replicas(program, 0)
            })
            .set(Program::Metrics, "VMWATCH_NATS_PING_INTERVAL", "10s")
            .set(Program::Metrics, "VMWATCH_FLAT_CHECK_INTERVAL", "1m")
            .start()
            .await;
        report.describe(&stack)?;
        let offset = UTC_OFFSET.default.parse()?;
        let flat = FlatRows::open(&stack.database.handle(), "raw_");
        flat.prepare().await?;
        // Half of the VMs have the one share of active processes, half the other.
        let vms = (0..VMS).zip(ACTIVITIES.into_iter().cycle());
        let vms = vms.map(|(vm, activity)| Vm::new(vm, activity, offset));
        Ok(Self {
            stream: stack.bus.jetstream_for_tests().get_stream(SAMPLE_STREAM).await?,
            flat,
            stack,
            offset,
            vms: vms.collect::<Result<_, _>>()?,
            encoder: Encoder::new()?,
            next: SystemTime::now() - HISTORY,
            published: 0,
            inserted: 0,
            stream_bytes: 0,
        })
    }

    /// Runs some rounds of each kind. Returns the number of concurrent batches with which the raw insert is fastest, and
    /// the number of samples of each VM that each kind stores in the time of a round.
    async fn warm_up(&mut self, time: Duration) -> anyhow::Result<(usize, u32, u32)> {
        let through = self.through(2).await?;
        println!(
            "warm-up: {} process rows/s through vmwatch",
            number(through.rate(), 0)
        );
        let (mut concurrency, mut best) = (1, 0.0);
        for candidate in CONCURRENCY {
            let rate = self.raw(1, candidate).await?.rate();
            println!(
                "warm-up: {} process rows/s by raw inserts with {candidate} concurrent batches",
                number(rate, 0)
            );
            if rate > best {
                (concurrency, best) = (candidate, rate);
            }
        }
        let samples = |rate: f64| -> u32 {
            let samples = rate * time.as_secs_f64() / f64::from(VMS * PROCESSES);
            (1..60).find(|&whole| f64::from(whole) >= samples).unwrap_or(60)
        };
        Ok((concurrency, samples(through.rate()), samples(best)))
    }

    /// Stores samples through vmwatch.
    async fn through(&mut self, samples: u32) -> anyhow::Result<Round> {
        let mut messages = Vec::new();
        for _ in 0..samples {
            for (vm, at) in self.vms.iter_mut().zip(moments(self.next)) {
                messages.push(Message::encode(vm.next(at), &mut self.encoder)?);
            }
            self.next += STEP;
        }
        samples::summarized(&self.stack, ROLLED_UP).await;
        self.stream.pause_consumer(CONSUMER, after(PAUSE)?).await?;
        samples::publish(self.stack.bus.jetstream_for_tests(), messages).await?;
        self.stream_bytes += self.stream.info().await?.state.bytes;
        tokio::time::sleep(SETTLE).await;
        let (started, before) = (Instant::now(), self.cpu()?);
        self.stream.resume_consumer(CONSUMER).await?;
        samples::drained(self.stack.bus.jetstream_for_tests()).await?;
        let rows = u64::from(samples * VMS * PROCESSES);
        self.published += rows;
        self.round(rows, started, before)
    }

    /// Inserts the documents of samples with the database driver alone.
    async fn raw(&mut self, samples: u32, concurrency: usize) -> anyhow::Result<Round> {
        let mut documents = Vec::new();
        for _ in 0..samples {
            for (vm, at) in self.vms.iter_mut().zip(moments(self.next)) {
                documents.push(Documents::from_sample(
                    vm.next(at),
                    self.offset,
                    SystemTime::now(),
                )?);
            }
            self.next += STEP;
        }
        let batches = raw::batches(documents);
        samples::summarized(&self.stack, ROLLED_UP).await;
        tokio::time::sleep(SETTLE).await;
        let (started, before) = (Instant::now(), self.cpu()?);
        self.flat.insert(&batches, concurrency).await?;
        let rows = u64::from(samples * VMS * PROCESSES);
        self.inserted += rows;
        self.round(rows, started, before)
    }

    fn round(&self, rows: u64, started: Instant, before: [f64; 4]) -> anyhow::Result<Round> {
        let seconds = started.elapsed().as_secs_f64();
        let rows = f64::from(u32::try_from(rows)?);
        let mut cpu = self.cpu()?;
        for (after, before) in cpu.iter_mut().zip(before) {
            *after = (*after - before) * 1e6 / rows;
        }
        Ok(Round { seconds, rows, cpu })
    }

    /// Returns the CPU time that each process in [`PARTS`] has used since its start, in seconds.
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
        for (name, expected, stored) in [
            ("through vmwatch", self.published, self.rows_in_blocks().await?),
            ("raw", self.inserted, self.flat.process_rows().await?),
        ] {
            println!("{name}: {expected} process rows sent, {stored} stored");
            ensure!(
                stored == expected,
                "{name}: {expected} process rows were sent, but {stored} are stored"
            );
        }
        Ok(())
    }

    /// Returns the number of process rows in the blocks that vmwatch has stored.
    async fn rows_in_blocks(&self) -> anyhow::Result<u64> {
        let blocks = self.stack.database.handle().collection::<Document>("blocks");
        let found = blocks
            .find(doc! { "kind": "process" })
            .projection(doc! { "rows": 1 });
        let mut found = found.await?;
        let mut rows = 0;
        while let Some(block) = found.try_next().await? {
            rows += u64::try_from(block.get_i32("rows")?)?;
        }
        Ok(rows)
    }

    fn report(
        &self,
        report: &mut Report,
        through: &[Round],
        raw: &[Round],
        concurrency: usize,
    ) -> anyhow::Result<()> {
        let seconds: f64 = through.iter().chain(raw).map(|round| round.seconds).sum();
        report.paragraph(&format!(
            "{VMS} VMs with {PROCESSES} processes each, half of the VMs with 15 % and half with 40 % active processes. A \
             sample has one row of each process and one of the VM; rates count process rows. All rounds took {} s together.",
            number(seconds, 0)
        ));
        let rates = |rounds: &[Round]| rounds.iter().map(Round::rate).collect::<Series>();
        let pairs = through.iter().zip(raw);
        let ratios: Series = pairs.map(|(through, raw)| through.rate() / raw.rate()).collect();
        let row = |name: &str, series: &Series, decimals| {
            let cells = [series.median(), series.min(), series.max()].map(|value| number(value, decimals));
            let [median, min, max] = cells;
            [name.to_owned(), median, min, max]
        };
        let raw_name = format!("raw insert, {concurrency} concurrent batches, process rows/s");
        report.table(&[
            ["", "median", "min", "max"].map(str::to_owned),
            row("through vmwatch, process rows/s", &rates(through), 0),
            row(&raw_name, &rates(raw), 0),
            row("ratio per pair", &ratios, 2),
        ]);
        let cpu = |rounds: &[Round], part: usize| {
            let used = rounds.iter().filter_map(|round| round.cpu.get(part).copied());
            used.collect::<Series>().median()
        };
        let mut rows =
            vec![["CPU time, µs per process row", "through vmwatch", "raw insert"].map(str::to_owned)];
        for (part, name) in PARTS.iter().enumerate() {
            let (through, raw) = (cpu(through, part), cpu(raw, part));
            report.figure(
                format!("ingest_cpu_us_per_row_{}", name.replace('-', "_")),
                through,
            );
            report.figure(format!("raw_cpu_us_per_row_{}", name.replace('-', "_")), raw);
            rows.push([(*name).to_owned(), number(through, 2), number(raw, 2)]);
        }
        report.table(&rows);
        report.figure("rows_through_per_second", rates(through).median());
        report.figure("rows_raw_per_second", rates(raw).median());
        report.figure("ingest_measured_seconds", seconds);
        let text = "process rows/s through vmwatch ÷ raw insert of one document per row, median of pairs";
        let bound = Bound::AtLeast(10.0);
        report.target("rows_through_to_raw_ratio", text, ratios.median(), 2, bound);
        let text = "CPU time of the database per process row, µs";
        report.target(
            "database_us_per_row",
            text,
            cpu(through, 2),
            2,
            Bound::AtMost(2.0),
        );
        let bytes = f64::from(u32::try_from(self.stream_bytes)?) / f64::from(u32::try_from(self.published)?);
        let text = "bytes per process row in the sample stream";
        report.target("stream_bytes_per_row", text, bytes, 1, Bound::AtMost(25.0));
        Ok(())
    }
}

impl Round {
    /// Process rows per second.
    fn rate(&self) -> f64 {
        self.rows / self.seconds
    }
}

/// The moments at which the VMs take a sample from this time on, one after the other.
fn moments(time: SystemTime) -> impl Iterator<Item = SystemTime> {
    (0..).map(move |vm| time + Duration::from_micros(7919) * vm)
}

/// The time after this duration.
pub(super) fn after(time: Duration) -> anyhow::Result<async_nats::datetime::DateTime> {
    let end = (SystemTime::now() + time).duration_since(SystemTime::UNIX_EPOCH)?;
    async_nats::datetime::from_nanos(i128::try_from(end.as_nanos())?).map_err(anyhow::Error::from_boxed)
}
