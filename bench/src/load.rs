//! Generates HTTP/1.1 load over keep-alive connections. It uses little CPU time, because it shares the cores with the
//! measured programs.
//!
//! In a closed loop each connection sends its next request as soon as the previous one is answered. This measures the
//! maximum throughput. In an open loop requests are due at fixed times, even if earlier requests are unanswered. Each
//! request is timed from when it was due, so that a stall counts against every request that it delays.

use std::{
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Handle,
    sync::{Semaphore, mpsc},
};

use crate::statistics::Series;

/// Maximum size of an answer in bytes.
const ANSWER_BYTES: usize = 1 << 20;
/// Time limit for the answers to the last requests of a round.
const PATIENCE: Duration = Duration::from_secs(10);
/// The beginning of a successful answer of the documented API.
const SUCCESS: &[u8] = br#"{"status_code":1,"#;

/// Encodes a POST request.
pub(crate) fn post(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n");
    format!("{head}Content-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// Encodes a GET request of the REST API with the token of a session.
pub(crate) fn get(path: &str, session: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {session}\r\n\r\n").into_bytes()
}

/// A connection that reconnects if the peer closed it after an answer.
pub(crate) struct Connection {
    to: SocketAddr,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

impl Connection {
    pub(crate) async fn open(to: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self {
            to,
            stream: Some(connect(to).await?),
            buffer: Vec::new(),
        })
    }

    /// Sends a request and returns the body of the answer. Any status other than 200 is an error.
    pub(crate) async fn send(&mut self, request: &[u8]) -> anyhow::Result<&[u8]> {
        self.buffer.clear();
        let mut stream = match self.stream.take() {
            Some(open) => open,
            None => connect(self.to).await?,
        };
        stream.write_all(request).await?;
        let answer = loop {
            let read = stream.read_buf(&mut self.buffer).await?;
            ensure!(read > 0, "the connection was closed before the answer ended");
            ensure!(self.buffer.len() <= ANSWER_BYTES, "the answer is too large");
            if let Some(answer) = Answer::parse(&self.buffer)? {
                break answer;
            }
        };
        self.stream = (!answer.closes).then_some(stream);
        self.buffer.get(answer.body).context("the answer ends early")
    }
}

async fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A complete HTTP response.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    body: Range<usize>,
    /// True if the peer closes the connection after this answer.
    closes: bool,
}

impl Answer {
    /// Parses an answer. Returns `None` if it is incomplete.
    fn parse(bytes: &[u8]) -> anyhow::Result<Option<Self>> {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            return Ok(None);
        };
        let head = std::str::from_utf8(bytes.get(..end).unwrap_or_default())?;
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap_or_default();
        ensure!(status.starts_with("HTTP/1.1 200"), "the answer is {status}");
        let (mut length, mut closes) = (None, false);
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            if name.eq_ignore_ascii_case("content-length") {
                length = Some(value.trim().parse::<usize>()?);
            } else if name.eq_ignore_ascii_case("connection") {
                closes = value.trim().eq_ignore_ascii_case("close");
            }
        }
        let body = end + 4..end + 4 + length.context("an answer without Content-Length")?;
        Ok((bytes.len() >= body.end).then_some(Self { body, closes }))
    }
}

/// Requests to one address. Each connection sends them in the same order, from a different starting point, repeatedly.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) to: SocketAddr,
    pub(crate) requests: Arc<Vec<Vec<u8>>>,
    /// The text with which every answer must begin, so that errors, which are faster to answer, do not count as
    /// successes.
    expected: &'static [u8],
}

/// The result of a round.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    /// Latencies in milliseconds.
    pub(crate) took: Series,
}

impl Outcome {
    pub(crate) fn per_second(&self) -> f64 {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a round has far fewer than 2^52 requests"
        )]
        let requests = self.requests as f64;
        requests / self.seconds
    }
}

impl Load {
    /// Builds a load of the documented API whose requests must all succeed.
    pub(crate) fn success(to: SocketAddr, requests: &Arc<Vec<Vec<u8>>>) -> Self {
        Self::expecting(to, requests, SUCCESS)
    }

    /// Builds a load whose answers must begin with `expected`.
    pub(crate) fn expecting(to: SocketAddr, requests: &Arc<Vec<Vec<u8>>>, expected: &'static [u8]) -> Self {
        Self {
            to,
            requests: Arc::clone(requests),
            expected,
        }
    }

    /// Returns the answers to the first `count` requests.
    pub(crate) async fn answers(&self, count: usize) -> anyhow::Result<Vec<String>> {
        let mut connection = Connection::open(self.to).await?;
        let mut answers = Vec::new();
        for request in self.requests.iter().take(count) {
            answers.push(String::from_utf8(connection.send(request).await?.to_vec())?);
        }
        Ok(answers)
    }

    /// Sends the requests in a closed loop.
    pub(crate) async fn closed(&self, connections: usize, time: Duration) -> anyhow::Result<Outcome> {
        let mut opened = Vec::new();
        for _ in 0..connections {
            opened.push(Connection::open(self.to).await?);
        }
        let started = Instant::now();
        let end = started + time;
        let step = self.requests.len() / connections.max(1);
        let sending = opened
            .into_iter()
            .enumerate()
            .map(|(index, connection)| tokio::spawn(send_until(connection, self.clone(), index * step, end)));
        let all = tokio::time::timeout(time + PATIENCE, try_join_all(sending)).await;
        let mut took = Vec::new();
        for times in all.context("timed out waiting for answers")?? {
            took.extend(times?);
        }
        Ok(Outcome {
            requests: took.len() as u64,
            seconds: started.elapsed().as_secs_f64(),
            took: took.into_iter().collect(),
        })
    }

    /// Sends the requests in an open loop over at most `connections` connections.
    pub(crate) async fn open(
        &self,
        connections: usize,
        rate: f64,
        time: Duration,
    ) -> anyhow::Result<Outcome> {
        let pool = Arc::new(Pool {
            free: Mutex::default(),
            permits: Semaphore::new(connections),
        });
        for _ in 0..connections {
            pool.put(Connection::open(self.to).await?);
        }
        let (load, next) = (self.clone(), Arc::new(AtomicU64::new(0)));
        at_rate(rate, time, move || {
            let (pool, load, next) = (Arc::clone(&pool), load.clone(), Arc::clone(&next));
            async move {
                let _permit = pool.permits.acquire().await?;
                let mut connection = pool.take().context("no free connection despite a permit")?;
                let turn = usize::try_from(next.fetch_add(1, Ordering::Relaxed))?;
                let request = load
                    .requests
                    .get(turn % load.requests.len())
                    .context("the load has no requests")?;
                check(connection.send(request).await?, load.expected)?;
                pool.put(connection);
                Ok(())
            }
        })
        .await
    }
}

/// The connections that are not in use.
struct Pool {
    free: Mutex<Vec<Connection>>,
    permits: Semaphore,
}

impl Pool {
    fn take(&self) -> Option<Connection> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn put(&self, connection: Connection) {
        self.free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(connection);
    }
}

async fn send_until(
    mut connection: Connection,
    load: Load,
    first: usize,
    end: Instant,
) -> anyhow::Result<Vec<f64>> {
    let mut took = Vec::new();
    for request in load.requests.iter().cycle().skip(first) {
        let started = Instant::now();
        if started >= end {
            break;
        }
        check(connection.send(request).await?, load.expected)?;
        took.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(took)
}

fn check(body: &[u8], expected: &[u8]) -> anyhow::Result<()> {
    let text = || String::from_utf8_lossy(body).into_owned();
    ensure!(body.starts_with(expected), "a request failed: {}", text());
    Ok(())
}

/// Calls `act` at a fixed rate. A separate thread waits for the due times, because timers of the Tokio runtime have a
/// resolution of 1 ms.
pub(crate) async fn at_rate<Doing>(
    rate: f64,
    time: Duration,
    act: impl Fn() -> Doing + Send + 'static,
) -> anyhow::Result<Outcome>
where
    Doing: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the number of requests is in the thousands"
    )]
    let count = (rate * time.as_secs_f64()) as u32;
    let (done, mut times) = mpsc::channel(1024);
    let (handle, started) = (Handle::current(), Instant::now());
    let clock = thread::spawn(move || {
        for turn in 0..count {
            let due = started + Duration::from_secs_f64(f64::from(turn) / rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let (doing, done) = (act(), done.clone());
            handle.spawn(async move {
                let outcome = doing.await.map(|()| due.elapsed().as_secs_f64() * 1e3);
                // Sending fails only if an earlier error has ended the round.
                let _ = done.send(outcome).await;
            });
        }
    });
    let mut took = Vec::new();
    while let Some(outcome) = tokio::time::timeout(PATIENCE, times.recv())
        .await
        .context("timed out waiting for answers")?
    {
        took.push(outcome?);
    }
    clock
        .join()
        .map_err(|_| anyhow::anyhow!("the timing thread panicked"))?;
    Ok(Outcome {
        requests: took.len() as u64,
        seconds: started.elapsed().as_secs_f64(),
        took: took.into_iter().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_answer_is_parsed_only_when_complete() {
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc";
        let complete = Answer {
            body: 38..41,
            closes: false,
        };
        assert_eq!(Answer::parse(answer).unwrap(), Some(complete));
        assert_eq!(Answer::parse(&answer[..40]).unwrap(), None);
        assert_eq!(Answer::parse(&answer[..20]).unwrap(), None);
        assert!(Answer::parse(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").is_err());
        let closed = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
        assert!(Answer::parse(closed).unwrap().unwrap().closes);
    }

    #[tokio::test]
    async fn load_generator_counts_a_stall_for_every_delayed_request() {
        let gate = Arc::new(tokio::sync::Mutex::new(()));
        let first = Arc::new(AtomicU64::new(0));
        let outcome = at_rate(1000.0, Duration::from_millis(200), move || {
            let (gate, first) = (Arc::clone(&gate), Arc::clone(&first));
            async move {
                let _turn = gate.lock().await;
                if first.fetch_add(1, Ordering::Relaxed) == 0 {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Ok(())
            }
        })
        .await
        .unwrap();
        assert_eq!(outcome.requests, 200);
        // About half of the requests were due during the stall and waited for its end.
        assert!(outcome.took.quantile(0.75) > 20.0, "{:?}", outcome.took);
    }
}
