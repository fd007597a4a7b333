//! Answers the logins of agents, as a member of the queue group of all replicas.
//!
//! A replica whose copy of the agents stays stale cannot answer, and leaves the queue group, so that NATS asks the other
//! replicas. It returns once its copy is current.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_nats::{Client, Message, SubscribeError, Subscriber, connection::State};
use futures::StreamExt;
use metrics::{counter, gauge, histogram};
use nkeys::KeyPair;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use vmwatch_api::{InstanceId, enrollment::AgentKey};
use vmwatch_bus::follow::Follower;

use super::{
    answer,
    connections::Connections,
    refusal::{Refusal, Refusals},
    request::{self, Login},
};
use crate::agents::AgentTable;

const SUBJECT: &str = "$SYS.REQ.USER.AUTH";
const QUEUE: &str = "vmwatch-auth";
/// Interval between attempts while the copy is stale.
const STALE_PAUSE: Duration = Duration::from_millis(100);
/// Time after which a replica with a stale copy leaves the queue group. After a reconnection to NATS the copy is read again;
/// meanwhile logins wait.
const STALE_LIMIT: Duration = Duration::from_secs(5);
/// NATS gives up after `authorization.timeout`, 10 s.
const DEADLINE: Duration = Duration::from_secs(8);
/// Maximum number of waiting logins; a request has about 1 KB. All agents log in at once after a server was restarted.
const MAX_WAITING: usize = 8192;
/// Maximum number of logins whose signatures are computed at once, so that logins of users are not delayed.
const MAX_SIGNING: usize = 4;
/// Maximum time in which the last requests arrive when a subscription ends, and again at shutdown in which they are answered.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// When a request arrived.
#[derive(Debug, Clone, Copy)]
struct Arrival {
    deadline: Instant,
    /// Number of the connection over which the request arrived.
    connection: u64,
}

pub(super) struct Responder {
    client: Client,
    issuer: KeyPair,
    agents: Follower<AgentTable>,
    connections: Arc<Connections>,
    refusals: Refusals,
    waiting: Arc<Semaphore>,
    signing: Semaphore,
}

impl Responder {
    pub(super) fn new(
        client: Client,
        issuer: KeyPair,
        agents: Follower<AgentTable>,
        connections: Arc<Connections>,
    ) -> Self {
        Self {
            client,
            issuer,
            agents,
            connections,
            refusals: Refusals::default(),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            signing: Semaphore::new(MAX_SIGNING),
        }
    }

    /// Joins the queue group.
    pub(super) async fn subscribe(&self) -> Result<Subscriber, SubscribeError> {
        let requests = self.client.queue_subscribe(SUBJECT, QUEUE.to_owned()).await?;
        gauge!("vmwatch_callout_answering").set(1.0);
        Ok(requests)
    }

    /// Answers logins until shutdown.
    pub(super) async fn run(self: Arc<Self>, mut requests: Subscriber, shutdown: CancellationToken) {
        loop {
            self.serve(requests, &shutdown).await;
            match shutdown.run_until_cancelled(self.rejoin()).await {
                Some(rejoined) => requests = rejoined,
                None => break,
            }
        }
        // All permits are free again when the last request was answered.
        let all = u32::try_from(MAX_WAITING).unwrap_or(u32::MAX);
        let answered = async {
            let _ = self.waiting.acquire_many(all).await;
            self.client.flush().await
        };
        if timeout(LAST_ANSWERS, answered).await.is_err() {
            warn!("not all logins of agents were answered before the shutdown");
        }
    }

    /// Answers the requests of a subscription until shutdown, or until the copy of the agents stays stale. Requests that the
    /// server has already sent are then still answered.
    async fn serve(self: &Arc<Self>, mut requests: Subscriber, shutdown: &CancellationToken) {
        let mut leave = pin!(shutdown.run_until_cancelled(self.stale()));
        // Without a connection, the subscription would never end.
        let mut end = None;
        loop {
            let ended = async move {
                match end {
                    Some(end) => sleep_until(end).await,
                    None => std::future::pending().await,
                }
            };
            let request = tokio::select! {
                _ = &mut leave, if end.is_none() => {
                    end = Some(Instant::now() + LAST_ANSWERS);
                    gauge!("vmwatch_callout_answering").set(0.0);
                    if let Err(error) = requests.drain().await {
                        debug!(%error, "the subscription of the auth callout could not be drained");
                    }
                    continue;
                }
                () = ended => return,
                request = requests.next() => request,
            };
            let Some(request) = request else {
                return;
            };
            let Ok(permit) = Arc::clone(&self.waiting).try_acquire_owned() else {
                self.refusals.note(&Refusal::Overloaded, "", "");
                continue;
            };
            let this = Arc::clone(self);
            tokio::spawn(async move {
                this.answer(request).await;
                drop(permit);
            });
        }
    }

    /// Waits until the copy of the agents has been stale for [`STALE_LIMIT`]. Without a connection no logins arrive, so that
    /// time does not count.
    async fn stale(&self) {
        let mut since = Instant::now();
        while since.elapsed() < STALE_LIMIT {
            sleep(STALE_PAUSE).await;
            if self.agents.is_current() || self.client.connection_state() != State::Connected {
                since = Instant::now();
            }
        }
        warn!(
            "the copy of the KV bucket of agents is stale; the logins of agents are left to other replicas"
        );
    }

    /// Joins the queue group again as soon as the copy of the agents is current.
    async fn rejoin(&self) -> Subscriber {
        loop {
            if self.agents.is_current() {
                match self.subscribe().await {
                    Ok(requests) => {
                        info!("answering the logins of agents again");
                        return requests;
                    }
                    // This happens only if the client has ended.
                    Err(error) => debug!(%error, "the subscription of the auth callout failed; retrying"),
                }
            }
            sleep(STALE_PAUSE).await;
        }
    }

    /// The number of connections so far.
    fn connection(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    async fn answer(&self, request: Message) {
        let Some(reply) = request.reply else {
            return;
        };
        let began = Instant::now();
        let arrival = Arrival {
            deadline: began + DEADLINE,
            connection: self.connection(),
        };
        let answer = match self.decide(&request.payload, arrival).await {
            Ok(answer) => {
                counter!("vmwatch_callout_granted_total").increment(1);
                answer
            }
            Err((refusal, login)) => {
                let (key, host) = login
                    .as_ref()
                    .map_or(("", ""), |login| (login.key.as_str(), &login.host));
                self.refusals.note(&refusal, key, host);
                if matches!(refusal, Refusal::Disconnected) {
                    return;
                }
                // NATS takes an empty answer for a refusal.
                String::new()
            }
        };
        let sent = timeout_at(arrival.deadline, self.client.publish(reply, answer.into())).await;
        if let Err(error) = sent
            .map_err(Into::into)
            .and_then(|sent| sent.map_err(async_nats::Error::from))
        {
            warn!(%error, "the answer to the login of an agent could not be sent");
        }
        histogram!("vmwatch_callout_seconds").record(began.elapsed().as_secs_f64());
    }

    /// Returns the answer that lets the client in, or why it is refused, with what is known of the client.
    async fn decide(&self, request: &[u8], arrival: Arrival) -> Result<String, (Refusal, Option<Login>)> {
        let permit = self.permit(arrival).await.map_err(|refusal| (refusal, None))?;
        let login = request::decode(request).map_err(|refusal| (refusal, None))?;
        let granted = self.grant(&login, permit, arrival).await;
        granted.map_err(|refusal| (refusal, Some(login)))
    }

    /// The right to compute signatures. NATS accepts an answer only over the connection over which the request arrived, so
    /// requests of a lost connection are dropped.
    async fn permit(&self, arrival: Arrival) -> Result<SemaphorePermit<'_>, Refusal> {
        let permit = timeout_at(arrival.deadline, self.signing.acquire()).await;
        // The semaphore is never closed.
        let permit = permit.ok().and_then(Result::ok).ok_or(Refusal::Late)?;
        let is_connected = self.client.connection_state() == State::Connected;
        if is_connected && self.connection() == arrival.connection {
            Ok(permit)
        } else {
            Err(Refusal::Disconnected)
        }
    }

    async fn grant(
        &self,
        login: &Login,
        permit: SemaphorePermit<'_>,
        arrival: Arrival,
    ) -> Result<String, Refusal> {
        // A key in the table is answered with the same permit. If each login waited for a second one, all logins after a
        // restart of NATS would wait until the last of them was decoded, and exceed the deadline together.
        let (permit, (key, vm)) = if let Some(found) = self.known(login) {
            (permit, found)
        } else {
            drop(permit);
            let found = self.find(login, arrival.deadline).await?;
            (self.permit(arrival).await?, found)
        };
        let answer = answer::grant(login, &vm, &self.issuer)?;
        drop(permit);
        // The key may have been revoked while this login waited.
        if self.agents.read().valid_vm(&key) != Some(&vm) {
            return Err(Refusal::Unknown);
        }
        self.connections.note_login(&key);
        Ok(answer)
    }

    /// The key in the table and the VM of the client, if the table is current and has the key.
    fn known(&self, login: &Login) -> Option<(AgentKey, InstanceId)> {
        if !self.agents.is_current() {
            return None;
        }
        entry(&self.agents.read(), login)
    }

    /// The same for a key that is not in the table, or while the table is stale. A key is looked up once in the KV bucket,
    /// because an agent connects as soon as it has enrolled.
    async fn find(&self, login: &Login, deadline: Instant) -> Result<(AgentKey, InstanceId), Refusal> {
        loop {
            match self.agents.find(|table| entry(table, login)).await {
                Ok(found) => return found.ok_or(Refusal::Unknown),
                Err(stale) if Instant::now() + STALE_PAUSE > deadline => return Err(Refusal::Stale(stale)),
                Err(_) => sleep(STALE_PAUSE).await,
            }
        }
    }
}

/// The key of a client, which shares the text of the table's key, and its VM.
fn entry(table: &AgentTable, login: &Login) -> Option<(AgentKey, InstanceId)> {
    let (key, vm) = table.valid_entry(&login.key)?;
    Some((key.clone(), vm.clone()))
}
