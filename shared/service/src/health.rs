//! The HTTP listener for health checks and metrics: `/healthz` (whether the process runs), `/readyz` (whether the
//! program is ready, or why not) and `/metrics` (for Prometheus). It reveals no data of users or VMs, but should listen
//! on an address that only the platform can reach.

use std::{
    borrow::Cow,
    convert::Infallible,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics::gauge;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::config::{Environment, Invalid, Setting, Value};

/// Maximum number of concurrent connections to the health listener; further ones wait in the kernel's queue.
const CONNECTIONS: usize = 64;
/// Time limit of a connection, which serves one request. It bounds how long a client that sends or reads slowly can
/// occupy the connection.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// Time limit for receiving the request line and the headers.
const HEADER_LIMIT: Duration = Duration::from_secs(5);
/// Size of the read buffer, which limits the size of the request line and the headers.
const BUFFER_BYTES: usize = 16 * 1024;
/// Wait after a failed `accept`, which usually fails because the process has run out of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// The setting for the listener's address; each program has its own default port.
pub const fn setting(default: &'static str) -> Setting {
    Setting {
        name: "VMWATCH_HEALTH_LISTEN",
        value: Value::Address,
        default,
        help: "address and port of the HTTP listener for /healthz, /readyz and /metrics; must be reachable only by health probes and by Prometheus",
    }
}

/// Reads the setting for the listener's address.
pub fn read(env: &Environment, default: &'static str) -> Result<SocketAddr, Invalid> {
    env.get(&setting(default))
}

/// A function that reports whether the program is ready; the error says what the program waits for.
pub type Readiness = Arc<dyn Fn() -> Result<(), Cow<'static, str>> + Send + Sync>;

/// Serves health checks and metrics in the background until shutdown.
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
    info!(address = %listener.local_addr()?, "serving health checks and metrics");
    let probes = Arc::new(Probes {
        ready,
        metrics,
        shutdown,
    });
    tokio::spawn(probes.serve(listener));
    Ok(())
}

struct Probes {
    ready: Readiness,
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
}

impl Probes {
    async fn serve(self: Arc<Self>, listener: TcpListener) {
        let shutdown = self.shutdown.clone();
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        let accepting = async {
            // Acquiring a permit fails only if the semaphore is closed, which never happens.
            while let Ok(permit) = Arc::clone(&connections).acquire_owned().await {
                match listener.accept().await {
                    Ok((stream, peer)) => {
                        let probes = Arc::clone(&self);
                        tokio::spawn(async move {
                            probes.connection(stream, peer).await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        warn!(%error, "health listener: accept failed; retrying");
                        tokio::time::sleep(ACCEPT_RETRY).await;
                    }
                }
            }
        };
        shutdown.run_until_cancelled(accepting).await;
    }

    /// Serves a single request. Keep-alive is off, so no idle connection delays the program's shutdown.
    async fn connection(self: Arc<Self>, stream: tokio::net::TcpStream, peer: SocketAddr) {
        let service = service_fn(move |request: Request<Incoming>| {
            let response = self.respond(&request);
            async { Ok::<_, Infallible>(response) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_LIMIT)
            .max_buf_size(BUFFER_BYTES)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        match timeout(CONNECTION_LIMIT, served).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, %peer, "health listener: connection failed"),
            Err(_) => debug!(%peer, "health listener: connection timed out"),
        }
    }

    fn respond<B>(&self, request: &Request<B>) -> Response<String> {
        let (status, body) = if matches!(*request.method(), Method::GET | Method::HEAD) {
            self.page(request.uri().path())
        } else {
            (StatusCode::METHOD_NOT_ALLOWED, String::new())
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, HeaderValue::from_static("GET,HEAD"));
        }
        response
    }

    fn page(&self, path: &str) -> (StatusCode, String) {
        match path {
            "/healthz" => (StatusCode::OK, "alive\n".to_owned()),
            "/readyz" => match self.readiness() {
                Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
                Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            },
            "/metrics" => {
                gauge!("vmwatch_ready").set(if self.readiness().is_ok() { 1.0 } else { 0.0 });
                (StatusCode::OK, self.metrics.render())
            }
            _ => (StatusCode::NOT_FOUND, String::new()),
        }
    }

    fn readiness(&self) -> Result<(), Cow<'static, str>> {
        if self.shutdown.is_cancelled() {
            Err("stopping".into())
        } else {
            (self.ready)()
        }
    }
}

/// Asks the program on this host whether it is ready; the error says why it is not. Container images without a shell or
/// `curl` use this as their health check. The call blocks for at most a few seconds.
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

/// The address to connect to: loopback if the listener listens on all addresses.
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
    async fn health_probe_distinguishes_ready_not_ready_and_unreachable() {
        // Another process could take the port before the listener binds it; the test then fails at the bind.
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
                    .ok_or("the bus is unreachable".into())
            })
        };
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let stop = CancellationToken::new();
        start(address, metrics, readiness, stop.clone()).await.unwrap();
        assert_eq!(
            asked().await.unwrap(),
            Err("not ready: the bus is unreachable".to_owned())
        );
        ready.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(asked().await.unwrap(), Ok(()));
        stop.cancel();
    }
}
