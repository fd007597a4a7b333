//! `vmwatch-gateway` serves the HTTP APIs and the web page.

use clap::Parser;
use gateway::config::{GatewaySettings, SETTINGS};
use vmwatch_service::{cli, program};

const PROGRAM: &str = "vmwatch-gateway";

/// HTTP gateway of vmwatch: serves the documented API, the REST API and the web page, and forwards requests to the
/// services over the bus.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments {} = cli::parse(&SETTINGS.concat());
    let settings = cli::settings_or_exit(PROGRAM, GatewaySettings::read);
    let telemetry = settings.telemetry.clone();
    program::run(PROGRAM, &telemetry, |program| gateway::run(settings, program)).await?;
    Ok(())
}
