//! Measures the CPU time and the memory of an agent.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use testkit::{Process, Program, Spec};

use crate::{
    report::{Bound, Report, number},
    samples,
    statistics::Series,
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
}

/// The sampling interval that the test harness sets for agents.
const INTERVAL: Duration = Duration::from_millis(500);

pub(crate) async fn run(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("vmwatch-bench-").tempdir()?;
    let here = procfs::process::all_processes()?.count();
    let sleeping: Vec<_> = (here..options.processes)
        .map(|_| {
            Process::start(Spec {
                name: "sleep".to_owned(),
                program: PathBuf::from("sleep"),
                args: vec!["infinity".to_owned()],
                env: Vec::new(),
                log: folder.path().join("sleep.log"),
            })
        })
        .collect();
    let stack = samples::stack().replicas(Program::Agent, 1).start().await;
    report.describe(&stack)?;
    report.section("The agent");
    let processes = procfs::process::all_processes()?.count();
    report.paragraph(&format!(
        "The agent samples {processes} processes twice per second and publishes them. {} of them are sleeping \
         processes started for this benchmark.",
        sleeping.len()
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
    let lines = [
        ["", "median", "min", "max"].map(str::to_owned),
        [
            "CPU time per sampled process, µs".to_owned(),
            number(spent.median(), 1),
            number(spent.min(), 1),
            number(spent.max(), 1),
        ],
    ];
    report.table(&lines);
    let text = "CPU time of the agent per sampled process, µs";
    report.target(
        "agent_cpu_us_per_process",
        text,
        spent.median(),
        1,
        Bound::AtMost(25.0),
    );
    let text = "peak resident memory of the agent, MB";
    let resident = usage::peak_resident_mb(agent)?;
    report.target("agent_resident_peak_mb", text, resident, 1, Bound::AtMost(15.0));
    Ok(())
}
