//! Answers NATS's auth callout (ADR-26 of NATS): the NATS servers ask auth-svc whether a client may log in that is no user
//! of their configuration. An agent that has enrolled logs in with its nkey, and gets the permissions of its VM's agent.
//!
//! auth-svc has a second connection for this, to the system account. If no replica answers, connected agents stay
//! connected, and the logins of others time out; agents try again.

mod answer;
mod checks;
mod connections;
mod jwt;
mod refusal;
mod request;
mod servers;

use std::{
    borrow::Cow,
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_nats::{Client, Message, connection::State};
use futures::StreamExt;
use metrics::{counter, histogram};
use nkeys::KeyPair;
use tokio::{
    sync::Semaphore,
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::InstanceId;
use vmwatch_bus::{BusError, BusSettings, connect_with_nkey, follow::Follower};

use self::{
    connections::Connections,
    refusal::{Refusal, Refusals},
    request::Login,
};
pub(crate) use checks::{CheckQueue, Checks};

use crate::agents::AgentTable;

const SUBJECT: &str = "$SYS.REQ.USER.AUTH";
const QUEUE: &str = "vmwatch-auth";
/// The client name of the second connection, which is also in the permissions in deploy/nats/accounts.conf.
const NAME: &str = "vmwatch-callout";
/// Interval between attempts while the copy is stale.
const STALE_PAUSE: Duration = Duration::from_millis(100);
/// NATS gives up after `authorization.timeout`, 10 s.
const DEADLINE: Duration = Duration::from_secs(8);
/// Maximum number of waiting logins; a request has about 1 KB. All agents log in at once after a server was restarted.
const MAX_WAITING: usize = 8192;
/// Maximum number of logins whose signatures are computed at once, so that logins of users are not delayed.
const MAX_SIGNING: usize = 4;
/// Maximum time at shutdown in which the last requests arrive, and again in which they are answered.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// The keys of the auth callout.
pub(crate) struct CalloutSettings {
    /// Seed of auth-svc's user in the system account.
    pub(crate) nkey_seed: String,
    /// The account key that signs the answers.
    pub(crate) issuer: KeyPair,
}

/// `Debug` is implemented by hand to omit the seeds.
impl std::fmt::Debug for CalloutSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CalloutSettings").finish_non_exhaustive()
    }
}

/// The connection to the system account.
#[derive(Clone)]
pub(crate) struct Callout {
    client: Client,
    /// The copy of the KV bucket of agents, which clones share; empty until [`Callout::start`].
    agents: Arc<OnceLock<Follower<AgentTable>>>,
}

/// `Debug` is implemented by hand to omit the copy.
impl std::fmt::Debug for Callout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Callout").finish_non_exhaustive()
    }
}

impl Callout {
    /// Connects to the system account. While the server is unreachable, the client retries without limit.
    pub(crate) async fn connect(bus: &BusSettings, settings: &CalloutSettings) -> Result<Self, BusError> {
        let client = connect_with_nkey(NAME, bus, settings.nkey_seed.clone()).await?;
        let agents = Arc::default();
        Ok(Self { client, agents })
    }

    /// Fails if there is no connection to the system account, or if the copy of the KV bucket of agents is stale. The error
    /// states this as the reason why the program is not ready.
    pub(crate) fn check(&self) -> Result<(), Cow<'static, str>> {
        if self.client.connection_state() != State::Connected {
            return Err("no connection to the system account of NATS, so agents cannot log in".into());
        }
        if self.agents.get().is_some_and(|agents| !agents.is_current()) {
            return Err("the copy of the KV bucket of agents is stale, so agents cannot log in".into());
        }
        Ok(())
    }

    /// Answers logins until shutdown. The returned task ends after the last answer.
    pub(crate) async fn start(
        self,
        agents: Follower<AgentTable>,
        (checks, queue): (Checks, CheckQueue),
        issuer: KeyPair,
        shutdown: CancellationToken,
    ) -> Result<JoinHandle<()>, BusError> {
        let agents = self.agents.get_or_init(|| agents).clone();
        let connections = Arc::new(Connections::new(self.client.clone(), agents.clone(), checks));
        tokio::spawn(Arc::clone(&connections).run(queue, shutdown.clone()));
        let requests = self.client.queue_subscribe(SUBJECT, QUEUE.to_owned()).await?;
        let responder = Responder {
            client: self.client,
            issuer,
            agents,
            connections,
            refusals: Refusals::default(),
            signing: Semaphore::new(MAX_SIGNING),
        };
        Ok(tokio::spawn(Arc::new(responder).run(requests, shutdown)))
    }
}

struct Responder {
    client: Client,
    issuer: KeyPair,
    agents: Follower<AgentTable>,
    connections: Arc<Connections>,
    refusals: Refusals,
    signing: Semaphore,
}

impl Responder {
    async fn run(self: Arc<Self>, mut requests: async_nats::Subscriber, shutdown: CancellationToken) {
        let waiting = Arc::new(Semaphore::new(MAX_WAITING));
        let mut draining = false;
        // Without a connection, the subscription would never end.
        let end = async {
            shutdown.cancelled().await;
            sleep(LAST_ANSWERS).await;
        };
        tokio::pin!(end);
        loop {
            let request = tokio::select! {
                () = shutdown.cancelled(), if !draining => {
                    // Requests that the server has already sent are still answered.
                    draining = true;
                    if let Err(error) = requests.drain().await {
                        debug!(%error, "the subscription of the auth callout could not be drained");
                    }
                    continue;
                }
                () = &mut end => break,
                request = requests.next() => request,
            };
            let Some(request) = request else {
                break;
            };
            let Ok(permit) = Arc::clone(&waiting).try_acquire_owned() else {
                self.refusals.note(&Refusal::Overloaded, "", "");
                continue;
            };
            let this = Arc::clone(&self);
            tokio::spawn(async move {
                this.answer(request, Instant::now()).await;
                drop(permit);
            });
        }
        // All permits are free again when the last request was answered.
        let all = u32::try_from(MAX_WAITING).unwrap_or(u32::MAX);
        let answered = async {
            let _ = waiting.acquire_many(all).await;
            self.client.flush().await
        };
        if timeout(LAST_ANSWERS, answered).await.is_err() {
            warn!("not all logins of agents were answered before the shutdown");
        }
    }

    async fn answer(&self, request: Message, arrived: Instant) {
        let Some(reply) = request.reply else {
            return;
        };
        let deadline = arrived + DEADLINE;
        let answer = match self.decide(&request.payload, deadline).await {
            Ok(answer) => {
                counter!("vmwatch_callout_granted_total").increment(1);
                answer
            }
            Err((refusal, login)) => {
                let (key, host) = login
                    .as_ref()
                    .map_or(("", ""), |login| (login.key.as_str(), &login.host));
                self.refusals.note(&refusal, key, host);
                // NATS takes an empty answer for a refusal.
                String::new()
            }
        };
        let sent = timeout_at(deadline, self.client.publish(reply, answer.into())).await;
        if let Err(error) = sent
            .map_err(Into::into)
            .and_then(|sent| sent.map_err(async_nats::Error::from))
        {
            warn!(%error, "the answer to the login of an agent could not be sent");
        }
        histogram!("vmwatch_callout_seconds").record(arrived.elapsed().as_secs_f64());
    }

    /// Returns the answer that lets the client in, or why it is refused, with what is known of the client.
    async fn decide(&self, request: &[u8], deadline: Instant) -> Result<String, (Refusal, Option<Login>)> {
        let decoded = timeout_at(deadline, self.signing.acquire()).await;
        let permit = decoded.map_err(|_| (Refusal::Late, None))?;
        let login = request::decode(request).map_err(|refusal| (refusal, None))?;
        drop(permit);
        match self.grant(&login, deadline).await {
            Ok(answer) => Ok(answer),
            Err(refusal) => Err((refusal, Some(login))),
        }
    }

    async fn grant(&self, login: &Login, deadline: Instant) -> Result<String, Refusal> {
        let vm = self.find(login, deadline).await?;
        let permit = timeout_at(deadline, self.signing.acquire()).await;
        let permit = permit.map_err(|_| Refusal::Late)?;
        let answer = answer::grant(login, &vm, &self.issuer)?;
        drop(permit);
        // The key may have been revoked while this login waited.
        if self.agents.read().valid_vm(&login.key) != Some(&vm) {
            return Err(Refusal::Unknown);
        }
        self.connections.note_login(&login.key);
        Ok(answer)
    }

    /// The VM of the client. A key that is not in the table is looked up once in the KV bucket, because an agent connects
    /// as soon as it has enrolled.
    async fn find(&self, login: &Login, deadline: Instant) -> Result<InstanceId, Refusal> {
        loop {
            let found = self
                .agents
                .find(|table| table.valid_vm(&login.key).cloned())
                .await;
            match found {
                Ok(found) => return found.ok_or(Refusal::Unknown),
                Err(stale) if Instant::now() + STALE_PAUSE > deadline => return Err(Refusal::Stale(stale)),
                Err(_) => sleep(STALE_PAUSE).await,
            }
        }
    }
}
