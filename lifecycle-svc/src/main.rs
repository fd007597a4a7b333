//! `vmwatch-lifecycle` starts and stops VMs.

use std::time::Duration;

use clap::{Parser, Subcommand};
use lifecycle_svc::{
    client::{self, ClientCommand},
    config::{LifecycleSettings, SETTINGS, SetupSettings},
};
use vmwatch_bus::{BusSettings, provision::setup::SetupArguments};
use vmwatch_service::{cli, program};

const PROGRAM: &str = "vmwatch-lifecycle";

/// Starts and stops VMs for vmwatch: answers `lifecycle.*` requests on the bus, and queries the running service.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service: answer requests on the bus (the default if no command is given).
    Serve,
    /// Create or update this service's KV buckets on the bus according to the settings; safe to repeat.
    Setup(SetupArguments),
    #[command(flatten)]
    Client(ClientCommand),
}

fn main() -> anyhow::Result<()> {
    let Arguments { command } = cli::parse(&SETTINGS.concat());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(run(command.unwrap_or(Command::Serve)));
    // A call that hangs inside libvirt cannot be cancelled, so exit without waiting for its thread.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve => {
            let settings = cli::settings_or_exit(PROGRAM, LifecycleSettings::read);
            let telemetry = settings.telemetry.clone();
            program::run(PROGRAM, &telemetry, |program| {
                lifecycle_svc::run(settings, program)
            })
            .await?;
        }
        Command::Setup(arguments) => {
            let settings = cli::settings_or_exit(PROGRAM, SetupSettings::read);
            lifecycle_svc::set_up(&settings, arguments).await?;
        }
        Command::Client(command) => {
            let settings = cli::settings_or_exit(PROGRAM, BusSettings::read);
            let done = client::run(command, &settings).await;
            done.unwrap_or_else(|error| cli::fail(PROGRAM, &error));
        }
    }
    Ok(())
}
