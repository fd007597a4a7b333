//! The HTTP edge: it translates, checks sessions, and holds no rule and no database connection of its own.
//!
//! Way of one request: [`legacy`] reads the documented form, or [`rest`] that of today; [`sessions`] tells who asks
//! without leaving the process, the bus carries the method's own parameters to a service, and the same module renders the
//! reply. Live events are followed by [`live`]. What no route takes is for [`page`].

mod admission;
mod body;
pub mod config;
mod headers;
pub mod http_server;
pub mod http_tls;
pub mod legacy;
mod live;
mod open_files;
mod page;
mod proxies;
mod rate;
pub mod rest;
mod sessions;
mod sources;

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
    config::{GatewaySettings, HttpSettings, LISTEN, RestSettings},
    http_tls::{Tls, TlsError},
    legacy::Documented,
    live::Live,
    proxies::Proxies,
    sessions::Sessions,
};

/// The name on the bus, in telemetry and in the permissions of deploy/nats.
pub const NAME: &str = "vmwatch-gateway";

/// What every request needs.
pub(crate) struct Gateway {
    bus: Bus,
    sessions: Sessions,
    live: Live,
    deadlines: Deadlines,
    http: HttpSettings,
    proxies: Proxies,
    /// Whether this program's own listener speaks TLS.
    tls: bool,
    rest: RestSettings,
    admission: Admission,
    documented: &'static [Documented],
}

impl Gateway {
    /// Calls a method of a service, once admission control lets it through.
    async fn call<M: Method>(&self, context: &Context, params: &M::Params) -> Result<M::Reply, Fault> {
        let _permit = self.admission.enter(&M::INFO, context).await?;
        self.bus.call::<M>(context, params).await
    }
}

/// The gateway cannot run.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The bus cannot be used.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The address cannot be listened on.
    #[error("{}: cannot listen on {address}", LISTEN.name)]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Its certificate cannot be served.
    #[error("the certificate of the API")]
    Tls(#[from] TlsError),
    /// The health listener failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Serves until shutdown, then drains.
pub async fn run(settings: GatewaySettings, program: Program) -> Result<(), GatewayError> {
    let shutdown = program.shutdown().clone();
    let bus = Bus::connect(NAME, &settings.bus).await?;
    clock::watch(&bus, &format!("KV_{SESSION_BUCKET}"), shutdown.clone());
    let sessions = Sessions::follow(&bus, settings.sessions, &shutdown);
    let check = {
        let (bus, sessions) = (bus.clone(), sessions.clone());
        move || {
            let current = sessions.is_current();
            gauge!("vmwatch_session_table_current").set(if current { 1.0 } else { 0.0 });
            bus.check_connected()?;
            if current {
                Ok(())
            } else {
                Err("waiting for sessions and users")
            }
        }
    };
    let waiting_for = "waiting for the certificate and the listener of the API";
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
    info!(address = %listener.local_addr()?, tls = tls.is_some(), "serving HTTP");
    let gateway = Arc::new(Gateway {
        bus: bus.clone(),
        sessions,
        live: Live::follow(&bus, rest::encode_event, shutdown.clone()),
        deadlines: settings.deadlines,
        http: settings.http,
        proxies: settings.proxies,
        tls: tls.is_some(),
        rest: settings.rest,
        admission: Admission::new(settings.admission),
        documented: settings.documented,
    });
    let router = Router::new()
        .route(legacy::PATH, any(legacy::serve))
        .merge(rest::router(&gateway))
        .layer(from_fn_with_state(Arc::clone(&gateway), headers::secure))
        .with_state(gateway);
    // Connections wait in the kernel's queue from here on.
    program.set_serving();
    http_server::serve(listener, router, settings.http.limits, tls, shutdown).await?;
    info!("drained");
    Ok(())
}
