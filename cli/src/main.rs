//! `vmwatch`, the command line of vmwatch. It uses the REST API (docs/api/rest.md) and nothing else.
//!
//! Each command prints its result to the standard output, as a table or with `--json` as JSON, and notes and errors to
//! the standard error. The exit code says which kind of error occurred.

mod answers;
mod args;
mod client;
mod commands;
mod config;
mod connection;
mod error;
mod output;
mod secret;
mod sse;
mod table;
mod text;
mod time;
mod tls;
mod top;
mod url;
mod vm;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::{
    args::{Arguments, Command, ForcedAct, Request},
    client::Client,
    connection::Choices,
    error::{CliError, exit},
    output::{Output, note},
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let code = if error.use_stderr() { exit::USAGE } else { 0 };
            // Printing fails only if the terminal was closed; the message then cannot be shown anywhere else.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match run(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.exit_code();
            if code != 0 {
                note(&format!("vmwatch: {error}"));
            }
            ExitCode::from(code)
        }
    }
}

async fn run(arguments: &Arguments) -> Result<(), CliError> {
    let output = &Output::new(&arguments.global);
    let choices = Choices::new(&arguments.global);
    match &arguments.command {
        Command::Login(args) => commands::login::login(args, &choices, output).await,
        Command::Logout => commands::login::logout(&choices).await,
        Command::Context(command) => commands::contexts::run(command, output),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "vmwatch", &mut script);
            output.print(&String::from_utf8_lossy(&script))
        }
        Command::Request(command) => request(command, &Client::new(choices.connection()?)?, output).await,
    }
}

async fn request(command: &Request, client: &Client, output: &Output) -> Result<(), CliError> {
    match command {
        Request::Vms(args) => commands::vms::run(args, client, output).await,
        Request::Top(args) => top::run(args, client, output).await,
        Request::Ps(args) => commands::ps::run(args, client, output).await,
        Request::WhoRan(args) => commands::who_ran::run(args, client, output).await,
        Request::History(args) => commands::history::run(args, client, output).await,
        Request::Changed(args) => commands::changed::run(args, client, output).await,
        Request::Start(args) => commands::actions::run("start", args, client, output).await,
        Request::Stop(ForcedAct { act, force }) => {
            let action = if *force { "force-stop" } else { "stop" };
            commands::actions::run(action, act, client, output).await
        }
        Request::Reboot(ForcedAct { act, force }) => {
            let action = if *force { "reset" } else { "reboot" };
            commands::actions::run(action, act, client, output).await
        }
        Request::Operations(args) => commands::operations::run(args, client, output).await,
        Request::Alerts(args) => commands::alerts::run(args, client, output).await,
        Request::Events(args) => commands::events::run(args, client, output).await,
        Request::Status => commands::status::run(client, output).await,
    }
}
