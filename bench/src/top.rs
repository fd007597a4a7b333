//! Measures `vmwatch top`: the time until its first screen, and its CPU time while it follows a VM.

use std::time::{Duration, Instant};

use clap::Args;
use testkit::{Cli, PATIENCE, Program, Stack, THIS_MACHINE, Terminal, eventually};
use vmwatch_api::{Role, Scope};

use crate::{
    report::{Bound, Report, number},
    statistics::Series,
    usage,
};

/// Command-line options of `bench top`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of measured starts
    #[arg(long, default_value_t = 9)]
    starts: u32,
    /// Duration of each of the three rounds in which the CPU time is measured, in seconds
    #[arg(long, default_value_t = 30)]
    seconds: u32,
}

/// The sampling interval of the agent. It is a twelfth of the default for processes, so `top` loads more tables.
const INTERVAL: &str = "5s";
/// Rounds in which the CPU time is measured.
const ROUNDS: u32 = 3;
/// Interval at which the screen is read.
const LOOK: Duration = Duration::from_millis(1);

pub(crate) async fn run(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let stack = Stack::builder()
        .replicas(Program::Agent, 1)
        .set(Program::Agent, "VMWATCH_AGENT_VM_INTERVAL", INTERVAL)
        .set(Program::Agent, "VMWATCH_AGENT_PROCESS_INTERVAL", INTERVAL)
        .start()
        .await;
    report.describe(&stack)?;
    report.section("The command line: vmwatch top");
    let token = stack.session(Role::Viewer, Scope::All).await;
    let cli = Cli::with_token(stack.gateway(0), &token);
    eventually("the agent has sent processes", PATIENCE, async || {
        let listed = cli.run(&["ps", THIS_MACHINE]);
        let lines = listed.stdout.split(|byte| *byte == b'\n').count();
        if lines > 10 {
            Ok(())
        } else {
            Err(format!("{lines} lines"))
        }
    })
    .await;
    let processes = procfs::process::all_processes()?.count();
    report.paragraph(&format!(
        "A VM with {processes} processes, sampled every {INTERVAL}, in a terminal of 120 columns and 40 rows. The first screen is \
         the first with rows of processes, after two requests for the VM and one for its processes."
    ));
    let mut first = Series::default();
    for _ in 0..options.starts {
        let started = Instant::now();
        let terminal = start(&cli);
        while !terminal.text().contains("LIVE") {
            anyhow::ensure!(
                started.elapsed() < PATIENCE,
                "no first screen:\n{}",
                terminal.text()
            );
            tokio::time::sleep(LOOK).await;
        }
        first.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let terminal = start(&cli);
    terminal.shows("LIVE").await;
    let mut used = Series::default();
    for _ in 0..ROUNDS {
        let before = usage::cpu_seconds(terminal.id())?;
        tokio::time::sleep(Duration::from_secs(u64::from(options.seconds))).await;
        let seconds = usage::cpu_seconds(terminal.id())? - before;
        used.push(seconds / f64::from(options.seconds) * 100.0);
    }
    let resident = usage::resident_mb(terminal.id())?;
    report.paragraph(&format!(
        "Resident memory after that: {} MB.",
        number(resident, 1)
    ));
    let text = "`vmwatch top`: time until the first screen, median, ms";
    report.target(
        "top_first_screen_ms",
        text,
        first.median(),
        0,
        Bound::AtMost(150.0),
    );
    let text = "`vmwatch top`: CPU time while it follows a VM, percent of a core";
    report.target("top_cpu_percent", text, used.median(), 2, Bound::AtMost(2.0));
    Ok(())
}

fn start(cli: &Cli) -> Terminal {
    cli.terminal(&["top", THIS_MACHINE], 120, 40)
}
