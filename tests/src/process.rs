//! A process of the stack, and all that a test may do to it.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::Write,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::Mutex,
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::eventually;

/// The lines of each log that a failing test shows.
const TAIL: usize = 25;

/// What to run.
#[derive(Debug, Clone)]
pub struct Spec {
    /// For people: `gateway-0`.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment; nothing else is passed on but PATH, HOME and TMPDIR.
    pub env: Vec<(String, String)>,
    /// Where its output goes; appended to at a restart.
    pub log: PathBuf,
}

/// A running process. It ends with this value, and with the test's process should that be killed.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    /// Settings of its next start.
    changed: Mutex<Vec<(String, String)>>,
    child: Mutex<Child>,
}

impl Process {
    /// Starts it.
    pub fn start(spec: Spec) -> Self {
        let child = Mutex::new(spawn(&spec));
        let changed = Mutex::default();
        Self { spec, changed, child }
    }

    /// Changes a setting from the next start on.
    pub fn set(&self, name: &str, value: &str) {
        let mut changed = self.changed.lock().unwrap();
        changed.push((name.to_owned(), value.to_owned()));
    }

    /// A setting that it was started with; empty where it has none.
    pub fn setting(&self, name: &str) -> String {
        let given = self.spec.env.iter().rev().find(|(given, _)| given == name);
        given.map(|(_, value)| value.clone()).unwrap_or_default()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.spec.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether it has ended.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().unwrap()
    }

    /// SIGKILL, as a crash or a lost machine; waits for the end.
    pub fn kill9(&self) {
        let mut child = self.child.lock().unwrap();
        // Fails only where it has ended already.
        let _ = child.kill();
        child.wait().unwrap();
    }

    /// SIGSTOP: it holds its connections and answers nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT: ends a pause.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGHUP: NATS reads its configuration and certificates again.
    pub fn reload(&self) {
        self.signal(Signal::HUP);
    }

    /// SIGTERM, as every platform asks a program to end; waits for the end.
    pub async fn terminate(&self, deadline: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        let what = format!("{} ends after SIGTERM", self.name());
        eventually(&what, deadline, async || {
            self.ended().ok_or_else(|| "it still runs".to_owned())
        })
        .await
    }

    /// Starts it again, with the same ports and, but for [`Process::set`], settings, after it has ended.
    pub fn start_again(&self) {
        assert!(self.ended().is_some(), "{} still runs", self.name());
        let mut spec = self.spec.clone();
        spec.env.extend(self.changed.lock().unwrap().iter().cloned());
        *self.child.lock().unwrap() = spawn(&spec);
    }

    fn signal(&self, signal: Signal) {
        assert!(self.ended().is_none(), "{} has ended", self.name());
        let pid = Pid::from_raw(self.id().cast_signed()).expect("an id is not zero");
        kill_process(pid, signal).expect("our own child takes signals");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let already_failing = thread::panicking();
        if let Ok(child) = self.child.get_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let log = self.log();
        if already_failing {
            let lines: Vec<_> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(TAIL)..];
            eprintln!("---- the end of {}'s log:\n{}", self.name(), tail.join("\n"));
        } else if let Some(line) = log.lines().find(|line| line.contains("panicked at")) {
            panic!("{} panicked during this test: {line}\n{log}", self.name());
        }
    }
}

/// Runs a command to its end, with this on its standard input.
pub(crate) fn run(spec: &Spec, input: &str) -> Output {
    let mut child = command(spec)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {NO_SETPRIV}: {error}", spec.name));
    // Who does not read it may have ended already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn spawn(spec: &Spec) -> Child {
    let mut log = OpenOptions::new();
    let log: File = log.create(true).append(true).open(&spec.log).unwrap();
    command(spec)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {NO_SETPRIV}: {error}", spec.name))
}

const NO_SETPRIV: &str = "setpriv (of util-linux) cannot be run";

fn command(spec: &Spec) -> Command {
    let kept = ["PATH", "HOME", "TMPDIR"]
        .into_iter()
        .filter_map(|name| Some((name, env::var_os(name)?)));
    // The kernel ends the child with its parent, also where that is killed and drops nothing. The parent is the
    // thread that spawns, which is the test's own: do not spawn from a pool's.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(&spec.program)
        .args(&spec.args)
        .env_clear()
        .envs(kept)
        .envs(spec.env.iter().map(|(name, value)| (name, value)));
    command
}
