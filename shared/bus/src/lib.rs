//! The bus: each program has one connection to NATS, over which it calls methods ([`call`]) and serves them
//! ([`serve`]).
//!
//! NATS provides back-pressure, queue groups and reconnection. For every method, this crate adds: deadline, request id,
//! trace context and principal in headers; limits of concurrent requests; faults instead of panics; and a shutdown that
//! loses no request.

#![expect(
    missing_docs,
    reason = "the names of some settings, fields and errors are sufficient documentation"
)]

pub mod audit;
mod call;
pub mod clock;
mod codec;
mod connection;
mod context;
pub mod discovery;
mod drain;
pub mod follow;
pub mod jetstream;
pub mod limits;
pub mod provision;
mod refusal;
mod replies;
pub mod serve;
mod settings;
pub mod users;
pub mod vms;

use std::{
    borrow::Cow,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_nats::{
    Client, Event, HeaderMap, PublishError, Subject, SubscribeError, Subscriber, connection::State,
};
use bytes::Bytes;
use tokio::sync::watch;
use tracing::{debug, warn};

pub use self::settings::{
    BusSettings, EnrolledKey, NATS_CA_FILE, NATS_CERTIFICATE_FILE, NATS_CREDENTIALS_FILE, NATS_KEY_FILE,
    NATS_NKEY_SEED_FILE, NATS_PASSWORD_FILE, NATS_PING_INTERVAL, NATS_URL, NATS_USER, SETTINGS,
    ping_interval,
};
pub use connection::{KEY_LOGIN_LIMIT, connect_with_nkey, reconnect_delay};
pub use context::{Context, HeaderExtractor, headers, link_to_publisher, random_id, trace_headers};

use self::{clock::ClockDifference, connection::Refusals, replies::Replies};

/// Connecting to NATS or using the connection failed.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    #[error("{} cannot be read", NATS_CREDENTIALS_FILE.name)]
    Credentials(#[source] std::io::Error),
    /// NATS is misconfigured or refused the login. An unreachable server does not cause this error, because the client
    /// retries.
    #[error("no connection to NATS")]
    Connect(#[from] async_nats::ConnectError),
    /// No NATS server answered before the time limit of a command-line command; services retry without a limit.
    #[error("no NATS server answers; check {}", NATS_URL.name)]
    Unreachable,
    #[error("NATS refused a subscription")]
    Subscribe(#[from] async_nats::SubscribeError),
}

/// JetStream normally answers within milliseconds; after this time it counts as unreachable.
const SETTLED_LIMIT: Duration = Duration::from_secs(2);
/// Wait before a retry when NATS does not confirm subscriptions; a reconnection takes about this long.
const SETTLED_PAUSE: Duration = Duration::from_millis(100);

/// Interval between checks whether the connection to NATS has been established.
const CONNECTED_PAUSE: Duration = Duration::from_millis(20);

/// A program's connection to NATS.
#[derive(Debug, Clone)]
pub struct Bus {
    client: Client,
    replies: Arc<Replies>,
    jetstream: async_nats::jetstream::Context,
    reconnections: watch::Receiver<()>,
    outages: watch::Receiver<()>,
    refusals: Arc<Refusals>,
    clock: Arc<ClockDifference>,
}

impl Bus {
    /// Connects to NATS under the client name `name`. While the server is unreachable, the client retries without
    /// limit; [`Bus::is_connected`] reports the state.
    pub async fn connect(name: &str, settings: &BusSettings) -> Result<Self, BusError> {
        let (connected, reconnections) = watch::channel(());
        let (disconnected, outages) = watch::channel(());
        let refusals = Arc::new(Refusals::default());
        let connecting =
            connection::connect(
                name,
                settings,
                &refusals,
                Refusals::delay,
                move |event| match event {
                    Event::Connected => connected.send_replace(()),
                    Event::Disconnected => disconnected.send_replace(()),
                    _ => {}
                },
            );
        let client = connecting.await?;
        let replies = Arc::new(Replies::subscribe(&client).await?);
        let jetstream = async_nats::jetstream::new(client.clone());
        Ok(Self {
            client,
            replies,
            jetstream,
            reconnections,
            outages,
            refusals,
            clock: Arc::default(),
        })
    }

    /// Like [`Bus::connect`], but fails if no server has answered within the time limit; used by command-line commands.
    pub async fn connect_within(
        name: &str,
        settings: &BusSettings,
        limit: Duration,
    ) -> Result<Self, BusError> {
        let bus = Self::connect(name, settings).await?;
        let connected = async {
            while !bus.is_connected() {
                tokio::time::sleep(CONNECTED_PAUSE).await;
            }
        };
        let answered = tokio::time::timeout(limit, connected).await;
        answered.map_err(|_| BusError::Unreachable)?;
        Ok(bus)
    }

    /// Whether the NATS server is reachable, according to the client's pings.
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Whether NATS refused the last login. The client keeps trying, because NATS also refuses logins while the service
    /// that checks them is unreachable.
    pub fn is_login_refused(&self) -> bool {
        self.refusals.is_login_refused()
    }

    /// A receiver that is notified each time that the NATS server closes the connection because of a message that was too
    /// large, after this call.
    pub fn oversized_messages(&self) -> watch::Receiver<()> {
        self.refusals.oversized_messages()
    }

    /// Fails if NATS is unreachable, or if the clock of this machine is so wrong that requests fail. The error states this as
    /// the reason why the program is not ready.
    pub fn check(&self) -> Result<(), Cow<'static, str>> {
        if self.is_connected() {
            self.clock.check()
        } else {
            Err("no connection to NATS".into())
        }
    }

    /// The number of connections made so far; it is 1 for the first connection.
    pub fn connections(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// A receiver that is notified of each reconnection. [`Bus::connections`] may change before the notification
    /// arrives.
    pub fn reconnections(&self) -> watch::Receiver<()> {
        let mut reconnections = self.reconnections.clone();
        reconnections.mark_unchanged();
        reconnections
    }

    /// A receiver that is notified of each loss of the connection after this call, before the client connects again
    /// (see [`Refusals::delay`]).
    pub(crate) fn outages(&self) -> watch::Receiver<()> {
        let mut outages = self.outages.clone();
        outages.mark_unchanged();
        outages
    }

    /// The client's own JetStream API, for tests and benchmarks. Services use [`jetstream`].
    pub const fn jetstream_for_tests(&self) -> &async_nats::jetstream::Context {
        &self.jetstream
    }

    pub(crate) const fn client(&self) -> &Client {
        &self.client
    }

    /// The underlying client, for tests and benchmarks.
    pub const fn client_for_tests(&self) -> &Client {
        &self.client
    }

    /// Publishes a message that is not acknowledged. The call waits while the client's queue is full; the caller must
    /// set a time limit.
    pub async fn publish(
        &self,
        subject: impl Into<Subject>,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<(), PublishError> {
        self.client
            .publish_with_headers(subject.into(), headers, body)
            .await
    }

    /// Subscribes as a member of a queue group to messages that may be lost. The client subscribes again after each
    /// reconnection.
    pub async fn subscribe_queue(
        &self,
        subject: &'static str,
        queue: &str,
    ) -> Result<Subscriber, SubscribeError> {
        self.client.queue_subscribe(subject, queue.to_owned()).await
    }

    /// Waits without limit until the server has processed everything sent earlier on this connection, including
    /// subscriptions. The server handles the messages of a connection in order, so its answer to a request proves
    /// this. A flush proves only that the client has sent the messages.
    pub async fn settled(&self) {
        loop {
            match self.account_info(SETTLED_LIMIT).await {
                Ok(()) => return,
                Err(error) => {
                    debug!(%error, "NATS did not confirm that it has processed the subscriptions; retrying");
                }
            }
            tokio::time::sleep(SETTLED_PAUSE).await;
        }
    }

    /// Waits until all published messages have been sent, for at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        match tokio::time::timeout(limit, self.client.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "flush failed; the last messages may be lost"),
            Err(_) => warn!(?limit, "flush timed out; the last messages may be lost"),
        }
    }
}

/// The inbox prefix of a program or NATS user; the permissions in deploy/nats contain the same prefixes.
pub fn inbox_prefix(identity: &str) -> String {
    // Characters that are not allowed in a subject token are replaced, so any name becomes a single token.
    let token = |letter: char| match letter {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' => letter,
        _ => '_',
    };
    format!("_INBOX_{}", identity.chars().map(token).collect::<String>())
}

#[cfg(test)]
mod tests {
    use vmwatch_service::config::Environment;

    use super::*;

    #[test]
    fn inbox_prefix_contains_the_user_as_a_single_subject_token() {
        let password = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(password.path(), "secret").unwrap();
        let file = password.path().display().to_string();
        let inbox = |user: &str| {
            let env = Environment::from_variables([(NATS_USER.name, user), (NATS_PASSWORD_FILE.name, &file)]);
            inbox_prefix(BusSettings::read(&env).unwrap().identity("vmwatch-metrics"))
        };
        assert_eq!(inbox("vmwatch-operator"), "_INBOX_vmwatch-operator");
        assert_eq!(inbox("*.> x"), "_INBOX_____x");
        let anonymous = BusSettings::read(&Environment::from_variables([])).unwrap();
        assert_eq!(
            inbox_prefix(anonymous.identity("vmwatch-metrics")),
            "_INBOX_vmwatch-metrics"
        );
    }
}
