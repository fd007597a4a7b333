//! The command line `vmwatch`, run by a user with a home folder of its own.

use std::{
    path::{Path, PathBuf},
    process::Output,
};

use tempfile::TempDir;

use crate::{Gateway, Process, Spec, Terminal, process::run, tools};

/// A user of the command line.
#[derive(Debug)]
pub struct Cli {
    home: TempDir,
    env: Vec<(String, String)>,
}

impl Default for Cli {
    fn default() -> Self {
        Self::new()
    }
}

impl Cli {
    /// A user without a session. Times are in UTC.
    pub fn new() -> Self {
        let home = tempfile::Builder::new().prefix("vmwatch-cli-").tempdir().unwrap();
        let cli = Self {
            home,
            env: Vec::new(),
        };
        let home = cli.home().display().to_string();
        cli.set("HOME", &home)
            .set("TZ", "UTC")
            .set("TERM", "xterm-256color")
    }

    /// A user with a session token for a gateway, in the environment.
    pub fn with_token(gateway: &Gateway, token: &str) -> Self {
        Self::new()
            .set("VMWATCH_URL", &gateway.url(""))
            .set("VMWATCH_TOKEN", token)
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The home folder of the user.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Runs a command, which may fail.
    pub fn run(&self, args: &[&str]) -> Output {
        self.run_with_input(args, "")
    }

    /// Like [`Cli::run`], with a text on the standard input.
    pub fn run_with_input(&self, args: &[&str], input: &str) -> Output {
        run(&self.spec(args), input)
    }

    /// Runs a command that must succeed, and returns what it prints.
    pub fn output(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "vmwatch {args:?}: {} {errors}",
            output.status
        );
        String::from_utf8(output.stdout).expect("the output is UTF-8")
    }

    /// Runs a command that must fail, and returns its exit code and error.
    pub fn failure(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "vmwatch {args:?} succeeded");
        (output.status.code().expect("the command was not killed"), errors)
    }

    /// Starts a command and does not wait for its end.
    pub fn start(&self, args: &[&str]) -> Process {
        Process::start(self.spec(args))
    }

    /// Starts a command in a terminal of this size.
    pub fn terminal(&self, args: &[&str], columns: u16, rows: u16) -> Terminal {
        Terminal::start(&self.spec(args), columns, rows)
    }

    /// The path of the program, for scripts.
    pub fn program(&self) -> PathBuf {
        tools::own("vmwatch")
    }

    /// The environment of the commands.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.env
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    fn spec(&self, args: &[&str]) -> Spec {
        Spec {
            name: "vmwatch".to_owned(),
            program: self.program(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: self.env.clone(),
            log: self.home().join("vmwatch.log"),
        }
    }
}
