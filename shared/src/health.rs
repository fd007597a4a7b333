//! The small listener for probes and scrapes: `/healthz` (the process lives), `/readyz` (it can do its work, or why
//! not), `/metrics` (Prometheus). It shows nothing of users or VMs; bind it where only the platform reaches it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, http::StatusCode, routing::get};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::{
    config::{Environment, Invalid, Setting},
    http_server::{HttpLimits, serve},
};

/// The setting of the listener; each program has its own default port.
pub const fn setting(default: &'static str) -> Setting {
    Setting {
        name: "VMWATCH_HEALTH_LISTEN",
        default,
        help: "address of /healthz, /readyz and /metrics, for the platform only",
    }
}

/// Reads the address.
pub fn read(env: &Environment, default: &'static str) -> Result<SocketAddr, Invalid> {
    env.get(&setting(default))
}

/// Says whether the program can do its work, or what it waits for.
pub type Readiness = Arc<dyn Fn() -> Result<(), &'static str> + Send + Sync>;

/// Serves the probes in the background until shutdown.
pub async fn start(
    address: SocketAddr,
    metrics: PrometheusHandle,
    ready: Readiness,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await.map_err(|error| {
        let name = setting("").name;
        std::io::Error::new(
            error.kind(),
            format!("{name}: cannot listen on {address}: {error}"),
        )
    })?;
    info!(address = %listener.local_addr()?, "health listener");
    let stopping = shutdown.clone();
    let readiness = move || {
        let state = if stopping.is_cancelled() {
            Err("stopping")
        } else {
            ready()
        };
        async move {
            match state {
                Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
                Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            }
        }
    };
    let router = Router::new()
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(readiness))
        .route("/metrics", get(move || async move { metrics.render() }));
    let limits = HttpLimits {
        connections: 64,
        header_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(1),
    };
    tokio::spawn(async move {
        if let Err(error) = serve(listener, router, limits, shutdown).await {
            error!(%error, "the health listener failed");
        }
    });
    Ok(())
}
