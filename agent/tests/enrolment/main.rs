//! Tests the enrolment with the real program: against an HTTP server that answers like a gateway, and with the key in a real
//! NATS server.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic fails the test"
)]

mod agent;
mod command;
mod gateway;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tempfile::TempDir;
use testkit::{PATIENCE, Process, Spec, eventually};
use vmwatch_api::enrollment::JoinToken;

const AGENT: &str = env!("CARGO_BIN_EXE_vmwatch-agent");

/// A VM: a folder with the state folder of its agent.
struct Vm {
    folder: TempDir,
}

impl Vm {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("state")).unwrap();
        Self { folder }
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn identity(&self) -> PathBuf {
        self.state().join("identity")
    }

    /// Writes a join token to a file.
    fn token(&self, number: u8) -> String {
        let path = self.folder.path().join(format!("token-{number}"));
        fs::write(&path, format!("{}\n", token(number))).unwrap();
        path.display().to_string()
    }

    /// Returns how to run the program with these arguments.
    fn spec(&self, name: &str, args: &[&str]) -> Spec {
        let env = [
            ("VMWATCH_INSTANCE_ID", "vm-1".to_owned()),
            (
                "VMWATCH_AGENT_IDENTITY_DIR",
                self.identity().display().to_string(),
            ),
        ];
        Spec {
            name: name.to_owned(),
            program: AGENT.into(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: env.map(|(name, value)| (name.to_owned(), value)).into(),
            log: self.folder.path().join(format!("{name}.log")),
        }
    }

    /// Runs `enroll` to its end, and returns its exit code and output.
    async fn enrols(&self, url: &str, further: &[&str]) -> (i32, String) {
        let token = self.token(1);
        let args = [&["enroll", "--gateway", url, "--token-file", &token], further].concat();
        ended(Process::start(self.spec("enroll", &args))).await
    }

    fn record(&self) -> Value {
        let text = fs::read_to_string(self.identity().join("enrollment.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }
}

fn token(number: u8) -> JoinToken {
    JoinToken::from_random([number; 8], [number; 32])
}

/// Waits until a command has ended, and returns its exit code and its output.
async fn ended(process: Process) -> (i32, String) {
    let status = eventually("the command ends", PATIENCE, async || {
        process.ended().ok_or_else(|| process.log())
    })
    .await;
    let log = process.log();
    assert!(
        !log.contains(&token(1).to_string()),
        "the join token is secret: {log}"
    );
    // Each command has a log of its own.
    fs::write(log_of(&process), "").unwrap();
    (status.code().unwrap(), log)
}

fn log_of(process: &Process) -> PathBuf {
    let folder = process.setting("VMWATCH_AGENT_IDENTITY_DIR");
    let folder = Path::new(&folder).parent().unwrap().parent().unwrap();
    folder.join(format!("{}.log", process.name()))
}
