//! Measures the CPU time and the memory of an agent, and the size of its samples.

mod exits;

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use clap::Args;
use testkit::{Process, Program, Spec};
use vmwatch_api::metrics::ProcessOwner;
use vmwatch_blocks::{Encoder, encode_sample};
use vmwatch_service::config::UTC_OFFSET;

use self::exits::Exits;
use crate::{
    report::{Bound, Report, number},
    samples,
    statistics::Series,
    store::activity::{ACTIVITIES, PROCESSES, Vm},
    usage,
};

/// Command-line options of `bench agent`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Minimum number of processes on the machine; the benchmark starts sleeping processes to reach it
    #[arg(long, default_value_t = 300)]
    processes: usize,
    /// Number of measured rounds
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Duration of a round in seconds
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Number of processes per second that start and end while the agent receives the kernel's records of them
    #[arg(long, default_value_t = 2000)]
    exits: u32,
}

/// The sampling interval that the test harness sets for agents.
const INTERVAL: Duration = Duration::from_millis(500);
/// The sampling interval while processes end. It is a twelfth of the default, so the rows of ended processes cost more than
/// by default.
const INTERVAL_WITH_EXITS: &str = "5s";

pub(crate) async fn run(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("vmwatch-bench-").tempdir()?;
    let here = procfs::process::all_processes()?.count();
    let sleeping: Vec<_> = (here..options.processes).map(|_| sleep(folder.path())).collect();
    let resident = [
        many_processes(options, sleeping.len(), report).await?,
        many_exits(options, report).await?,
    ];
    let text = "peak resident memory of the agent, MB";
    let resident = resident.into_iter().fold(0.0, f64::max);
    report.target("agent_resident_peak_mb", text, resident, 1, Bound::AtMost(15.0));
    size_of_owners(report)
}

fn sleep(folder: &Path) -> Process {
    Process::start(Spec {
        name: "sleep".to_owned(),
        program: PathBuf::from("sleep"),
        args: vec!["infinity".to_owned()],
        env: Vec::new(),
        log: folder.join("sleep.log"),
    })
}

/// Measures the CPU time of the agent per sampled process. Returns its peak resident memory in MB.
async fn many_processes(options: &Options, sleeping: usize, report: &mut Report) -> anyhow::Result<f64> {
    let stack = samples::stack().replicas(Program::Agent, 1).start().await;
    report.describe(&stack)?;
    report.section("The agent");
    let processes = procfs::process::all_processes()?.count();
    report.paragraph(&format!(
        "The agent samples {processes} processes twice per second and publishes them. {sleeping} of them are sleeping \
         processes started for this benchmark."
    ));
    let agent = stack.replica(Program::Agent, 0).process.id();
    let time = Duration::from_secs(u64::from(options.seconds));
    let mut spent = Series::default();
    for _ in 0..options.rounds {
        let before = usage::cpu_seconds(agent)?;
        tokio::time::sleep(time).await;
        let samples = time.as_secs_f64() / INTERVAL.as_secs_f64();
        #[expect(
            clippy::cast_precision_loss,
            reason = "the number of processes is in the hundreds"
        )]
        let rows = samples * processes as f64;
        spent.push((usage::cpu_seconds(agent)? - before) * 1e6 / rows);
    }
    report.table(&[heading(), line("CPU time per sampled process, µs", &spent, 1)]);
    let text = "CPU time of the agent per sampled process, µs";
    report.target(
        "agent_cpu_us_per_process",
        text,
        spent.median(),
        1,
        Bound::AtMost(25.0),
    );
    usage::peak_resident_mb(agent)
}

/// Measures the CPU time that the kernel's records of ended processes add, in rounds with and without such processes. Returns
/// the peak resident memory of the agent in MB.
async fn many_exits(options: &Options, report: &mut Report) -> anyhow::Result<f64> {
    let stack = samples::stack()
        .replicas(Program::Agent, 1)
        .set(Program::Agent, "VMWATCH_AGENT_VM_INTERVAL", INTERVAL_WITH_EXITS)
        .set(
            Program::Agent,
            "VMWATCH_AGENT_PROCESS_INTERVAL",
            INTERVAL_WITH_EXITS,
        )
        .start()
        .await;
    let agent = stack.replica(Program::Agent, 0).process.id();
    let time = Duration::from_secs(u64::from(options.seconds));
    let (mut per_exit, mut added, mut rates) = (Series::default(), Series::default(), Series::default());
    for _ in 0..options.rounds {
        let before = usage::cpu_seconds(agent)?;
        tokio::time::sleep(time).await;
        let between = usage::cpu_seconds(agent)?;
        let exits = Exits::start(options.exits);
        tokio::time::sleep(time).await;
        #[expect(clippy::cast_precision_loss, reason = "the number is below a million")]
        let ended = exits.ended() as f64;
        let seconds = (usage::cpu_seconds(agent)? - between) - (between - before);
        drop(exits);
        rates.push(ended / time.as_secs_f64());
        per_exit.push(seconds * 1e6 / ended);
        added.push(seconds / ended * f64::from(options.exits) * 100.0);
    }
    report.paragraph(&format!(
        "Up to {} processes per second start and end in every second round, while the agent samples every \
         {INTERVAL_WITH_EXITS}. The CPU time of the round before is subtracted.",
        options.exits
    ));
    report.table(&[
        heading(),
        line("processes that ended per second", &rates, 0),
        line("CPU time of the agent per ended process, µs", &per_exit, 1),
    ]);
    let text = format!(
        "CPU time that {} exits per second add to the agent, percent of a core",
        number(f64::from(options.exits), 0)
    );
    report.target(
        "agent_exits_cpu_percent",
        &text,
        added.median(),
        1,
        Bound::AtMost(3.0),
    );
    usage::peak_resident_mb(agent)
}

fn heading() -> [String; 4] {
    ["", "median", "min", "max"].map(str::to_owned)
}

fn line(text: &str, values: &Series, decimals: usize) -> [String; 4] {
    let [median, min, max] = [values.median(), values.min(), values.max()];
    [
        text.to_owned(),
        number(median, decimals),
        number(min, decimals),
        number(max, decimals),
    ]
}

/// Measures how much longer owners make the encoded samples of generated VMs.
fn size_of_owners(report: &mut Report) -> anyhow::Result<()> {
    /// Number of VMs of each kind.
    const VMS: u32 = 20;
    let mut encoder = Encoder::new()?;
    let offset = UTC_OFFSET.default.parse()?;
    let mut worst = 0_f64;
    for activity in ACTIVITIES {
        let (mut with, mut without) = (0.0, 0.0);
        for number in 0..VMS {
            let mut sample = Vm::new(number, activity, offset)?.next(SystemTime::now()).clone();
            with += bytes(encode_sample(&sample, &mut encoder)?.len());
            for process in &mut sample.processes {
                process.owner = ProcessOwner::default();
            }
            without += bytes(encode_sample(&sample, &mut encoder)?.len());
        }
        report.paragraph(&format!(
            "An encoded sample of {PROCESSES} processes, of which {} % are active, has {} bytes with owners and {} without.",
            number(activity * 100.0, 0),
            number(with / f64::from(VMS), 0),
            number(without / f64::from(VMS), 0),
        ));
        worst = worst.max(with / without);
    }
    let text = format!("an encoded sample of {PROCESSES} processes with owners ÷ without");
    report.target("agent_owners_size_ratio", &text, worst, 2, Bound::AtMost(1.3));
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "samples have some kilobytes")]
const fn bytes(length: usize) -> f64 {
    length as f64
}
