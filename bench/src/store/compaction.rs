//! Measures compaction at ten times real time: 1,000 VMs report ten times as often as by default, and the clock of
//! metrics-svc is ten times as fast, so that an hour closes every six minutes. This is the load of 10,000 VMs.
//!
//! Of some VMs, it measures how long after the end of each hour, by the fast clock, its rows are in blocks of level 1.
//! Then it compares the rate of ingestion with and without compaction, in alternating rounds: samples of the current hour,
//! of which nothing is compacted, are stored while compaction is idle, and while it has many closed hours to merge.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use bson::{DateTime, Document, doc};
use futures::{StreamExt, TryStreamExt, stream};
use mongodb::Collection;
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::metrics::SAMPLE_STREAM;
use vmwatch_blocks::Encoder;
use vmwatch_service::config::UTC_OFFSET;

use super::{
    Scale,
    activity::{ACTIVITIES, PROCESSES, Vm},
    clock::FastClock,
    ingestion::{CONSUMER, after},
};
use crate::{
    fleet::{VM_INTERVAL, VM_SAMPLES_PER_MINUTE},
    report::{Bound, Report, number},
    samples::{self, Message},
    statistics::Series,
    usage,
};

/// How many times as fast as the machine's clock the clock of metrics-svc is.
const SPEED: u32 = 10;
/// Number of VMs that report.
const VMS: u32 = 1000;
/// Of every this many VMs, one is observed: the bench measures when each of its hours is compacted.
const FOLLOWED: usize = 25;
/// How far the fast clock is behind at first. It never reaches the machine's clock, because samples must not be dated
/// after their arrival.
const BEHIND: Duration = Duration::from_hours(12);
/// Time within an hour at which the fast clock starts.
const START: Duration = Duration::from_mins(40);
/// Interval at which samples are published, and at which blocks are looked for.
const TICK: Duration = Duration::from_millis(50);
const LOOK: Duration = Duration::from_secs(2);
const HOUR: Duration = Duration::from_hours(1);
/// Hours that ended before the end of the measurement by at least this time must be compacted.
const ALLOWED: Duration = Duration::from_mins(20);
/// Time limit for compaction of what a round has stored.
const COMPACTED: Duration = Duration::from_mins(5);
/// Minutes of samples of a round of ingestion, and hours that compaction merges meanwhile, each with a minute of samples.
const MINUTES: u32 = 8;
const BACKLOG: u32 = 3;

pub(crate) async fn run(scale: &Scale, report: &mut Report) -> anyhow::Result<f64> {
    let folder = tempfile::Builder::new().prefix("vmwatch-bench-").tempdir()?;
    let start = SystemTime::UNIX_EPOCH + HOUR * u32::try_from(hours(SystemTime::now() - BEHIND))? + START;
    let Some(clock) = FastClock::start(folder.path(), SPEED, start)? else {
        report.section("Compaction");
        report.paragraph("Not measured, because libfaketime is not installed.");
        return Ok(0.0);
    };
    report.section("Compaction");
    let mut bench = Bench::start(clock, report).await?;
    bench.hours(scale, report).await?;
    let resident = bench.resident_mb()?;
    // The rest starts with an empty database: what may still wait to be compacted would disturb it.
    let clock = bench.end();
    let mut bench = Bench::start(clock, report).await?;
    bench.ingestion(scale, report).await?;
    Ok(resident.max(bench.resident_mb()?))
}

struct Bench {
    stack: Stack,
    clock: FastClock,
    blocks: Collection<Document>,
    vms: Vec<Vm>,
    encoder: Encoder,
}

impl Bench {
    async fn start(clock: FastClock, report: &mut Report) -> anyhow::Result<Self> {
        let stack = [Program::Gateway, Program::Auth, Program::Lifecycle]
            .into_iter()
            .fold(Stack::builder().with_permissions(), |builder, program| {
                builder.replicas(program, 0)
            })
            .without_rates()
            .set(Program::Metrics, "VMWATCH_NATS_PING_INTERVAL", "10s")
            .set(Program::Metrics, "VMWATCH_FLAT_CHECK_INTERVAL", "1m")
            // The defaults, in tenths.
            .set(Program::Metrics, "VMWATCH_COMPACTION_INTERVAL", "6s")
            .set(Program::Metrics, "VMWATCH_COMPACTION_DELETE_AFTER", "6s")
            .set(Program::Metrics, "VMWATCH_ROLLUP_INTERVAL", "1s");
        let stack = clock.used_by(stack).start().await;
        eventually("the stream of samples exists", PATIENCE, async || {
            let stream = stack.bus.jetstream_for_tests().get_stream(SAMPLE_STREAM).await;
            stream.map(drop).map_err(|error| error.to_string())
        })
        .await;
        report.describe(&stack)?;
        let offset = UTC_OFFSET.default.parse()?;
        let vms = (0..VMS).zip(ACTIVITIES.into_iter().cycle());
        let vms = vms.map(|(vm, activity)| Vm::new(vm, activity, offset));
        Ok(Self {
            blocks: stack.database.handle().collection("blocks"),
            stack,
            clock,
            vms: vms.collect::<Result<_, _>>()?,
            encoder: Encoder::new()?,
        })
    }

    /// Stops the programs, and returns their clock.
    fn end(self) -> FastClock {
        self.clock
    }

    fn resident_mb(&self) -> anyhow::Result<f64> {
        usage::peak_resident_mb(self.stack.replica(Program::Metrics, 0).process.id())
    }

    /// Publishes samples as agents do for some hours of the fast clock, and follows when each hour is compacted.
    async fn hours(&mut self, scale: &Scale, report: &mut Report) -> anyhow::Result<()> {
        let length = Duration::from_mins(scale.compaction_minutes);
        let (began, start) = (Instant::now(), self.clock.now());
        let ids: Vec<_> = self
            .vms
            .iter()
            .step_by(FOLLOWED)
            .map(|vm| vm.id().to_string())
            .collect();
        let mut follower = Follower::new(self.blocks.clone(), ids, start);
        let mut ticks = tokio::time::interval(TICK);
        let (mut looked, mut step, mut lag) = (Instant::now(), 0_u64, Series::default());
        let mut published = 0_u64;
        while began.elapsed() < length {
            ticks.tick().await;
            published += self.publish_due(start, &mut step).await?;
            if looked.elapsed() >= LOOK {
                follower.look(self.clock.now()).await?;
                lag.push(self.waiting().await?);
                looked = Instant::now();
            }
        }
        // The hours that ended early enough must be compacted even after the last sample.
        let last = self.clock.now() - ALLOWED;
        follower.until(last);
        let seconds = began.elapsed().as_secs_f64();
        let samples = f64::from(u32::try_from(published)?);
        report.paragraph(&format!(
            "{VMS} VMs with {PROCESSES} processes reported ten times as often as by default, for {} minutes: {} samples/s \
             and {} process rows/s. The clock of metrics-svc was ten times as fast, and its intervals for compaction ten \
             times as short. At most {} samples waited in the stream.",
            scale.compaction_minutes,
            number(samples / seconds, 0),
            number(samples / seconds / f64::from(VM_SAMPLES_PER_MINUTE) * f64::from(PROCESSES), 0),
            number(lag.max(), 0)
        ));
        let (delays, missing) = follower.finish();
        report.figure(
            "compaction_followed_vm_hours",
            f64::from(u32::try_from(delays.0)?),
        );
        report.figure("compaction_missing_vm_hours", f64::from(u32::try_from(missing)?));
        report.figure("compaction_delay_median_minutes", delays.1.median());
        let text = "an hour of a VM is in blocks of level 1 after its end, ten times real time, p99, minutes";
        // An hour that is missing counts as never compacted.
        let p99 = if missing > 0 {
            f64::INFINITY
        } else {
            delays.1.quantile(0.99)
        };
        report.target("compaction_delay_p99_minutes", text, p99, 1, Bound::AtMost(15.0));
        Ok(())
    }

    /// Publishes the samples that are due by the fast clock. `step` counts tenths of the interval of VM samples, in each
    /// of which a tenth of the VMs take a sample.
    async fn publish_due(&mut self, start: SystemTime, step: &mut u64) -> anyhow::Result<u64> {
        let width = VM_INTERVAL / 10;
        let mut publishing = Vec::new();
        loop {
            let at = start + width * u32::try_from(*step)?;
            if at > self.clock.now() {
                break;
            }
            let group = usize::try_from(*step % 10)?;
            let round = u32::try_from(*step / 10)?;
            for vm in self.vms.iter_mut().skip(group).step_by(10) {
                let sample = vm.sample(at, round.is_multiple_of(VM_SAMPLES_PER_MINUTE));
                publishing.push(Message::encode(&sample, &mut self.encoder)?);
            }
            *step += 1;
        }
        let published = publishing.len() as u64;
        samples::publish(self.stack.bus.jetstream_for_tests(), publishing).await?;
        Ok(published)
    }

    /// Number of samples that wait in the stream.
    async fn waiting(&self) -> anyhow::Result<f64> {
        let mut stream = self
            .stack
            .bus
            .jetstream_for_tests()
            .get_stream(SAMPLE_STREAM)
            .await?;
        Ok(f64::from(u32::try_from(stream.info().await?.state.messages)?))
    }

    /// Compares the rate of ingestion with and without compaction.
    async fn ingestion(&mut self, scale: &Scale, report: &mut Report) -> anyhow::Result<()> {
        let (mut idle, mut busy) = (Vec::new(), Vec::new());
        let mut hours_before = 24;
        for pair in 0..scale.pairs {
            for turn in 0..2 {
                self.compacted().await?;
                if (pair + turn).is_multiple_of(2) {
                    idle.push(self.round(MINUTES).await?);
                    continue;
                }
                for hour in 0..BACKLOG {
                    let at = self.clock.now() - HOUR * (hours_before + hour);
                    self.publish_all(at).await?;
                }
                hours_before += BACKLOG;
                samples::drained(self.stack.bus.jetstream_for_tests()).await?;
                busy.push(self.round(MINUTES).await?);
            }
        }
        let pairs = busy.iter().zip(&idle);
        let ratios: Series = pairs.map(|(busy, idle)| busy / idle).collect();
        let [busy, idle] = [busy, idle].map(|rates| rates.into_iter().collect::<Series>());
        let row = |name: &str, series: &Series, decimals| {
            let [median, min, max] =
                [series.median(), series.min(), series.max()].map(|value| number(value, decimals));
            [name.to_owned(), median, min, max]
        };
        report.table(&[
            ["", "median", "min", "max"].map(str::to_owned),
            row("process rows/s while compaction merges closed hours", &busy, 0),
            row("process rows/s while compaction is idle", &idle, 0),
            row("ratio per pair", &ratios, 2),
        ]);
        let text = "process rows/s stored with ÷ without compaction";
        let bound = Bound::AtLeast(0.75);
        report.target(
            "ingestion_with_to_without_compaction",
            text,
            ratios.median(),
            2,
            bound,
        );
        Ok(())
    }

    /// Publishes a sample of each VM, dated in the minute that begins at this time.
    async fn publish_all(&mut self, at: SystemTime) -> anyhow::Result<()> {
        let mut messages = Vec::new();
        for (number, vm) in (0..).zip(&mut self.vms) {
            let sample = vm.next(at + Duration::from_millis(10) * number);
            messages.push(Message::encode(sample, &mut self.encoder)?);
        }
        samples::publish(self.stack.bus.jetstream_for_tests(), messages).await
    }

    /// Stores some minutes of samples before now, and returns the process rows per second.
    async fn round(&mut self, minutes: u32) -> anyhow::Result<f64> {
        let stream = self
            .stack
            .bus
            .jetstream_for_tests()
            .get_stream(SAMPLE_STREAM)
            .await?;
        stream.pause_consumer(CONSUMER, after(COMPACTED)?).await?;
        let now = self.clock.now();
        // An hour stays open for five minutes after its end, so none of the samples is in a closed hour.
        for minute in 0..minutes {
            self.publish_all(now - Duration::from_mins(1) - Duration::from_secs(20) * minute)
                .await?;
        }
        let started = Instant::now();
        stream.resume_consumer(CONSUMER).await?;
        samples::drained(self.stack.bus.jetstream_for_tests()).await?;
        Ok(f64::from(minutes * VMS * PROCESSES) / started.elapsed().as_secs_f64())
    }

    /// Waits until compaction has nothing to do.
    async fn compacted(&self) -> anyhow::Result<()> {
        let queue = self
            .stack
            .database
            .handle()
            .collection::<Document>("blocks_hours");
        eventually("closed hours are compacted", COMPACTED, async || {
            let closed = self.clock.now() - HOUR - Duration::from_mins(6);
            let closed = DateTime::from_system_time(closed);
            let left = queue.count_documents(doc! { "hour": { "$lt": closed } }).await;
            let left = left.map_err(|error| error.to_string())?;
            (left == 0)
                .then_some(())
                .ok_or_else(|| format!("{left} hours are left"))
        })
        .await;
        Ok(())
    }
}

/// Follows when the hours of some VMs are in blocks of level 1.
struct Follower {
    blocks: Collection<Document>,
    vms: Vec<String>,
    /// The hours to follow, by number since 1970, with the VMs and kinds that are not compacted yet.
    open: BTreeMap<u64, Vec<(String, &'static str)>>,
    next: u64,
    delays: Vec<f64>,
}

impl Follower {
    fn new(blocks: Collection<Document>, vms: Vec<String>, start: SystemTime) -> Self {
        Self {
            blocks,
            vms,
            open: BTreeMap::new(),
            next: hours(start),
            delays: Vec::new(),
        }
    }

    /// Looks for blocks of the hours that have ended.
    async fn look(&mut self, now: SystemTime) -> anyhow::Result<()> {
        while self.next < hours(now) {
            let all = self
                .vms
                .iter()
                .flat_map(|vm| ["vm", "process"].map(|kind| (vm.clone(), kind)));
            self.open.insert(self.next, all.collect());
            self.next += 1;
        }
        let mut open = BTreeMap::new();
        for (hour, waiting) in std::mem::take(&mut self.open) {
            let start = SystemTime::UNIX_EPOCH + HOUR * u32::try_from(hour)?;
            let blocks = &self.blocks;
            let checked = stream::iter(waiting).map(async |(vm, kind)| {
                let done = is_compacted(blocks, &vm, kind, start).await?;
                anyhow::Ok((vm, kind, done))
            });
            let checked: Vec<_> = checked.buffer_unordered(4).try_collect().await?;
            let mut left = Vec::new();
            for (vm, kind, done) in checked {
                if done {
                    let delay = now.duration_since(start + HOUR).unwrap_or_default();
                    self.delays.push(delay.as_secs_f64() / 60.0);
                } else {
                    left.push((vm, kind));
                }
            }
            if !left.is_empty() {
                open.insert(hour, left);
            }
        }
        self.open = open;
        Ok(())
    }

    /// Ignores hours that ended after this time.
    fn until(&mut self, last: SystemTime) {
        self.open.retain(|hour, _| *hour < hours(last));
    }

    /// The number of hours that were compacted, how long that took in minutes, and the number of those that were not.
    fn finish(self) -> ((usize, Series), usize) {
        let missing = self.open.values().map(Vec::len).sum();
        ((self.delays.len(), self.delays.into_iter().collect()), missing)
    }
}

/// Whether a VM has a block of level 1 for the hour, by the beginning of the `_id`s of such blocks. Looking among all
/// blocks of the hour would take a part of the database's time.
async fn is_compacted(
    blocks: &Collection<Document>,
    vm: &str,
    kind: &str,
    start: SystemTime,
) -> anyhow::Result<bool> {
    let hour = DateTime::from_system_time(start).try_to_rfc3339_string()?;
    let prefix = format!("{kind}/{vm}/{hour}");
    // The character after `/` is `0`.
    let ids = doc! { "$gte": format!("{prefix}/"), "$lt": format!("{prefix}0") };
    let found = blocks.find_one(doc! { "_id": ids }).projection(doc! { "_id": 1 });
    let found = found.await.context("the blocks of an hour cannot be read")?;
    Ok(found.is_some())
}

/// Number of whole hours since 1970.
fn hours(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() / 3600)
}
