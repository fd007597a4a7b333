//! Simulated agents. They log in to NATS and connect again like real ones, and do nothing else.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use nkeys::KeyPair;
use serde::Deserialize;
use serde_json::json;
use testkit::eventually;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, interval, sleep, timeout},
};
use vmwatch_bus::{KEY_LOGIN_LIMIT, reconnect_delay};

use super::super::client::signature;

/// Size of the buffer of each connection, which is enough for a line of the NATS protocol.
const BUFFER: usize = 2 << 10;
/// Number of agents that log in at once for the first time.
const FIRST_LOGINS: usize = 64;

/// Why an agent is not connected.
#[derive(Debug)]
enum Failure {
    /// NATS has refused the login.
    Refused,
    Lost,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Lost
    }
}

/// The first line that a NATS server sends.
#[derive(Deserialize)]
struct Info {
    nonce: String,
}

/// A connection that has logged in.
struct Connection {
    stream: BufReader<TcpStream>,
    line: String,
}

impl Connection {
    async fn log_in(address: &str, key: &KeyPair) -> Result<Self, Failure> {
        let mut connection = Self {
            stream: BufReader::with_capacity(BUFFER, TcpStream::connect(address).await?),
            line: String::new(),
        };
        let info = connection
            .read()
            .await?
            .strip_prefix("INFO ")
            .ok_or(Failure::Lost)?;
        let Info { nonce } = serde_json::from_str(info).map_err(|_| Failure::Lost)?;
        let options = json!({
            "nkey": key.public_key(), "sig": signature(key, &nonce), "verbose": false, "pedantic": false, "headers": true,
            "no_responders": true, "protocol": 1, "lang": "raw", "version": "0",
        });
        let inbox = format!("_INBOX_{}", key.public_key());
        connection
            .send(&format!("CONNECT {options}\r\nSUB {inbox}.> 1\r\nPING\r\n"))
            .await?;
        loop {
            let line = connection.read().await?;
            if line.contains("Authorization Violation") {
                return Err(Failure::Refused);
            }
            if line == "PONG\r\n" {
                return Ok(connection);
            }
        }
    }

    async fn send(&mut self, text: &str) -> io::Result<()> {
        self.stream.get_mut().write_all(text.as_bytes()).await
    }

    async fn read(&mut self) -> Result<&str, Failure> {
        self.line.clear();
        match self.stream.read_line(&mut self.line).await? {
            0 => Err(Failure::Lost),
            _ => Ok(&self.line),
        }
    }

    /// Answers the server until the connection is lost.
    async fn lost(mut self) {
        while let Ok(line) = self.read().await {
            if line == "PING\r\n" && self.send("PONG\r\n").await.is_err() {
                return;
            }
        }
    }
}

/// All agents.
pub(super) struct Fleet {
    shared: Arc<Shared>,
    keys: Vec<Arc<KeyPair>>,
    /// The tasks of the agents, which end when this is dropped.
    _tasks: JoinSet<()>,
}

struct Shared {
    address: String,
    connected: AtomicUsize,
    /// How long each login has taken that was not the first of its agent.
    logins: Mutex<Vec<Duration>>,
    refused: AtomicUsize,
}

impl Fleet {
    /// Connects an agent for each key.
    pub(super) async fn connect(url: &str, keys: Vec<Arc<KeyPair>>) -> Self {
        let shared = Arc::new(Shared {
            address: url.strip_prefix("nats://").unwrap().to_owned(),
            connected: AtomicUsize::new(0),
            logins: Mutex::default(),
            refused: AtomicUsize::new(0),
        });
        let first = keys.iter().map(async |key| {
            let connection = Connection::log_in(&shared.address, key).await.unwrap();
            (Arc::clone(key), connection)
        });
        let mut first = futures::stream::iter(first).buffer_unordered(FIRST_LOGINS);
        let mut tasks = JoinSet::new();
        while let Some((key, connection)) = first.next().await {
            tasks.spawn(Arc::clone(&shared).stay(key, connection));
        }
        drop(first);
        Self {
            shared,
            keys,
            _tasks: tasks,
        }
    }

    /// Waits until this many agents are connected.
    pub(super) async fn connected(&self, wanted: usize, patience: Duration) {
        eventually("the agents are connected as expected", patience, async || {
            let connected = self.shared.connected.load(Ordering::Relaxed);
            (connected == wanted)
                .then_some(())
                .ok_or(format!("{connected} of {wanted} are connected"))
        })
        .await;
    }

    /// How long each repeated login has taken so far, and how many were refused.
    pub(super) fn logins(&self) -> (Vec<Duration>, usize) {
        let refused = self.shared.refused.load(Ordering::Relaxed);
        (self.shared.logins.lock().unwrap().clone(), refused)
    }

    /// Opens a second connection of this many agents at a steady rate. Returns how long each login took, from the time at
    /// which it was due.
    pub(super) async fn log_in_at_rate(&self, agents: usize, per_second: u32) -> Vec<Duration> {
        let mut due = interval(Duration::from_secs(1) / per_second);
        let mut logins = JoinSet::new();
        for key in self.keys.iter().take(agents) {
            let due_at = due.tick().await;
            let (shared, key) = (Arc::clone(&self.shared), Arc::clone(key));
            logins.spawn(async move {
                let connection = Connection::log_in(&shared.address, &key).await.unwrap();
                (due_at.elapsed(), connection)
            });
        }
        // The connections are kept until all have logged in.
        let connections = logins.join_all().await;
        connections.into_iter().map(|(took, _)| took).collect()
    }
}

impl Shared {
    /// Keeps an agent connected.
    async fn stay(self: Arc<Self>, key: Arc<KeyPair>, mut connection: Connection) {
        loop {
            self.connected.fetch_add(1, Ordering::Relaxed);
            connection.lost().await;
            self.connected.fetch_sub(1, Ordering::Relaxed);
            connection = self.connect_again(&key).await;
        }
    }

    async fn connect_again(&self, key: &KeyPair) -> Connection {
        let (mut attempts, mut refused) = (0, 0);
        loop {
            attempts += 1;
            sleep(reconnect_delay(attempts, refused)).await;
            let began = Instant::now();
            match timeout(KEY_LOGIN_LIMIT, Connection::log_in(&self.address, key)).await {
                Ok(Ok(connection)) => {
                    self.logins.lock().unwrap().push(began.elapsed());
                    return connection;
                }
                Ok(Err(Failure::Refused)) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    refused += 1;
                }
                Ok(Err(Failure::Lost)) | Err(_) => refused = 0,
            }
        }
    }
}
