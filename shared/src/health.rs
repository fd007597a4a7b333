//! The small listener for probes and scrapes: `/healthz` (the process lives), `/readyz` (it can do its work, or why
//! not), `/metrics` (Prometheus). It shows nothing of users or VMs; bind it where only the platform reaches it.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use axum::{Router, http::StatusCode, routing::get};
use metrics::gauge;
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
        help: "address and port of /healthz, /readyz and /metrics; keep it private to the platform",
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
    let state = Arc::new(move || {
        if stopping.is_cancelled() {
            Err("stopping")
        } else {
            ready()
        }
    });
    let readiness = {
        let state = Arc::clone(&state);
        move || async move {
            match state() {
                Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
                Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            }
        }
    };
    let shown = move || async move {
        gauge!("vmwatch_ready").set(if state().is_ok() { 1.0 } else { 0.0 });
        metrics.render()
    };
    let router = Router::new()
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(readiness))
        .route("/metrics", get(shown));
    let limits = HttpLimits {
        connections: 64,
        header_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(1),
    };
    tokio::spawn(async move {
        if let Err(error) = serve(listener, router, limits, None, shutdown).await {
            error!(%error, "the health listener failed");
        }
    });
    Ok(())
}

/// Asks the program that runs here whether it is ready, or why not: the health check of an image without shell or
/// `curl`. It blocks, a few seconds at most.
pub fn probe(address: SocketAddr) -> Result<(), String> {
    const LIMIT: Duration = Duration::from_secs(2);
    const MOST_BYTES: u64 = 4096;
    let here = SocketAddr::new(reachable(address.ip()), address.port());
    let asked = || {
        let mut stream = TcpStream::connect_timeout(&here, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        write!(
            stream,
            "GET /readyz HTTP/1.1\r\nHost: {here}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = Vec::new();
        stream.take(MOST_BYTES).read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = asked().map_err(|error: std::io::Error| format!("{here} does not answer: {error}"))?;
    if answer.starts_with("HTTP/1.1 200 ") {
        return Ok(());
    }
    let (_, reason) = answer.split_once("\r\n\r\n").unwrap_or_default();
    Err(format!("not ready: {}", reason.trim()))
}

/// A listener on every address is reached by loopback.
fn reachable(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    }
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_probe_tells_ready_from_not_ready_and_from_nobody() {
        // The port is free while nobody else takes it: the listener below says so if not.
        let port = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let asked = || tokio::task::spawn_blocking(move || probe(address));
        assert!(asked().await.unwrap().unwrap_err().contains("does not answer"));

        let ready = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let readiness: Readiness = {
            let ready = Arc::clone(&ready);
            Arc::new(move || {
                ready
                    .load(std::sync::atomic::Ordering::Relaxed)
                    .then_some(())
                    .ok_or("the bus is away")
            })
        };
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let stop = CancellationToken::new();
        start(address, metrics, readiness, stop.clone()).await.unwrap();
        assert_eq!(
            asked().await.unwrap(),
            Err("not ready: the bus is away".to_owned())
        );
        ready.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(asked().await.unwrap(), Ok(()));
        stop.cancel();
    }
}
