//! HTTP/1.1 listener with limits that `axum::serve` lacks: `axum::serve` keeps half-sent requests and idle connections
//! open for ever. HTTP/2 is not offered, because hyper's automatic version detection waits for the first byte without a
//! time limit.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::ConnectInfo,
    http::{HeaderValue, header},
    response::Response,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use metrics::{counter, gauge};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::Instant,
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::http_tls::Tls;

/// Maximum size of a request's headers, and size of the read buffer. With hyper's default of 400 KiB, ten thousand
/// clients that send headers slowly could use 4 GiB.
const BUFFER_BYTES: usize = 64 * 1024;

/// How long idle connections stay open after shutdown began. A client that sends a request within this time gets its
/// answer with `Connection: close`; if idle connections were closed at once, requests in transit would be lost.
const LINGER: Duration = Duration::from_secs(1);

/// Limits of an HTTP listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    /// Maximum number of concurrent connections; further connections wait in the kernel's accept queue.
    pub connections: usize,
    /// Maximum time between two requests on a connection, including the headers of the next request: ends idle
    /// connections and clients that send headers slowly. It also limits how long a client may stop reading its
    /// response.
    pub header_timeout: Duration,
    /// How long shutdown waits for HTTP requests in flight.
    pub drain: Duration,
}

/// Accepts HTTP connections until shutdown, then lets requests in flight finish. Connections use TLS if `tls` is given.
/// Request handlers get the client's address as `ConnectInfo<SocketAddr>`.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: HttpLimits,
    tls: Option<Tls>,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let permits = Arc::new(Semaphore::new(limits.connections));
    // Wrapped in an Arc, because every request clones the token several times, and each clone of a `CancellationToken`
    // takes a lock.
    let stopping = Arc::new(shutdown.clone());
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = accept(&listener, &permits) => accepted,
        };
        let Some((stream, peer, permit)) = accepted else {
            continue;
        };
        let (router, stopping) = (router.clone(), Arc::clone(&stopping));
        let tls = tls.clone();
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            gauge!("vmwatch_http_connections").increment(1.0);
            if let Err(error) = connection(stream, peer, router, stopping, limits, tls, watcher).await {
                // The client closed the connection, sent invalid HTTP, or was too slow. That is not an error of the
                // gateway, but it is counted.
                counter!("vmwatch_http_connection_errors_total").increment(1);
                debug!(%error, %peer, "HTTP connection ended with an error");
            }
            gauge!("vmwatch_http_connections").decrement(1.0);
            drop(permit);
        });
    }
    drop(listener);
    let end = Instant::now() + limits.drain;
    let all = permits.acquire_many(u32::try_from(limits.connections).unwrap_or(u32::MAX));
    // If this wait times out, some connections are still open; the shutdown below closes those that are idle.
    let _ = tokio::time::timeout(limits.drain.min(LINGER), all).await;
    if tokio::time::timeout_at(end, graceful.shutdown()).await.is_err() {
        warn!("the drain deadline passed before all HTTP requests had finished; aborting them");
    }
    Ok(())
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Serves one HTTP connection until it ends.
async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    stopping: Arc<CancellationToken>,
    limits: HttpLimits,
    tls: Option<Tls>,
    watcher: Watcher,
) -> Result<(), Failure> {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.header_timeout));
    let stream = Box::pin(stream);
    match tls {
        None => requests(stream, peer, router, stopping, limits, watcher).await,
        Some(tls) => {
            let shaken = tokio::time::timeout(limits.header_timeout, tls.acceptor().accept(stream)).await;
            requests(shaken??, peer, router, stopping, limits, watcher).await
        }
    }
}

async fn requests<S>(
    stream: S,
    peer: SocketAddr,
    router: Router,
    stopping: Arc<CancellationToken>,
    limits: HttpLimits,
    watcher: Watcher,
) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let router = router.map_request(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(ConnectInfo::<SocketAddr>(peer));
        request
    });
    let router = router.map_response(move |response| say_goodbye(response, &stopping));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    Ok(watcher.watch(connection).await?)
}

/// Adds `Connection: close` to the response during shutdown.
fn say_goodbye(mut response: Response, stopping: &CancellationToken) -> Response {
    if stopping.is_cancelled() {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    response
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    // Acquiring fails only if the semaphore is closed, which never happens.
    let permit = Arc::clone(permits).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, peer)) => {
            if let Err(error) = stream.set_nodelay(true) {
                debug!(%error, %peer, "setting TCP_NODELAY failed");
            }
            Some((stream, peer, permit))
        }
        Err(error) => {
            // Accepting usually fails because the process is out of file descriptors: wait until some are closed
            // instead of spinning.
            warn!(%error, "accepting an HTTP connection failed; retrying");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}
