//! Measures alert-svc with a large fleet: its CPU time and memory while it evaluates every rule on every record, and the time
//! from the sample that completes a condition to the message at a receiver.
//!
//! The records of most VMs are published as metrics-svc publishes them, because storing the samples of 10,000 VMs would keep
//! the machine busy. Some VMs take the whole path: their samples are stored by metrics-svc, and each fires one alert, for
//! which alert-svc reads the culprits.

mod receiver;
mod rules;

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, ensure};
use async_nats::jetstream::Context;
use clap::Args;
use futures::future::join_all;
use testkit::{Program, Stack, StackBuilder, eventually};
use vmwatch_api::{
    InstanceId,
    alerts::evaluation::{
        EVALUATION_STREAM, EvaluationRecord, FilesystemUse, Source, WatchedProcesses, evaluation_subject,
    },
    measures::VmValues,
    processes::ProcessName,
    time::{UtcOffset, unix_millis},
};
use vmwatch_blocks::Encoder;
use vmwatch_service::config::UTC_OFFSET;

use self::receiver::Receiver;
use crate::{
    fleet::{Random, VM_INTERVAL, instance, sample_at},
    report::{Bound, Report, number},
    samples::Message,
    statistics::Series,
    usage,
};

/// Command-line options of `bench alerts`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of simulated VMs
    #[arg(long, default_value_t = 10_000)]
    vms: u32,
    /// Number of rules, including the starter rules
    #[arg(long, default_value_t = 20)]
    rules: usize,
    /// Duration of the measurement in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Duration of the load before the measurement: two records of each VM.
const WARM_UP: Duration = Duration::from_secs(20);
/// Records are published in this interval, a few at a time, so that they arrive evenly.
const TICK: Duration = Duration::from_millis(20);
/// Number of processes in the samples of the VMs that fire alerts.
const PROCESSES: u32 = 100;
/// CPU usage of these VMs, above the limit of the rule.
const BUSY: f64 = 99.9;
/// The condition holds for the duration of the rule once this time has passed between two samples.
const COMPLETES_AFTER: Duration = Duration::from_millis(10_050);
/// Time limit for the messages after the last sample.
const ARRIVAL: Duration = Duration::from_secs(30);

/// The consumer with which alert-svc reads the records.
const CONSUMER: &str = "evaluate";

pub(crate) async fn run(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let time = Duration::from_secs(options.seconds);
    ensure!(
        time > COMPLETES_AFTER,
        "the measurement must last longer than {COMPLETES_AFTER:?}"
    );
    let receiver = Receiver::start().await?;
    let stack = stack(&receiver).start().await;
    report.describe(&stack)?;
    report.section("Alerts");
    rules::create(&stack.bus, options.rules, &receiver.url()).await?;
    let jetstream = stack.bus.jetstream_for_tests();
    let load = tokio::spawn(publish(jetstream.clone(), options.vms));
    tokio::time::sleep(WARM_UP).await;

    let alert_svc = stack.replica(Program::Alert, 0).process.id();
    let evaluated = evaluated(jetstream).await?;
    let before = (Instant::now(), usage::cpu_seconds(alert_svc)?);
    let firing = bursts(jetstream, time).await?;
    let elapsed = before.0.elapsed().as_secs_f64();
    let percent = (usage::cpu_seconds(alert_svc)? - before.1) / elapsed * 100.0;
    let resident = usage::resident_mb(alert_svc)?;
    let rate = (self::evaluated(jetstream).await? - evaluated) / elapsed;
    ensure!(!load.is_finished(), "publishing the records of the fleet failed");
    load.abort();

    let delays = delays(&receiver, &firing).await;
    let text = format!(
        "CPU time of alert-svc, {} VMs every 10 s, {} rules, percent of a core",
        number(f64::from(options.vms), 0),
        options.rules
    );
    report.target("alert_cpu_percent", &text, percent, 1, Bound::AtMost(10.0));
    let text = "resident memory of alert-svc, MB";
    report.target("alert_resident_mb", text, resident, 1, Bound::AtMost(60.0));
    let text = "longest time from the completing sample to the message, ms";
    report.target(
        "alert_to_message_ms",
        text,
        delays.max(),
        0,
        Bound::AtMost(2000.0),
    );
    report.figure("alert_to_message_median_ms", delays.median());
    report.figure("alert_records_per_second", rate);
    let rate = number(rate, 0);
    report.paragraph(&format!("{rate} records per second were evaluated."));
    culprits(report, &stack, firing.len()).await?;
    backlog(report, jetstream).await
}

fn stack(receiver: &Receiver) -> StackBuilder {
    [Program::Gateway, Program::Auth]
        .into_iter()
        .fold(Stack::builder().durable().without_rates(), |builder, program| {
            builder.replicas(program, 0)
        })
        .replicas(Program::Alert, 1)
        .set(
            Program::Alert,
            "VMWATCH_ALERT_ALLOW",
            &receiver.address.to_string(),
        )
}

/// A VM that fires an alert, and when its completing sample was published.
struct Firing {
    vm: String,
    completed: Instant,
}

/// Makes one VM per second fire an alert, so that the last condition is complete at the end of this time.
async fn bursts(jetstream: &Context, time: Duration) -> anyhow::Result<Vec<Firing>> {
    let end = Instant::now() + time;
    let count = u32::try_from(time.saturating_sub(COMPLETES_AFTER).as_secs())?;
    let starts = (0..count).map(|index| async move {
        tokio::time::sleep(Duration::from_secs(u64::from(index))).await;
        // The ids follow those of the fleet, whose records are published without a sample.
        burst(jetstream, instance(u32::MAX - index)).await
    });
    let firing = join_all(starts).await.into_iter().collect();
    tokio::time::sleep(end.saturating_duration_since(Instant::now())).await;
    firing
}

async fn burst(jetstream: &Context, vm: String) -> anyhow::Result<Firing> {
    let id: InstanceId = vm.parse()?;
    busy_sample(&id)?.publish(jetstream).await?;
    tokio::time::sleep(COMPLETES_AFTER).await;
    let message = busy_sample(&id)?;
    let completed = Instant::now();
    message.publish(jetstream).await?;
    Ok(Firing { vm, completed })
}

fn busy_sample(id: &InstanceId) -> anyhow::Result<Message> {
    let offset: UtcOffset = UTC_OFFSET.default.parse()?;
    let mut sample = sample_at(id, SystemTime::now(), offset, true, PROCESSES);
    if let Some(vm) = &mut sample.vm {
        vm.cpu_util = Some(BUSY);
    }
    Message::encode(&sample, &mut Encoder::new()?)
}

/// Waits for the message about each VM, and returns the delays in milliseconds.
async fn delays(receiver: &Receiver, firing: &[Firing]) -> Series {
    let all = "a message about each firing VM has arrived";
    eventually(all, ARRIVAL, async || {
        let arrived = firing.iter().map(|one| {
            let arrival = receiver.arrival(&one.vm).ok_or_else(|| one.vm.clone())?;
            Ok((arrival - one.completed).as_secs_f64() * 1e3)
        });
        arrived.collect::<Result<Series, String>>()
    })
    .await
}

/// Checks that the alert of each VM names processes.
async fn culprits(report: &mut Report, stack: &Stack, expected: usize) -> anyhow::Result<()> {
    let alerts = rules::firing(&stack.bus).await?;
    let named = alerts.iter().filter(|alert| {
        let culprits = alert.culprits.as_ref();
        culprits.is_some_and(|culprits| !culprits.processes.is_empty())
    });
    let missing = u32::try_from(expected.saturating_sub(named.count()))?;
    let text = format!("CPU alerts without culprits, of {expected}");
    report.target(
        "alert_culprits_missing",
        &text,
        f64::from(missing),
        0,
        Bound::AtMost(0.0),
    );
    Ok(())
}

/// Reports how many records wait for their evaluation at the end.
/// Number of records that were evaluated and acknowledged.
async fn evaluated(jetstream: &Context) -> anyhow::Result<f64> {
    let stream = jetstream.get_stream(EVALUATION_STREAM).await?;
    let acknowledged = stream.consumer_info(CONSUMER).await?.ack_floor.stream_sequence;
    Ok(f64::from(
        u32::try_from(acknowledged).context("the number of evaluated records is too large")?,
    ))
}

async fn backlog(report: &mut Report, jetstream: &Context) -> anyhow::Result<()> {
    let stream = jetstream.get_stream(EVALUATION_STREAM).await?;
    let consumer = stream.consumer_info(CONSUMER).await?;
    let waiting =
        u32::try_from(consumer.num_pending).context("the number of waiting records is too large")?;
    report.figure("alert_records_waiting", f64::from(waiting));
    let waiting = number(f64::from(waiting), 0);
    report.paragraph(&format!("{waiting} records waited to be evaluated at the end."));
    Ok(())
}

/// Publishes the evaluation records of a fleet, as many per second as it would send samples.
async fn publish(jetstream: Context, vms: u32) {
    let ids: Result<Vec<InstanceId>, _> = (0..vms).map(|vm| instance(vm).parse()).collect();
    let Ok(ids) = ids else { return };
    let mut random = Random::new();
    let per_tick = f64::from(vms) * TICK.as_secs_f64() / VM_INTERVAL.as_secs_f64();
    let mut due = 0.0;
    let mut next = ids.iter().cycle();
    let mut ticks = tokio::time::interval(TICK);
    loop {
        ticks.tick().await;
        due += per_tick;
        let mut publishing = Vec::new();
        while due >= 1.0 {
            due -= 1.0;
            let Some(id) = next.next() else { return };
            let Ok(body) = serde_json::to_vec(&record(&mut random, id)) else {
                return;
            };
            let jetstream = &jetstream;
            publishing.push(async move {
                let sent = jetstream.publish(evaluation_subject(id), body.into()).await;
                let Ok(acknowledgement) = sent else { return false };
                acknowledgement.await.is_ok()
            });
        }
        if join_all(publishing).await.contains(&false) {
            return;
        }
    }
}

/// Returns the record of a VM whose values are below every limit.
fn record(random: &mut Random, id: &InstanceId) -> EvaluationRecord {
    let now = unix_millis();
    let mut percent = || Some(random.unit() * 90.0);
    let vm = VmValues {
        cpu_util: percent(),
        mem: percent(),
        disk_read: percent(),
        disk_write: percent(),
        net_incoming: percent(),
        net_outgoing: percent(),
        proc: Some(PROCESSES),
        load: percent(),
        ..VmValues::default()
    };
    let filesystem = |mount_point: &str, used: Option<f64>| FilesystemUse {
        mount_point: mount_point.to_owned(),
        used: used.unwrap_or_default(),
    };
    let filesystems = vec![filesystem("/", percent()), filesystem("/var", percent())];
    let process = |name: &str| -> Option<WatchedProcesses> {
        Some(WatchedProcesses {
            name: ProcessName::new(name)?,
            processes: 4,
            cpu_util: 1.5,
            mem: 2.5,
        })
    };
    EvaluationRecord {
        instance_id: id.clone(),
        source: Source::Agent,
        at_ms: now,
        arrived_ms: now,
        part: 0,
        vm: Some(vm),
        filesystems,
        has_processes: true,
        processes: rules::NAMES.into_iter().filter_map(process).collect(),
        watched_revision: 1,
    }
}
