//! `vmwatch-gateway`: the HTTP edge.

use clap::Parser;
use gateway::config::{GatewaySettings, SETTINGS};
use shared::{cli, lifetime, telemetry::Telemetry};

const PROGRAM: &str = "vmwatch-gateway";

/// The HTTP edge of vmwatch: translates the documented API into requests on the bus.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments {} = cli::parse(&SETTINGS.concat());
    let settings = cli::settings_or_exit(PROGRAM, GatewaySettings::read);
    let telemetry = Telemetry::start(PROGRAM, &settings.telemetry)?;
    gateway::run(settings, telemetry.metrics(), lifetime::shutdown_on_signal()?).await?;
    telemetry.finish();
    Ok(())
}
