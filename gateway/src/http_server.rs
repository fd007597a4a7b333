//! An HTTP/1.1 listener with the bounds that `axum::serve` lacks: it keeps half-sent requests and idle connections
//! for ever. HTTP/1 only, since the automatic choice of a version waits for the first byte without a limit.

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

/// What a client may send ahead of its body, and what is read of a body at once. hyper's own bound is 400 KiB, which
/// ten thousand clients that send headers slowly would turn into 4 GiB.
const BUFFER_BYTES: usize = 64 * 1024;

/// How long idle connections stay open after shutdown began. A busy client sends its next request within this time and
/// gets the answer with `Connection: close`; a connection closed at once might have that request in transit, which
/// would be lost.
const LINGER: Duration = Duration::from_secs(1);

/// The bounds of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    /// Connections at once; more wait in the kernel's queue.
    pub connections: usize,
    /// From the first wait for a request to the end of its headers: a slow sender and an idle connection both end here.
    /// So does a peer that takes nothing of its answer for so long.
    pub header_timeout: Duration,
    /// How long a stop waits for requests in flight.
    pub drain: Duration,
}

/// Serves until shutdown, then lets requests in flight finish; over TLS where that is given. Handlers find the peer as
/// `ConnectInfo<SocketAddr>`.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: HttpLimits,
    tls: Option<Tls>,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let permits = Arc::new(Semaphore::new(limits.connections));
    // In an Arc, since its own clones lock it and each request makes some.
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
                // The peer left, sent no HTTP, or was too slow: its affair, but countable.
                counter!("vmwatch_http_connection_errors_total").increment(1);
                debug!(%error, %peer, "connection ended");
            }
            gauge!("vmwatch_http_connections").decrement(1.0);
            drop(permit);
        });
    }
    drop(listener);
    let end = Instant::now() + limits.drain;
    let all = permits.acquire_many(u32::try_from(limits.connections).unwrap_or(u32::MAX));
    // An error is the time-out: some connections are idle.
    let _ = tokio::time::timeout(limits.drain.min(LINGER), all).await;
    if tokio::time::timeout_at(end, graceful.shutdown()).await.is_err() {
        warn!("the drain deadline passed with HTTP requests unfinished");
    }
    Ok(())
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One connection, to its end.
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

/// While the listener stops, every answer is the last of its connection and says so.
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
    // The semaphore is never closed.
    let permit = Arc::clone(permits).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, peer)) => {
            if let Err(error) = stream.set_nodelay(true) {
                debug!(%error, %peer, "TCP_NODELAY");
            }
            Some((stream, peer, permit))
        }
        Err(error) => {
            // Out of file descriptors, mostly: wait for some to come back rather than spin.
            warn!(%error, "a connection could not be accepted");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}
