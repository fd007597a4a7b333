//! The servers and listeners that are never receivers, and their addresses.
//!
//! Each receiver is compared with all of them. As long as the name of one has never been resolved, no receiver can be
//! checked, so all are refused; logs, a metric and the list of channels name it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use metrics::gauge;
use tokio::time::sleep;
use tracing::{info, warn};

use super::{AddressError, Endpoint, resolve};

/// Interval at which the names are resolved, in addition to each check of a receiver.
const INTERVAL: Duration = Duration::from_mins(1);

#[derive(Debug, Default)]
struct Known {
    /// The addresses of each listener when it was last resolved, so that receivers can be checked while a name server is
    /// unreachable.
    addresses: HashMap<String, Vec<SocketAddr>>,
    /// Why no receiver can be checked.
    problem: Option<String>,
}

/// The listeners that are never receivers.
#[derive(Debug)]
pub(super) struct Listeners {
    endpoints: Vec<Endpoint>,
    known: Mutex<Known>,
}

impl Listeners {
    pub(super) fn new(endpoints: Vec<Endpoint>) -> Self {
        Self {
            endpoints,
            known: Mutex::default(),
        }
    }

    /// The addresses of all listeners. Fails if one has never been resolved.
    pub(super) async fn addresses(&self) -> Result<Vec<SocketAddr>, AddressError> {
        let all = self.resolve_all().await;
        let problem = all.as_ref().err().map(ToString::to_string);
        gauge!("vmwatch_alert_listeners_unresolved").set(f64::from(u8::from(problem.is_some())));
        let before = std::mem::replace(&mut self.known().problem, problem.clone());
        match problem {
            Some(problem) if before.is_none() => warn!(problem, "notifications are not sent"),
            None if before.is_some() => info!("receivers of notifications can be checked again"),
            _ => {}
        }
        all
    }

    async fn resolve_all(&self) -> Result<Vec<SocketAddr>, AddressError> {
        let mut all = Vec::new();
        for listener in &self.endpoints {
            let name = format!("{}:{}", listener.host, listener.port);
            match resolve(listener).await {
                Ok(addresses) => {
                    all.extend(&addresses);
                    self.known().addresses.insert(name, addresses);
                }
                Err(reason) => {
                    let known = self.known();
                    let Some(addresses) = known.addresses.get(&name) else {
                        return Err(AddressError::ListenerUnknown {
                            listener: name,
                            reason,
                        });
                    };
                    all.extend(addresses);
                }
            }
        }
        Ok(all)
    }

    /// Why no receiver could be checked at the last attempt; a text for administrators.
    pub(super) fn problem(&self) -> Option<String> {
        self.known().problem.clone()
    }

    /// Resolves the names at an interval, so that a problem is known before a message is sent.
    pub(super) async fn watch(&self) {
        loop {
            // The result is kept.
            let _ = self.addresses().await;
            sleep(INTERVAL).await;
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
