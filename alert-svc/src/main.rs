//! The program `vmwatch-alert`, which evaluates alert rules and notifies recipients.

use alert_svc::{
    Rekeyed,
    config::{AlertSettings, SETTINGS},
};
use clap::{Parser, Subcommand};
use vmwatch_bus::provision::setup::SetupArguments;
use vmwatch_service::{cli, program};

const PROGRAM: &str = "vmwatch-alert";

/// vmwatch service for alerts: evaluates rules, notifies recipients, and answers `alert.*` requests on the bus.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service; this is the default if no command is given.
    Serve,
    /// Create this service's KV buckets on the bus, or change them as configured; can be repeated.
    Setup(SetupArguments),
    /// Seal the secrets of all channels with the first key of `VMWATCH_ALERT_KEY_FILE`; afterwards its other keys can be removed.
    Rekey,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { command } = cli::parse(&SETTINGS.concat());
    let settings = cli::settings_or_exit(PROGRAM, AlertSettings::read);
    match command.unwrap_or(Command::Serve) {
        Command::Setup(arguments) => alert_svc::set_up(&settings, arguments).await?,
        Command::Rekey => report(&alert_svc::rekey(&settings).await?)?,
        Command::Serve => {
            let telemetry = settings.telemetry.clone();
            program::run(PROGRAM, &telemetry, |program| alert_svc::run(settings, program)).await?;
        }
    }
    Ok(())
}

/// Prints what came of `rekey`. Fails if a secret is not sealed with the first key.
fn report(rekeyed: &Rekeyed) -> anyhow::Result<()> {
    println!(
        "{} secrets sealed again, {} were sealed with the first key already",
        rekeyed.sealed, rekeyed.current
    );
    for (channel, error) in &rekeyed.failed {
        println!("{channel}: {error}");
    }
    for channel in &rekeyed.changed {
        println!("{channel}: the channel was changed meanwhile; run the command again");
    }
    anyhow::ensure!(
        rekeyed.failed.is_empty() && rekeyed.changed.is_empty(),
        "some secrets are not sealed with the first key; do not remove the other keys yet"
    );
    Ok(())
}
