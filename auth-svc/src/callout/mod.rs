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
mod responder;
mod servers;

use std::{
    borrow::Cow,
    sync::{Arc, OnceLock},
};

use async_nats::{Client, connection::State};
use nkeys::KeyPair;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vmwatch_bus::{BusError, BusSettings, connect_with_nkey, follow::Follower};

pub(crate) use self::checks::{CheckQueue, Checks};
use self::{connections::Connections, responder::Responder};
use crate::agents::AgentTable;

/// The client name of the second connection, which is also in the permissions in deploy/nats/accounts.conf.
const NAME: &str = "vmwatch-callout";

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
        let responder = Arc::new(Responder::new(self.client, issuer, agents, connections));
        let requests = responder.subscribe().await?;
        Ok(tokio::spawn(responder.run(requests, shutdown)))
    }
}
