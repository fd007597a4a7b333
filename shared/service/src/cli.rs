//! The command line that all programs have in common: `--help` lists the settings, invalid settings or arguments end
//! the program with exit code [`EX_USAGE`](crate::config::EX_USAGE), and the command `health` reports whether the
//! program that runs on this host is ready.

use std::{fmt::Write as _, os::unix::fs::MetadataExt as _};

use clap::{Command, CommandFactory, FromArgMatches};

use crate::{
    config::{EX_USAGE, Environment, Invalid, Setting},
    health,
};

const HEALTH: &str = "health";

/// Parses the command-line arguments. `--help` lists the settings after the arguments. The command `health` is handled
/// here and exits the process.
pub fn parse<Args: CommandFactory + FromArgMatches>(settings: &[Setting]) -> Args {
    let command = Args::command().after_help(settings_help(settings)).subcommand(
        Command::new(HEALTH)
            .about("Check whether the program that runs on this host is ready; exit code 0 if it is"),
    );
    let parsed = command.try_get_matches().and_then(|mut matches| {
        if matches.subcommand_matches(HEALTH).is_some() {
            std::process::exit(check_health(Args::command().get_name(), settings));
        }
        Args::from_arg_matches_mut(&mut matches)
    });
    parsed.unwrap_or_else(|error| {
        let code = if error.use_stderr() { EX_USAGE } else { 0 };
        // Printing fails only if the terminal was closed; the message then cannot be shown anywhere else.
        let _ = error.print();
        std::process::exit(code)
    })
}

fn check_health(program: &str, settings: &[Setting]) -> i32 {
    let name = health::setting("").name;
    let default = settings
        .iter()
        .find(|setting| setting.name == name)
        .map_or("", |setting| setting.default);
    let address = settings_or_exit(program, |env| health::read(env, default));
    match health::probe(address) {
        Ok(()) => 0,
        Err(reason) => {
            eprintln!("{reason}");
            1
        }
    }
}

/// The origin of a command-line command for the audit: the user id and the host name.
pub fn invoker() -> String {
    let uid = std::fs::metadata("/proc/self").map_or_else(|_| "?".to_owned(), |own| own.uid().to_string());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("command line of uid {uid} on {}", host.trim())
}

/// Reads the settings from the environment. If any are invalid, prints all problems and exits the process.
pub fn settings_or_exit<S>(program: &str, read: impl FnOnce(&Environment) -> Result<S, Invalid>) -> S {
    let env = Environment::from_process();
    let settings = read(&env);
    let problems = env.problems();
    match settings {
        Ok(settings) if problems.is_empty() => settings,
        _ => {
            eprintln!("{program}: cannot start because of invalid settings:");
            for problem in problems {
                eprintln!("  {problem}");
            }
            eprintln!("`{program} --help` lists all settings.");
            std::process::exit(EX_USAGE)
        }
    }
}

/// Prints the error of a failed command, without the errors that caused it, and exits with code 1.
pub fn fail(program: &str, error: &dyn std::error::Error) -> ! {
    eprintln!("{program}: {error}");
    std::process::exit(1)
}

/// Formats the settings as an aligned table for `--help`.
pub fn settings_help(settings: &[Setting]) -> String {
    let width = settings
        .iter()
        .map(|setting| setting.name.len())
        .max()
        .unwrap_or(0);
    let mut help = String::from("Settings (environment variables):\n");
    for setting in settings {
        let default = match setting.default {
            "" => String::new(),
            default => format!("; default {default}"),
        };
        let _ = writeln!(
            help,
            "  {:width$}  {} [{}{default}]",
            setting.name, setting.help, setting.value
        );
    }
    help
}
