//! A mail server, as a receiver of alerts.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{PATIENCE, Process, Spec, eventually, ports::free_port, tools};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/mail/server.py");

/// A mail server that records the messages that it accepts.
#[derive(Debug)]
pub struct MailServer {
    _process: Process,
    /// The port of its listener, on loopback.
    pub port: u16,
    file: PathBuf,
}

impl MailServer {
    /// Starts a mail server that has its files in the folder, and waits until it is ready. The mode is `starttls`,
    /// `tls` or `none`; further arguments are those of tests/mail/server.py.
    pub async fn start(folder: &Path, mode: &str, arguments: &[&str]) -> Self {
        let (port, file) = (free_port(), folder.join(format!("{mode}.jsonl")));
        let mut args = vec![
            SCRIPT.to_owned(),
            port.to_string(),
            file.display().to_string(),
            "--mode".to_owned(),
            mode.to_owned(),
        ];
        args.extend(arguments.iter().map(|&argument| argument.to_owned()));
        let process = Process::start(Spec {
            name: format!("mail-{mode}"),
            program: tools::mail_python(),
            args,
            env: vec![("PYTHONDONTWRITEBYTECODE".to_owned(), "1".to_owned())],
            log: folder.join(format!("mail-{mode}.log")),
        });
        let log = || process.log();
        eventually("the mail server is ready", PATIENCE, async || {
            if log().contains("ready") {
                Ok(())
            } else {
                Err(log())
            }
        })
        .await;
        Self {
            _process: process,
            port,
            file,
        }
    }

    /// The IPv4 address of its listener.
    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// Waits until this many messages have been accepted, and returns all of them, oldest first.
    pub async fn messages(&self, count: usize) -> Vec<Value> {
        eventually("mails arrive", 2 * PATIENCE, async || {
            let text = fs::read_to_string(&self.file).unwrap_or_default();
            let lines = text.lines();
            let all: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
            let arrived = all.len();
            (arrived >= count)
                .then_some(all)
                .ok_or_else(|| format!("{arrived} of {count}"))
        })
        .await
    }
}
