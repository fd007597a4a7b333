//! The program `vmwatch-agent`, which samples a VM and its processes and publishes the samples.

use agent::config::{AgentSettings, SETTINGS};
use clap::Parser;
use vmwatch_service::{cli, program};

const PROGRAM: &str = "vmwatch-agent";

/// Samples this VM and its processes and publishes the samples to NATS.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {}

fn main() -> anyhow::Result<()> {
    let Arguments {} = cli::parse(&SETTINGS.concat());
    let settings = cli::settings_or_exit(PROGRAM, AgentSettings::read);
    // A single thread runs all asynchronous work, which keeps the agent's memory usage low. Blocking calls run on other
    // threads.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(agent::BLOCKING_THREADS)
        .build()?;
    let telemetry = settings.telemetry.clone();
    let outcome = runtime.block_on(program::run(PROGRAM, &telemetry, |program| {
        agent::run(settings, program)
    }));
    // The runtime does not wait for its threads, because a thread that hangs on a disk must not delay the exit.
    runtime.shutdown_background();
    Ok(outcome?)
}
