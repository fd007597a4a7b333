//! What an agent costs the machine that it samples.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use e2e::{Process, Program, Spec};

use crate::{
    report::{Bound, Report, number},
    statistics::Series,
    store, usage,
};

/// What `bench agent` can be told.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Processes that the machine has at least
    #[arg(long, default_value_t = 300)]
    processes: usize,
    /// Rounds that count
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of a round
    #[arg(long, default_value_t = 10)]
    seconds: u32,
}

/// The harness lets its agents sample everything so often.
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
    let stack = store::stack().replicas(Program::Agent, 1).start().await;
    report.introduce(&stack)?;
    report.section("The agent");
    let processes = procfs::process::all_processes()?.count();
    report.say(&format!(
        "{processes} processes, each sampled and published twice a second, from the messages' encoding to the stream's \
         acknowledgement; of them {} sleep and were started for this.",
        sleeping.len()
    ));
    let agent = stack.replica(Program::Agent, 0).process.id();
    let time = Duration::from_secs(u64::from(options.seconds));
    let mut spent = Series::default();
    for _ in 0..options.rounds {
        let before = usage::cpu_seconds(agent)?;
        tokio::time::sleep(time).await;
        let samples = time.as_secs_f64() / INTERVAL.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "some hundred processes")]
        let rows = samples * processes as f64;
        spent.push((usage::cpu_seconds(agent)? - before) * 1e6 / rows);
    }
    let lines = [
        ["", "median", "least", "most"].map(str::to_owned),
        [
            "CPU, µs a process sampled".to_owned(),
            number(spent.median(), 1),
            number(spent.least(), 1),
            number(spent.most(), 1),
        ],
    ];
    report.table(&lines);
    let text = "agent, CPU a process sampled, µs";
    report.reach(
        "agent_cpu_us_a_process",
        text,
        spent.median(),
        1,
        Bound::AtMost(25.0),
    );
    let text = "agent resident, at most, MB";
    let resident = usage::peak_resident_mb(agent)?;
    report.reach("agent_resident_peak_mb", text, resident, 1, Bound::AtMost(15.0));
    Ok(())
}
