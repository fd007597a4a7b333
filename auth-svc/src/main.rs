//! The program `vmwatch-auth`, which manages users, sessions, join tokens and agents.

use auth_svc::{
    config::{AuthSettings, SETTINGS},
    enrollment_commands::{self, AgentCommand, JoinTokenCommand},
    users::{self, UserCommand},
};
use clap::{Parser, Subcommand};
use vmwatch_bus::provision::setup::SetupArguments;
use vmwatch_service::{cli, program};

const PROGRAM: &str = "vmwatch-auth";

/// vmwatch service for users, sessions and agents: answers `auth.*` requests on the bus, and manages users, join tokens
/// and agents.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Answer requests on the bus; this is the default if no command is given.
    Serve,
    /// Add, change, list and remove users; passwords are read from a prompt or standard input.
    #[command(subcommand)]
    User(UserCommand),
    /// Create, list and revoke join tokens, with which agents enrol.
    #[command(subcommand)]
    JoinToken(JoinTokenCommand),
    /// List enrolled agents and revoke their keys.
    #[command(subcommand)]
    Agent(AgentCommand),
    /// Create this service's JetStream streams and KV buckets, or change them as configured; can be repeated.
    Setup(SetupArguments),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { command } = cli::parse(&SETTINGS.concat());
    let settings = cli::settings_or_exit(PROGRAM, AuthSettings::read);
    match command.unwrap_or(Command::Serve) {
        Command::User(command) => users::run(command, &settings).await?,
        Command::JoinToken(command) => {
            Box::pin(enrollment_commands::join_token(command, &settings)).await?;
        }
        Command::Agent(command) => enrollment_commands::agent(command, &settings).await?,
        Command::Setup(arguments) => Box::pin(auth_svc::set_up(&settings, arguments)).await?,
        Command::Serve => {
            let telemetry = settings.telemetry.clone();
            program::run(PROGRAM, &telemetry, |program| auth_svc::run(settings, program)).await?;
        }
    }
    Ok(())
}
