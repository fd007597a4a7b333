//! Connects to NATS: when the client connects again, and what the events of a connection mean.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_nats::{Client, ClientError, ConnectErrorKind, ConnectOptions, Event, ServerError};
use metrics::counter;
use tokio::sync::watch;
use tracing::{info, warn};
use vmwatch_service::jitter::jittered;

use crate::{BusError, BusSettings, inbox_prefix, settings::Login};

/// Time limit for connecting and logging in.
const LOGIN_LIMIT: Duration = Duration::from_secs(5);
/// Time limit for a login with a key that NATS passes to auth-svc. It exceeds `authorization.timeout` in nats.conf, 10 s, so
/// that the client learns that the login was refused.
pub const KEY_LOGIN_LIMIT: Duration = Duration::from_secs(12);
/// Longest delay after a refused login. Each login may cost the service that checks logins a millisecond.
const REFUSED_MAX: Duration = Duration::from_secs(10);
/// The NATS server's reason for closing a connection on which a message was too large.
const OVERSIZED: &str = "maximum payload violation";

/// Connects to the same NATS servers with another nkey and under another client name, for an account without methods and
/// JetStream. Like [`Bus::connect`](crate::Bus::connect), retries without limit while no server is reachable, but with short
/// delays: a login of an agent that reaches a restarted server before auth-svc fails only after `authorization.timeout`.
pub async fn connect_with_nkey(name: &str, settings: &BusSettings, seed: String) -> Result<Client, BusError> {
    let settings = BusSettings {
        login: Login::NkeySeed(seed),
        ..settings.clone()
    };
    let delay = |refusals: &Refusals, _| refusals.delay(0);
    connect(name, &settings, &Arc::default(), delay, |_| {}).await
}

/// Connects to NATS. While no server is reachable, the client retries without limit. `delay` returns the time before an
/// attempt with this number.
pub(crate) async fn connect(
    name: &str,
    settings: &BusSettings,
    refusals: &Arc<Refusals>,
    delay: impl Fn(&Refusals, usize) -> Duration + Send + Sync + 'static,
    on_event: impl Fn(&Event) + Send + Sync + 'static,
) -> Result<Client, BusError> {
    let (delays, noted) = (Arc::clone(refusals), Arc::clone(refusals));
    let mut options = ConnectOptions::new()
        .name(name)
        // Each NATS user has its own inbox prefix. With a common prefix, every program would need permission to
        // subscribe to `_INBOX.>` and could read the replies that other programs receive.
        .custom_inbox_prefix(inbox_prefix(settings.identity(name)))
        .ping_interval(settings.ping_interval)
        .connection_timeout(login_limit(settings))
        .retry_on_initial_connect()
        .reconnect_delay_callback(move |attempts| delay(&delays, attempts))
        .event_callback(move |event| {
            log(&event);
            noted.note(&event);
            on_event(&event);
            std::future::ready(())
        });
    options = match settings.login.clone() {
        Login::None => options,
        Login::Password { user, password } => options.user_and_password(user, password),
        Login::CredentialsFile(file) => options
            .credentials_file(file)
            .await
            .map_err(BusError::Credentials)?,
        Login::NkeySeed(seed) => options.nkey(seed),
    };
    if settings.uses_websocket() {
        // The servers report their WebSocket addresses without a scheme, and the client would take them for others.
        options = options.ignore_discovered_servers();
    }
    if let Some(ca_file) = &settings.ca_file {
        options = options.add_root_certificates(ca_file.clone()).require_tls(true);
    }
    if let Some((certificate, key)) = settings.certificate.clone() {
        options = options.add_client_certificate(certificate, key).require_tls(true);
    }
    Ok(options.connect(settings.urls.as_slice()).await?)
}

/// What the NATS server refused: logins in a row, and messages that were too large.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    logins: AtomicU32,
    oversized: watch::Sender<()>,
}

impl Refusals {
    pub(crate) fn is_login_refused(&self) -> bool {
        self.logins.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn oversized_messages(&self) -> watch::Receiver<()> {
        self.oversized.subscribe()
    }

    pub(crate) fn note(&self, event: &Event) {
        match event {
            Event::ClientError(ClientError::Other(text))
                if *text == ConnectErrorKind::AuthorizationViolation.to_string() =>
            {
                self.logins.fetch_add(1, Ordering::Relaxed);
            }
            // An unreachable server has refused nothing.
            Event::Connected | Event::ClientError(_) => self.logins.store(0, Ordering::Relaxed),
            Event::ServerError(ServerError::Other(text)) if text.eq_ignore_ascii_case(OVERSIZED) => {
                self.oversized.send_replace(());
            }
            _ => {}
        }
    }

    pub(crate) fn delay(&self, attempts: usize) -> Duration {
        reconnect_delay(attempts, self.logins.load(Ordering::Relaxed))
    }
}

/// Delay before a connection attempt: `attempts` is its number since the connection was lost, `refused` how many logins in a
/// row the server has refused. While the server is unreachable it grows to one second, so that a restarted server is found
/// within two seconds; while the server refuses the login it doubles up to ten seconds. It is random because all agents lose
/// their server at the same time. The first attempt waits as well, so that the subscriptions of the lost connection end before
/// the client would renew them (see [`drain`](crate::drain)).
pub fn reconnect_delay(attempts: usize, refused: u32) -> Duration {
    let unreachable = match attempts {
        0..=5 => Duration::from_millis(100),
        6..=10 => Duration::from_millis(500),
        _ => Duration::from_secs(1),
    };
    let longest = match refused {
        0 => unreachable,
        // The exponent is limited to avoid an arithmetic overflow.
        refused => REFUSED_MAX.min(Duration::from_millis(100) * 2_u32.pow(refused.min(10))),
    };
    jittered(longest, 0.5)
}

const fn login_limit(settings: &BusSettings) -> Duration {
    match settings.login {
        Login::NkeySeed(_) => KEY_LOGIN_LIMIT,
        Login::None | Login::Password { .. } | Login::CredentialsFile(_) => LOGIN_LIMIT,
    }
}

/// Logs an event of the connection.
fn log(event: &Event) {
    match event {
        Event::Connected => info!("connected to NATS"),
        Event::SlowConsumer(subscription) => {
            counter!("vmwatch_bus_slow_consumer_total").increment(1);
            warn!(
                subscription,
                "messages were dropped because this program reads a subscription too slowly"
            );
        }
        other => warn!(event = %other, "the state of the NATS connection changed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_grows_while_logins_are_refused_and_shrinks_after_connection() {
        let refusals = Refusals::default();
        let refused = Event::ClientError(ClientError::Other("authorization violation".to_owned()));
        let mut longest = Duration::ZERO;
        for _ in 0..100 {
            refusals.note(&refused);
            assert!(refusals.is_login_refused());
            let delay = refusals.delay(100);
            assert!(delay <= REFUSED_MAX);
            longest = longest.max(delay);
        }
        assert!(longest >= REFUSED_MAX / 2);
        refusals.note(&Event::ClientError(ClientError::Other("IO error".to_owned())));
        assert!(!refusals.is_login_refused() && refusals.delay(100) <= Duration::from_secs(1));
        refusals.note(&refused);
        refusals.note(&Event::Connected);
        assert!(!refusals.is_login_refused() && refusals.delay(1) <= Duration::from_millis(100));
    }
}
