//! Starts the programs with which vmwatch is compared.

use std::{
    env,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use testkit::{PATIENCE, Process, Spec, Stack, free_port};
use vmwatch_bus::NATS_URL;

use crate::{
    echo,
    load::{Connection, Load},
    sides::Side,
};

/// Interval at which a starting program is polled until it accepts connections.
const POLL: Duration = Duration::from_millis(10);

/// A running program of a comparison. Its processes are killed when the value is dropped.
pub(crate) struct Peer {
    name: &'static str,
    at: SocketAddr,
    processes: Vec<(&'static str, Process)>,
}

impl Peer {
    /// Returns the program as one side of a comparison. The processes in `others`, such as a shared server, count
    /// toward the program's CPU time.
    pub(crate) fn side(&self, requests: &Arc<Vec<Vec<u8>>>, others: &[(&'static str, u32)]) -> Side {
        let own = self.processes.iter().map(|(name, process)| (*name, process.id()));
        Side {
            name: self.name,
            load: Load::success(self.at, requests),
            processes: own.chain(others.iter().copied()).collect(),
        }
    }

    /// The address on which the program listens.
    pub(crate) const fn at(&self) -> SocketAddr {
        self.at
    }

    async fn ready(self) -> anyhow::Result<Self> {
        let end = Instant::now() + PATIENCE;
        while let Err(error) = Connection::open(self.at).await {
            ensure!(Instant::now() < end, "{} does not listen: {error:#}", self.name);
            for (name, process) in &self.processes {
                if let Some(status) = process.ended() {
                    bail!("{name} ended ({status}):\n{}", process.log());
                }
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(self)
    }
}

/// Options of the one-process service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OneProcess {
    pub(crate) name: &'static str,
    /// The time for which answers are cached.
    pub(crate) kept: Duration,
    /// True if the service answers from memory instead of the database.
    pub(crate) echo: bool,
    /// True if the service checks sessions.
    pub(crate) checked: bool,
    /// Number of sessions in the service's table, without the session of the benchmark.
    pub(crate) sessions: u32,
}

/// Starts the one-process service in Rust.
pub(crate) async fn one_process(
    stack: &Stack,
    folder: &Path,
    session: &str,
    how: OneProcess,
) -> anyhow::Result<Peer> {
    let at = address();
    let program = env::current_exe()?.with_file_name("baseline-one-process");
    let mut env = vec![
        ("BASELINE_LISTEN", at.to_string()),
        ("BASELINE_MONGODB", stack.database.uri().to_owned()),
        ("BASELINE_SESSION", session.to_owned()),
        ("BASELINE_SESSIONS", how.sessions.to_string()),
        ("BASELINE_KEPT_MS", how.kept.as_millis().to_string()),
    ];
    if how.echo {
        env.push(("BASELINE_ECHO", echo::ROWS.to_owned()));
    }
    if !how.checked {
        env.push(("BASELINE_UNCHECKED", "1".to_owned()));
    }
    let process = start(folder, "one-process", program, &[], env);
    let processes = vec![("one-process", process)];
    let peer = Peer {
        name: how.name,
        at,
        processes,
    };
    peer.ready().await
}

/// Starts the Python service: gunicorn with two workers.
pub(crate) async fn wsgi(stack: &Stack, folder: &Path, session: &str) -> anyhow::Result<Peer> {
    let at = address();
    let (bind, app) = (at.to_string(), baselines("wsgi").display().to_string());
    let args = [
        "--workers",
        "2",
        "--bind",
        &bind,
        "--chdir",
        &app,
        "--log-level",
        "warning",
        "app:application",
    ];
    let env = vec![
        ("BASELINE_MONGODB", stack.database.uri().to_owned()),
        ("BASELINE_SESSION", session.to_owned()),
        ("PYTHONDONTWRITEBYTECODE", "1".to_owned()),
    ];
    let process = start(
        folder,
        "gunicorn",
        installed_by_dev("VMWATCH_BENCH_GUNICORN")?,
        &args,
        env,
    );
    let processes = vec![("gunicorn", process)];
    let peer = Peer {
        name: "Python WSGI",
        at,
        processes,
    };
    peer.ready().await
}

/// Starts the Node gateway and the Node service. They are connected by the same NATS server as vmwatch.
pub(crate) async fn node(stack: &Stack, folder: &Path, session: &str) -> anyhow::Result<Peer> {
    let at = address();
    let modules = installed_by_dev("VMWATCH_BENCH_NODE_MODULES")?
        .display()
        .to_string();
    let run = |name: &'static str| -> anyhow::Result<_> {
        let script = baselines("node").join(format!("{name}.js")).display().to_string();
        let env = vec![
            ("NODE_PATH", modules.clone()),
            ("NODE_ENV", "production".to_owned()),
            ("BASELINE_PORT", at.port().to_string()),
            ("BASELINE_NATS", stack.nats.url().to_owned()),
            ("BASELINE_MONGODB", stack.database.uri().to_owned()),
            ("BASELINE_SESSION", session.to_owned()),
        ];
        let log = format!("node-{name}");
        Ok(start(
            folder,
            &log,
            installed_by_dev("VMWATCH_BENCH_NODE")?,
            &[&script],
            env,
        ))
    };
    let processes = vec![("service", run("service")?), ("gateway", run("gateway")?)];
    let peer = Peer {
        name: "Node",
        at,
        processes,
    };
    peer.ready().await
}

/// Starts the service that answers from memory, connected to the same NATS server as the gateway.
pub(crate) fn echo(stack: &Stack, folder: &Path) -> anyhow::Result<Process> {
    let env = vec![(NATS_URL.name, stack.nats.url().to_owned())];
    Ok(start(folder, "echo", env::current_exe()?, &["echo-service"], env))
}

fn start(folder: &Path, name: &str, program: PathBuf, args: &[&str], env: Vec<(&str, String)>) -> Process {
    Process::start(Spec {
        name: name.to_owned(),
        program,
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        env: env
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        log: folder.join(format!("{name}.log")),
    })
}

fn address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}

/// Returns the path of a third-party program that `./dev bench` has installed.
fn installed_by_dev(name: &str) -> anyhow::Result<PathBuf> {
    let path = env::var_os(name).filter(|path| !path.is_empty());
    path.map(PathBuf::from).with_context(|| {
        format!("{name} is not set; run `./dev bench`, which installs the program and sets it")
    })
}

fn baselines(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("baselines").join(name)
}
