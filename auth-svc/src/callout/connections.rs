//! Ends connections of agents: those of a key that is no longer valid, and the oldest of a key that has more than two.
//!
//! Every replica checks and ends connections by itself, because each replica may have let an agent in shortly before it
//! learned of a revocation. Ending a connection twice is harmless.
//!
//! - If a key becomes invalid in the table, its connections on all servers are ended at once, and once more after a second:
//!   a login that was answered before may have become a connection in between. A check that fails is repeated every second
//!   until two have succeeded.
//! - If this replica has let in a key more than twice since it last saw its connections, it counts them a second later.
//! - All connections are checked whenever the KV bucket was reread, when the connection to the system account is
//!   reestablished, and every five minutes. Logins of a key that other
//!   replicas have answered are only counted then; until then a key can have two connections for each replica.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use async_nats::{Client, Error, Statistics};
use metrics::counter;
use tokio::{
    sync::Semaphore,
    time::{Interval, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::enrollment::AgentKey;
use vmwatch_bus::follow::Follower;

use super::{
    checks::{CheckQueue, Checks},
    servers::{self, Answers, Connection, PAGE},
};
use crate::agents::AgentTable;

/// Maximum number of live connections of a key. An agent that reconnects may have two for a short time.
const MAX_LIVE: usize = 2;
/// Interval between checks of all connections.
const SWEEP_INTERVAL: Duration = Duration::from_mins(5);
/// Time after which connections are checked once more.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Number of successful checks after which a pass ends.
const SUCCESSES: usize = 2;
/// Interval at which this replica looks whether the connection to the system account was reestablished.
const RECONNECTION_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of checks at the same time, and of keys in one check.
const MAX_PASSES: usize = 16;
const MAX_KEYS: usize = 64;
/// Maximum number of pages of connections in one check, which is twice the maximum number of connections of a server.
const MAX_PAGES: usize = 128;

pub(super) struct Connections {
    client: Client,
    agents: Follower<AgentTable>,
    checks: Checks,
    /// By key: the number of connections that this replica last saw, plus its logins that this replica has let in since.
    /// Only keys that were valid at the last check are in it.
    logins: Mutex<HashMap<AgentKey, usize>>,
}

/// The live connections of valid keys.
type Live = HashMap<AgentKey, Vec<Connection>>;

impl Connections {
    pub(super) fn new(client: Client, agents: Follower<AgentTable>, checks: Checks) -> Self {
        Self {
            client,
            agents,
            checks,
            logins: Mutex::default(),
        }
    }

    /// Notes that this replica has let in an agent.
    pub(super) fn note_login(&self, key: &AgentKey) {
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        let known = logins.entry(key.clone()).or_default();
        *known += 1;
        if *known > MAX_LIVE {
            self.checks.request(key.clone());
        }
    }

    /// Checks connections until shutdown.
    pub(super) async fn run(self: Arc<Self>, mut queue: CheckQueue, shutdown: CancellationToken) {
        let mut reloads = self.agents.reloads();
        let mut sweeps = interval(SWEEP_INTERVAL);
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reconnections = Reconnections::of(&self.client);
        let passes = Arc::new(Semaphore::new(MAX_PASSES));
        let checking = async {
            loop {
                let mut received = Vec::new();
                tokio::select! {
                    _ = queue.keys.recv_many(&mut received, MAX_KEYS) => {}
                    Ok(()) = reloads.changed() => {}
                    () = queue.too_many.notified() => {}
                    _ = sweeps.tick() => {}
                    () = reconnections.next() => {}
                }
                let Ok(permit) = Arc::clone(&passes).acquire_owned().await else {
                    return;
                };
                let (this, shutdown) = (Arc::clone(&self), shutdown.clone());
                tokio::spawn(async move {
                    let checking = until_checked(|| this.check(&received));
                    shutdown.run_until_cancelled(checking).await;
                    drop(permit);
                });
            }
        };
        shutdown.run_until_cancelled(checking).await;
    }

    /// Checks the connections of these keys, or all connections if there are no keys.
    async fn check(&self, keys: &[AgentKey]) -> Result<(), Error> {
        let live = if keys.is_empty() {
            self.check_all().await?
        } else {
            self.check_keys(keys).await?
        };
        self.note_live(keys, &live);
        for (key, connections) in live {
            for connection in surplus(connections) {
                self.end(&key, &connection, "surplus").await?;
            }
        }
        Ok(())
    }

    async fn check_keys(&self, keys: &[AgentKey]) -> Result<Live, Error> {
        let mut live = Live::new();
        let mut answers = Answers::new(&self.client).await?;
        for key in keys {
            answers.request(Some(key), 0).await?;
        }
        while let Some(server) = answers.next().await? {
            self.end_invalid(server.agents, &mut live).await?;
        }
        Ok(live)
    }

    async fn check_all(&self) -> Result<Live, Error> {
        let mut live = Live::new();
        if !self.agents.is_filled() {
            return Ok(live);
        }
        for page in 0..MAX_PAGES {
            let mut answers = Answers::new(&self.client).await?;
            answers.request(None, page * PAGE).await?;
            let mut more = false;
            while let Some(server) = answers.next().await? {
                more |= server.full;
                // Another replica may have let in an agent whose record has not arrived here yet; then this catches up with the
                // KV bucket. It fails if the table is stale and does not tell which keys are valid.
                let are_valid =
                    |table: &AgentTable| server.agents.iter().all(|(key, _)| table.valid_vm(key).is_some());
                self.agents.find(|table| are_valid(table).then_some(())).await?;
                self.end_invalid(server.agents, &mut live).await?;
            }
            if !more {
                return Ok(live);
            }
        }
        warn!(
            pages = MAX_PAGES,
            "there are too many connections of agents to check all of them"
        );
        Ok(live)
    }

    /// Ends the connections whose keys are not valid, and adds the others to `live`.
    async fn end_invalid(
        &self,
        connections: Vec<(AgentKey, Connection)>,
        live: &mut Live,
    ) -> Result<(), Error> {
        for (key, connection) in connections {
            let is_valid = self.agents.read().valid_vm(&key).is_some();
            if is_valid {
                live.entry(key).or_default().push(connection);
            } else {
                self.end(&key, &connection, "revoked").await?;
            }
        }
        Ok(())
    }

    /// Remembers how many connections the checked keys have, and forgets keys that are not valid.
    fn note_live(&self, keys: &[AgentKey], live: &Live) {
        let table = self.agents.read();
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.is_empty() {
            logins.retain(|key, _| table.valid_vm(key).is_some());
        }
        for key in keys.iter().filter(|key| table.valid_vm(key).is_none()) {
            logins.remove(key);
        }
        for (key, connections) in live {
            logins.insert(key.clone(), connections.len().min(MAX_LIVE));
        }
    }

    async fn end(&self, key: &AgentKey, connection: &Connection, reason: &'static str) -> Result<(), Error> {
        let Connection { server, cid, .. } = connection;
        servers::end(&self.client, connection).await?;
        counter!("vmwatch_callout_connections_ended_total", "reason" => reason).increment(1);
        info!(%key, server, cid, reason, "ended a connection of an agent");
        Ok(())
    }
}

/// Repeats the check after a pause until [`SUCCESSES`] have succeeded. The caller must end this at shutdown.
async fn until_checked<C: Future<Output = Result<(), Error>>>(check: impl Fn() -> C) {
    let (mut successes, mut failed) = (0, false);
    loop {
        match check().await {
            Ok(()) => successes += 1,
            Err(error) => {
                counter!("vmwatch_callout_check_failures_total").increment(1);
                // The first failure is enough in the log: the check is repeated every second during an outage.
                if !failed {
                    warn!(%error, "the connections of agents could not be checked; retrying");
                }
                failed = true;
            }
        }
        if successes == SUCCESSES {
            return;
        }
        sleep(AGAIN_AFTER).await;
    }
}

/// Detects that the client was connected again.
struct Reconnections {
    statistics: Arc<Statistics>,
    seen: u64,
    looks: Interval,
}

impl Reconnections {
    fn of(client: &Client) -> Self {
        let statistics = client.statistics();
        let mut looks = interval(RECONNECTION_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            seen: statistics.connects.load(Ordering::Relaxed),
            statistics,
            looks,
        }
    }

    /// Waits for the next connection.
    async fn next(&mut self) {
        loop {
            self.looks.tick().await;
            let connects = self.statistics.connects.load(Ordering::Relaxed);
            if connects != self.seen {
                self.seen = connects;
                return;
            }
        }
    }
}

/// The oldest connections beyond [`MAX_LIVE`].
fn surplus(mut connections: Vec<Connection>) -> Vec<Connection> {
    connections.sort();
    // With several pages, a connection can be listed twice.
    connections.dedup();
    connections.truncate(connections.len().saturating_sub(MAX_LIVE));
    connections
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn failed_checks_are_repeated_until_two_have_succeeded() {
        let outcomes = Mutex::new(vec![true, false, true, false, false]);
        until_checked(|| {
            let outcome = outcomes.lock().unwrap().pop().unwrap();
            ready(
                outcome
                    .then_some(())
                    .ok_or_else(|| "no NATS server answered".into()),
            )
        })
        .await;
        assert!(outcomes.lock().unwrap().is_empty());
    }

    #[test]
    fn the_oldest_connections_are_surplus() {
        let connection = |second: u32| Connection {
            start: format!("2026-11-27T15:02:{second}.918179621Z"),
            server: format!("server-{second}"),
            cid: u64::from(second),
        };
        assert_eq!(surplus(vec![connection(20), connection(10)]), []);
        let four = [40, 10, 30, 20].map(connection).to_vec();
        assert_eq!(surplus(four), [connection(10), connection(20)]);
        assert_eq!(surplus(vec![connection(20), connection(10), connection(20)]), []);
    }
}
