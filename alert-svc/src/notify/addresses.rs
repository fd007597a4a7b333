//! Decides which network addresses the service connects to for notifications.
//!
//! Administrators choose receivers, and the service may reach more than they do. So the addresses of this machine, of vmwatch's
//! own servers, and of networks that the deployment denies are refused. A name is resolved once: all of its addresses are
//! checked, and the connection goes to one of these.

mod listeners;
mod ranges;

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use http::Uri;
use ipnet::IpNet;
use tokio::time::timeout;
use vmwatch_api::alerts::channels::{ChannelTarget, ReceiverUrl, SmtpServer};

use self::listeners::Listeners;
use super::settings::AddressSettings;

/// Time limit for the resolution of a name.
const RESOLVE_LIMIT: Duration = Duration::from_secs(5);
/// Maximum number of addresses of a name that are used.
const MAX_ADDRESSES: usize = 16;

/// Why the service does not connect to a receiver. The texts are shown to administrators.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AddressError {
    #[error("the receiver's URL is invalid")]
    Url,
    #[error("the name {host} could not be resolved: {reason}")]
    Unresolved { host: String, reason: String },
    #[error(
        "{address} is refused: {kind} addresses are never receivers; see VMWATCH_ALERT_ALLOW for single exceptions"
    )]
    Special { address: SocketAddr, kind: &'static str },
    #[error("{address} is refused: vmwatch, NATS or MongoDB listens on it")]
    Listener { address: SocketAddr },
    #[error("{address} is refused: VMWATCH_ALERT_DENY contains the network {network}")]
    Denied { address: SocketAddr, network: IpNet },
    #[error(
        "no receiver can be checked, because {listener}, which is never a receiver, could not be resolved: {reason}; correct VMWATCH_ALERT_INTERNAL or the name server"
    )]
    ListenerUnknown { listener: String, reason: String },
}

/// The host and port of a receiver, and whether a URL selects TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl Endpoint {
    /// The endpoint of an `http` or `https` URL, with the port of the scheme if the URL has none.
    pub(crate) fn of_url(url: &ReceiverUrl) -> Result<Self, AddressError> {
        let uri: Uri = url.as_str().parse().map_err(|_| AddressError::Url)?;
        Self::of_uri(&uri).ok_or(AddressError::Url)
    }

    /// Returns `None` if the URI has no host.
    pub(crate) fn of_uri(uri: &Uri) -> Option<Self> {
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
        let default = match uri.scheme_str() {
            Some("https" | "wss") => 443,
            Some("http" | "ws") => 80,
            _ => 4222,
        };
        (!host.is_empty()).then(|| Self {
            host: host.to_owned(),
            port: uri.port_u16().unwrap_or(default),
        })
    }

    fn of_target(target: &ChannelTarget) -> Result<Self, AddressError> {
        match target {
            ChannelTarget::Email { server, .. } => Ok(server.clone().into()),
            ChannelTarget::Webhook { url } | ChannelTarget::Alertmanager { url } => Self::of_url(url),
        }
    }
}

impl From<SmtpServer> for Endpoint {
    fn from(server: SmtpServer) -> Self {
        Self {
            host: server.host,
            port: server.port,
        }
    }
}

/// The rules for addresses of receivers.
#[derive(Debug)]
pub(crate) struct Addresses {
    deny: Vec<IpNet>,
    allow: Vec<SocketAddr>,
    listeners: Listeners,
}

impl Addresses {
    pub(crate) fn new(settings: AddressSettings) -> Self {
        Self {
            deny: settings.deny,
            allow: settings.allow,
            listeners: Listeners::new(settings.listeners),
        }
    }

    /// Resolves and checks the receiver of a channel. Fails if one of its addresses is refused.
    pub(crate) async fn check_target(&self, target: &ChannelTarget) -> Result<Vec<SocketAddr>, AddressError> {
        self.check(&Endpoint::of_target(target)?).await
    }

    /// Resolves an endpoint and checks all of its addresses, which the caller may then connect to.
    pub(crate) async fn check(&self, endpoint: &Endpoint) -> Result<Vec<SocketAddr>, AddressError> {
        let addresses = resolve(endpoint)
            .await
            .map_err(|reason| AddressError::Unresolved {
                host: endpoint.host.clone(),
                reason,
            })?;
        let listeners = self.listeners.addresses().await?;
        for &address in &addresses {
            self.check_address(address, &listeners)?;
        }
        Ok(addresses)
    }

    fn check_address(&self, address: SocketAddr, listeners: &[SocketAddr]) -> Result<(), AddressError> {
        if listeners.iter().any(|&listener| is_listener(address, listener)) {
            return Err(AddressError::Listener { address });
        }
        if self.allow.contains(&address) {
            return Ok(());
        }
        if let Some(kind) = ranges::refused(address.ip()) {
            return Err(AddressError::Special { address, kind });
        }
        let ip = address.ip().to_canonical();
        match self.deny.iter().find(|network| network.contains(&ip)) {
            Some(&network) => Err(AddressError::Denied { address, network }),
            None => Ok(()),
        }
    }

    /// Why no receiver can be checked at the moment; a text for administrators.
    pub(crate) fn problem(&self) -> Option<String> {
        self.listeners.problem()
    }

    /// Keeps the addresses of listeners current, until it is cancelled.
    pub(crate) async fn watch(&self) {
        self.listeners.watch().await;
    }
}

async fn resolve(endpoint: &Endpoint) -> Result<Vec<SocketAddr>, String> {
    let resolving = tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port));
    let found = timeout(RESOLVE_LIMIT, resolving)
        .await
        .map_err(|_| format!("no answer within {} s", RESOLVE_LIMIT.as_secs()))?
        .map_err(|error| error.to_string())?;
    let canonical = found.map(|address| SocketAddr::new(address.ip().to_canonical(), address.port()));
    let addresses: Vec<_> = canonical.take(MAX_ADDRESSES).collect();
    if addresses.is_empty() {
        return Err("it has no address".to_owned());
    }
    Ok(addresses)
}

/// Whether a connection to the address reaches the listener. A server that the service reaches by loopback, or that listens on
/// all addresses, is reachable by each address of this machine.
fn is_listener(address: SocketAddr, listener: SocketAddr) -> bool {
    let (ip, own) = (address.ip().to_canonical(), listener.ip().to_canonical());
    address.port() == listener.port()
        && (ip == own || (own.is_loopback() || own.is_unspecified()) && is_of_this_machine(ip))
}

/// Only an address of this machine can be bound.
fn is_of_this_machine(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified() || UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests;
