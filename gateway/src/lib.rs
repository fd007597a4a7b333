//! The HTTP gateway: checks sessions and translates HTTP requests into bus requests. It contains no business rules and
//! has no database connection.
//!
//! [`legacy`] (the documented API of 2017) or [`rest`] decodes a request. [`sessions`] finds the request's user without
//! a round trip, [`api_tokens`] the one of an API token, and the bus carries the method's parameters to a service. The
//! module that decoded the request encodes the reply. [`live`] follows live events, [`install`] serves the agent's
//! packages, and [`page`] serves all other paths.

#![expect(
    missing_docs,
    reason = "the fields of some errors are named after what they hold"
)]

mod admission;
mod api_tokens;
mod body;
pub mod config;
mod headers;
pub mod http_server;
pub mod http_tls;
mod install;
pub mod legacy;
mod live;
mod open_files;
mod page;
mod proxies;
mod rate;
pub mod rest;
mod scrapes;
mod sessions;
mod sources;
mod uses;

use std::sync::Arc;

use axum::{Router, middleware::from_fn_with_state, routing::any};
use metrics::gauge;
use tokio::net::TcpListener;
use tracing::info;
use vmwatch_api::{Deadlines, Method, sessions::SESSION_BUCKET, wire::Fault};
use vmwatch_bus::{Bus, BusError, Context, clock};
use vmwatch_service::program::Program;

use crate::{
    admission::Admission,
    api_tokens::ApiTokens,
    config::{GatewaySettings, HttpSettings, LISTEN},
    http_tls::{Tls, TlsError},
    install::Install,
    legacy::Documented,
    live::Live,
    proxies::Proxies,
    scrapes::Scrapes,
    sessions::Sessions,
};

/// The gateway's name on the bus, in telemetry and in the permissions of deploy/nats.
pub const NAME: &str = "vmwatch-gateway";

/// State shared by all HTTP requests.
pub(crate) struct Gateway {
    bus: Bus,
    sessions: Sessions,
    api_tokens: ApiTokens,
    live: Live,
    deadlines: Deadlines,
    http: HttpSettings,
    proxies: Proxies,
    /// Whether the API's listener uses TLS.
    tls: bool,
    admission: Admission,
    scrapes: Scrapes,
    install: Install,
    documented: &'static [Documented],
}

impl Gateway {
    /// Calls a method of a service over the bus, after admission control.
    async fn call<M: Method>(&self, context: &Context, params: &M::Params) -> Result<M::Reply, Fault> {
        let _permit = self.admission.enter(&M::INFO, context).await?;
        self.bus.call::<M>(context, params).await
    }
}

/// Why the gateway could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The connection to the bus failed.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The API's listener could not bind its address.
    #[error("{}: cannot listen on {address}", LISTEN.name)]
    Listen {
        address: std::net::SocketAddr,
        source: std::io::Error,
    },
    /// The API's TLS certificate or key is not usable.
    #[error("the API's TLS certificate or key cannot be used")]
    Tls(#[from] TlsError),
    /// The health listener failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Runs the gateway until shutdown, then lets requests in flight finish.
pub async fn run(settings: GatewaySettings, program: Program) -> Result<(), GatewayError> {
    let shutdown = program.shutdown().clone();
    let bus = Bus::connect(NAME, &settings.bus).await?;
    clock::watch(&bus, &format!("KV_{SESSION_BUCKET}"), shutdown.clone());
    let (announced, until) = (bus.clone(), shutdown.clone());
    tokio::spawn(async move { announced.announce(NAME, until).await });
    let sessions = Sessions::follow(&bus, settings.sessions, &shutdown);
    let stale_after = settings.sessions.stale_after;
    let api_tokens = ApiTokens::follow(&bus, sessions.users(), stale_after, &shutdown);
    let check = {
        let (bus, sessions) = (bus.clone(), sessions.clone());
        move || {
            let current = sessions.is_current();
            gauge!("vmwatch_session_table_current").set(if current { 1.0 } else { 0.0 });
            bus.check()?;
            if current {
                Ok(())
            } else {
                Err("waiting for the KV buckets of sessions and users".into())
            }
        }
    };
    let waiting_for = "waiting for the API's TLS certificate and listener";
    program.start_health(settings.health, waiting_for, check).await?;

    open_files::allow(settings.http.limits.connections);
    let address = settings.listen;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| GatewayError::Listen { address, source })?;
    let tls = match settings.tls {
        None => None,
        Some(files) => Some(Tls::load(files, shutdown.clone()).await?),
    };
    let install = Install::load(settings.install, shutdown.clone()).await;
    info!(address = %listener.local_addr()?, tls = tls.is_some(), "serving HTTP");
    let gateway = Arc::new(Gateway {
        bus: bus.clone(),
        sessions,
        api_tokens,
        live: Live::follow(&bus, rest::encode_event, shutdown.clone()),
        deadlines: settings.deadlines,
        http: settings.http,
        proxies: settings.proxies,
        tls: tls.is_some(),
        admission: Admission::new(settings.admission),
        scrapes: Scrapes::new(),
        install,
        documented: settings.documented,
    });
    let router = Router::new()
        .route(legacy::PATH, any(legacy::serve))
        .merge(rest::router(&gateway))
        .layer(from_fn_with_state(Arc::clone(&gateway), headers::secure))
        .with_state(gateway);
    // The listener accepts connections from here on, even before the server task runs: the kernel queues them.
    program.set_serving();
    http_server::serve(listener, router, settings.http.limits, tls, shutdown).await?;
    info!("all HTTP requests have finished");
    Ok(())
}
