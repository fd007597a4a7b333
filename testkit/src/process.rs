//! A process that a test starts and controls.

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

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::eventually;

/// Number of log lines to print of each process when a test fails.
const TAIL: usize = 25;

/// Describes how to run a process.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The process's name in messages, such as `gateway-0`.
    pub name: String,
    /// The program's path, or its name if it is to be found in PATH.
    pub program: PathBuf,
    /// The command-line arguments.
    pub args: Vec<String>,
    /// Environment variables; only PATH, HOME and TMPDIR are inherited from the test.
    pub env: Vec<(String, String)>,
    /// The file for the process's output. A restarted process appends to it.
    pub log: PathBuf,
}

/// A running process. It is killed when this value is dropped or when the test's process is killed.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    /// Settings that were changed for the next start.
    changed: Mutex<Vec<(String, String)>>,
    child: Mutex<Child>,
}

impl Process {
    /// Starts a process as described.
    pub fn start(spec: Spec) -> Self {
        let child = Mutex::new(spawn(&spec));
        let changed = Mutex::default();
        Self { spec, changed, child }
    }

    /// Changes a setting, which takes effect at the next start.
    pub fn set(&self, name: &str, value: &str) {
        let mut changed = self.changed.lock().unwrap();
        changed.push((name.to_owned(), value.to_owned()));
    }

    /// The value of a setting at the first start; empty if the setting was not set.
    pub fn setting(&self, name: &str) -> String {
        let given = self.spec.env.iter().rev().find(|(given, _)| given == name);
        given.map(|(_, value)| value.clone()).unwrap_or_default()
    }

    /// The process's name in messages.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    /// The process's output so far.
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.spec.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The exit status, if the process has ended.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().unwrap()
    }

    /// Sends SIGKILL, which is like a crash, and waits until the process has ended.
    pub fn kill9(&self) {
        let mut child = self.child.lock().unwrap();
        // Killing fails only if the process has already ended.
        let _ = child.kill();
        child.wait().unwrap();
    }

    /// Sends SIGSTOP and waits until all threads of the process have stopped: the process keeps its connections open but
    /// does not answer.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
        // The kernel reports a process as stopped after its last thread has stopped. NOWAIT leaves the status of a process
        // that has ended to `ended`.
        let report = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(self.pid()), report).expect("the process is a child of the test");
        let stopped = status.is_some_and(|status| status.stopped());
        assert!(stopped, "{} has ended instead of stopping", self.name());
    }

    /// Sends SIGCONT to continue a process that was frozen by [`Process::pause`].
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Sends SIGHUP, on which NATS reloads its configuration and certificates.
    pub fn reload(&self) {
        self.signal(Signal::HUP);
    }

    /// Sends SIGTERM and waits until the process has ended.
    pub async fn terminate(&self, deadline: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        let what = format!("{} ends after SIGTERM", self.name());
        eventually(&what, deadline, async || {
            self.ended()
                .ok_or_else(|| "the process is still running".to_owned())
        })
        .await
    }

    /// Restarts the ended process with the same settings, except those changed by [`Process::set`].
    pub fn start_again(&self) {
        assert!(self.ended().is_some(), "{} is still running", self.name());
        let mut spec = self.spec.clone();
        spec.env.extend(self.changed.lock().unwrap().iter().cloned());
        *self.child.lock().unwrap() = spawn(&spec);
    }

    fn signal(&self, signal: Signal) {
        assert!(self.ended().is_none(), "{} has ended", self.name());
        kill_process(self.pid(), signal).expect("sending a signal to a child process succeeds");
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.id().cast_signed()).expect("pids are not zero")
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
            eprintln!("---- last lines of {}'s log:\n{}", self.name(), tail.join("\n"));
        } else if let Some(line) = log.lines().find(|line| line.contains("panicked at")) {
            panic!("{} panicked during this test: {line}\n{log}", self.name());
        }
    }
}

/// Runs a command with `input` on its standard input and waits until it has ended.
pub(crate) fn run(spec: &Spec, input: &str) -> Output {
    let mut child = command(spec)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {NO_SETPRIV}: {error}", spec.name));
    // Writing fails if the command ends without reading its input, which is allowed.
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

const NO_SETPRIV: &str = "cannot run setpriv (from util-linux)";

/// The command of a process that the kernel kills when the test ends.
pub(crate) fn command(spec: &Spec) -> Command {
    let kept = ["PATH", "HOME", "TMPDIR"]
        .into_iter()
        .filter_map(|name| Some((name, env::var_os(name)?)));
    // The kernel kills the child process when its parent thread ends, even if the test is killed and drops nothing. The
    // parent is the thread that starts the process; it must therefore be the test's own thread and not a thread of a
    // pool.
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
