//! Measures reads of a VM with a long history through the gateway: newest rows, process tables, and series.

use std::time::{Duration, SystemTime};

use testkit::{Program, Stack};
use vmwatch_api::{
    InstanceId, Role, Scope,
    time::{CreateDate, UtcOffset},
};
use vmwatch_blocks::Encoder;
use vmwatch_service::config::UTC_OFFSET;

use super::{
    Scale,
    activity::{ACTIVITIES, Vm, name},
    newest,
    requests::timed,
};
use crate::{
    blocks::BlockWriter,
    fleet::{Random, VM_INTERVAL, VM_SAMPLES_PER_MINUTE},
    load,
    report::{Bound, Report, number},
    samples::{self, Message},
    usage,
};

const MINUTE: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);
/// Part of the long history in which the process tables are read, counted from its beginning.
const OLDEST: Duration = Duration::from_hours(24 * 20);
/// Time range and number of points of a series.
const SERIES: (Duration, u32) = (Duration::from_hours(24 * 30), 500);

/// Numbers of the VM with a long history and the one with an hour.
const LONG: u32 = 0;
const SHORT: u32 = 1;

/// The VMs whose rows are read.
pub(super) struct Setup {
    pub(super) stack: Stack,
    pub(super) session: String,
    pub(super) offset: UtcOffset,
    /// The VM with a long history, and one with an hour of history.
    pub(super) long: InstanceId,
    pub(super) short: InstanceId,
    /// The beginning of the long history, and the time of the last sample.
    begin: SystemTime,
    pub(super) end: SystemTime,
}

pub(crate) async fn run(scale: &Scale, report: &mut Report) -> anyhow::Result<f64> {
    let setup = Setup::start(scale, report).await?;
    newest::run(&setup, scale, report).await?;
    setup.tables(scale, report).await?;
    setup.series(scale, report).await?;
    let resident = setup.resident_mb()?;
    newest::compare_with_flat(&setup, scale, report).await?;
    Ok(resident.max(setup.resident_mb()?))
}

impl Setup {
    async fn start(scale: &Scale, report: &mut Report) -> anyhow::Result<Self> {
        let stack = samples::stack_for_reads()
            .set(Program::Metrics, "VMWATCH_FLAT_CHECK_INTERVAL", "1m")
            .start()
            .await;
        report.describe(&stack)?;
        report.section("Reads");
        let offset = UTC_OFFSET.default.parse()?;
        let end = SystemTime::now();
        let [mut long, mut short] = [
            Vm::new(LONG, ACTIVITIES[1], offset)?,
            Vm::new(SHORT, ACTIVITIES[1], offset)?,
        ];
        let days = u32::try_from(scale.days)?;
        println!("storing {days} days of a VM");
        let since_hour = end.duration_since(SystemTime::UNIX_EPOCH)?.as_secs() % 3600;
        let hour = end - Duration::from_secs(since_hour);
        // The current hour and the one before it are not compacted.
        let compacted = hour - HOUR;
        let begin = hour - DAY * days;
        // Two halves are written at the same time, on two cores.
        let middle = begin + HOUR * (days * 12);
        let halves = [(begin, middle), (middle, compacted)].map(|(from, to)| {
            let writer = BlockWriter::new(&stack.database.handle(), offset);
            tokio::spawn(write_history(writer, offset, from, to))
        });
        for half in halves {
            half.await??;
        }
        let mut messages = messages(&mut long, compacted, end)?;
        messages.extend(self::messages(&mut short, end - HOUR, end)?);
        samples::publish(stack.bus.jetstream_for_tests(), messages).await?;
        samples::drained(stack.bus.jetstream_for_tests()).await?;
        report.paragraph(&format!(
            "Two VMs with 100 processes, 40 % of them active, a sample of the processes every minute and of the VM every ten \
             seconds: one has {days} days of history, in blocks of level 1 except for the last two hours; the other has an \
             hour. metrics-svc reuses no answers."
        ));
        Ok(Self {
            session: stack.session(Role::Viewer, Scope::All).await,
            stack,
            offset,
            long: long.id().clone(),
            short: short.id().clone(),
            begin,
            end,
        })
    }

    pub(super) fn resident_mb(&self) -> anyhow::Result<f64> {
        usage::peak_resident_mb(self.stack.replica(Program::Metrics, 0).process.id())
    }

    /// Measures process tables of moments at the beginning of the long history.
    async fn tables(&self, scale: &Scale, report: &mut Report) -> anyhow::Result<()> {
        let mut random = Random::new();
        let seconds = usize::try_from(OLDEST.as_secs())?;
        let requests = (0..scale.tables).map(|_| {
            let at = self.begin + MINUTE + Duration::from_secs(random.below(seconds) as u64);
            let path = format!("/api/v1/vms/{}/processes?at={}", self.long, timestamp(at));
            load::get(&path, &self.session)
        });
        let requests: Vec<_> = requests.collect();
        let took = timed(&self.stack, &requests, br#""total":100,"#).await?;
        report.figure("process_table_old_median_ms", took.median());
        let text = format!("process table of a moment {} days ago, p99, ms", scale.days);
        let p99 = took.quantile(0.99);
        report.target("process_table_old_p99_ms", &text, p99, 1, Bound::AtMost(20.0));
        Ok(())
    }

    /// Measures the series of the processes with one name.
    async fn series(&self, scale: &Scale, report: &mut Report) -> anyhow::Result<()> {
        let (range, points) = SERIES;
        let path = format!(
            "/api/v1/vms/{}/processes/history?name={}&from={}&to={}&points={points}",
            self.long,
            name(1),
            timestamp(self.end - range),
            timestamp(self.end)
        );
        let requests = vec![load::get(&path, &self.session); scale.series];
        let took = timed(&self.stack, &requests, br#""buckets":[{"#).await?;
        report.figure("series_30_days_max_ms", took.max());
        let text = "one name of a VM over 30 days at a minute, 500 points, median, ms";
        report.target("series_30_days_ms", text, took.median(), 0, Bound::AtMost(300.0));
        report.paragraph(&format!(
            "The slowest of {} series took {} ms.",
            scale.series,
            number(took.max(), 0)
        ));
        Ok(())
    }
}

/// Writes the long history between two times as blocks of level 1.
async fn write_history(
    writer: anyhow::Result<BlockWriter>,
    offset: UtcOffset,
    from: SystemTime,
    to: SystemTime,
) -> anyhow::Result<()> {
    let (mut writer, mut vm) = (writer?, Vm::new(LONG, ACTIVITIES[1], offset)?);
    let mut at = from;
    while at < to {
        writer.add(vm.next(at)).await?;
        for step in 1..VM_SAMPLES_PER_MINUTE {
            writer.add(&vm.sample(at + VM_INTERVAL * step, false)).await?;
        }
        at += MINUTE;
    }
    writer.finish().await
}

/// The messages that an agent of the VM sends in this time with the default intervals.
fn messages(vm: &mut Vm, from: SystemTime, to: SystemTime) -> anyhow::Result<Vec<Message>> {
    let (mut messages, mut encoder) = (Vec::new(), Encoder::new()?);
    let mut at = from;
    for step in 0_u32.. {
        if at >= to {
            break;
        }
        let sample = vm.sample(at, step.is_multiple_of(VM_SAMPLES_PER_MINUTE));
        messages.push(Message::encode(&sample, &mut encoder)?);
        at += VM_INTERVAL;
    }
    Ok(messages)
}

/// Writes a time as RFC 3339 requires.
pub(super) fn timestamp(at: SystemTime) -> String {
    format!("{}Z", CreateDate::at(at, UtcOffset::UTC).as_str())
}
