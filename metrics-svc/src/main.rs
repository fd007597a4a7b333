//! `vmwatch-metrics` stores rows of VMs and processes and answers queries for them.

use clap::{Parser, Subcommand};
use metrics_svc::{
    commands::{self, OperatorCommand},
    config::{MetricsSettings, SETTINGS},
};
use vmwatch_service::{cli, program};

const PROGRAM: &str = "vmwatch-metrics";

/// Stores the samples of VMs and processes that agents publish, and answers `metrics.*` requests on the bus.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service: store samples and answer requests on the bus (the default if no command is given).
    Serve,
    #[command(flatten)]
    Operator(OperatorCommand),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { command } = cli::parse(&SETTINGS.concat());
    let settings = cli::settings_or_exit(PROGRAM, MetricsSettings::read);
    match command.unwrap_or(Command::Serve) {
        Command::Serve => {
            let telemetry = settings.telemetry.clone();
            program::run(PROGRAM, &telemetry, |program| metrics_svc::run(settings, program)).await?;
        }
        Command::Operator(command) => commands::run(command, &settings).await?,
    }
    Ok(())
}
