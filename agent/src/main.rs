//! The program `vmwatch-agent`, which samples a VM and its processes and publishes the samples.

use agent::{
    config::{AgentSettings, EnrolCommandSettings, SETTINGS},
    enrol::command::{self, EnrolArguments},
};
use clap::{Parser, Subcommand};
use vmwatch_service::{
    cli,
    config::EX_USAGE,
    program::{self, ProgramError},
};

const PROGRAM: &str = "vmwatch-agent";

/// Samples this VM and its processes and publishes the samples to NATS.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Sample and publish; this is the default if no command is given
    Run,
    /// Enrol this VM: make a key, register it at the gateway with a join token, and store the gateway's answer
    Enroll(EnrolArguments),
}

fn main() -> anyhow::Result<()> {
    let Arguments { command } = cli::parse(&SETTINGS.concat());
    match command.unwrap_or(Command::Run) {
        Command::Run => run(),
        Command::Enroll(arguments) => {
            let settings = cli::settings_or_exit(PROGRAM, EnrolCommandSettings::read);
            if let Err(error) = command::run(arguments, settings) {
                eprintln!("{PROGRAM}: {error}");
                std::process::exit(error.exit_code());
            }
            Ok(())
        }
    }
}

fn run() -> anyhow::Result<()> {
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
    if let Err(ProgramError::Failed(error)) = &outcome
        && error.is_invalid_setting()
    {
        eprintln!("{PROGRAM}: {error}");
        std::process::exit(EX_USAGE);
    }
    Ok(outcome?)
}
