//! Load over HTTP/1.1, by keep-alive connections that cost the machine little: it shares its cores with what is measured.
//!
//! In a closed loop each connection asks again as soon as it is answered: the most that can be served. In an open loop
//! requests are due at fixed moments, whatever became of those before; each is timed from the moment at which it was
//! due, so that a stall is counted against every request that it held up.

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

/// The most that an answer may be.
const ANSWER_BYTES: usize = 1 << 20;
/// Nobody waits for an answer longer than this.
const PATIENCE: Duration = Duration::from_secs(10);
/// What an answer to the documented API starts with where it is a success.
const SUCCESS: &[u8] = br#"{"status_code":1,"#;

/// A POST, encoded.
pub(crate) fn post(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n");
    format!("{head}Content-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// A connection, opened anew where the peer closes it after an answer.
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

    /// Sends a request and reads the answer's body; any status but 200 is an error.
    pub(crate) async fn ask(&mut self, request: &[u8]) -> anyhow::Result<&[u8]> {
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
            if let Some(answer) = Answer::of(&self.buffer)? {
                break answer;
            }
        };
        self.stream = (!answer.last).then_some(stream);
        self.buffer.get(answer.body).context("the answer ends early")
    }
}

async fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A whole answer.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    body: Range<usize>,
    /// Whether the peer closes the connection after it.
    last: bool,
}

impl Answer {
    /// The answer, once all of it is there.
    fn of(bytes: &[u8]) -> anyhow::Result<Option<Self>> {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            return Ok(None);
        };
        let head = std::str::from_utf8(bytes.get(..end).unwrap_or_default())?;
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap_or_default();
        ensure!(status.starts_with("HTTP/1.1 200"), "the answer is {status}");
        let (mut length, mut last) = (None, false);
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            if name.eq_ignore_ascii_case("content-length") {
                length = Some(value.trim().parse::<usize>()?);
            } else if name.eq_ignore_ascii_case("connection") {
                last = value.trim().eq_ignore_ascii_case("close");
            }
        }
        let body = end + 4..end + 4 + length.context("an answer without Content-Length")?;
        Ok((bytes.len() >= body.end).then_some(Self { body, last }))
    }
}

/// Requests of one kind to one place; connections take them in turn from places of their own.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) to: SocketAddr,
    pub(crate) requests: Arc<Vec<Vec<u8>>>,
    /// What every body must start with: a refusal would be faster than an answer.
    expected: &'static [u8],
}

/// What a round came to.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    /// In milliseconds.
    pub(crate) took: Series,
}

impl Outcome {
    pub(crate) fn a_second(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "requests of a round")]
        let requests = self.requests as f64;
        requests / self.seconds
    }
}

impl Load {
    /// Requests of the documented API that must succeed.
    pub(crate) fn success(to: SocketAddr, requests: &Arc<Vec<Vec<u8>>>) -> Self {
        Self::expecting(to, requests, SUCCESS)
    }

    /// Requests whose answers start so.
    pub(crate) fn expecting(to: SocketAddr, requests: &Arc<Vec<Vec<u8>>>, expected: &'static [u8]) -> Self {
        Self {
            to,
            requests: Arc::clone(requests),
            expected,
        }
    }

    /// One answer of each of the first requests, for a look at them.
    pub(crate) async fn answers(&self, count: usize) -> anyhow::Result<Vec<String>> {
        let mut connection = Connection::open(self.to).await?;
        let mut answers = Vec::new();
        for request in self.requests.iter().take(count) {
            answers.push(String::from_utf8(connection.ask(request).await?.to_vec())?);
        }
        Ok(answers)
    }

    /// Asks for so long over so many connections, each as fast as it is answered.
    pub(crate) async fn closed(&self, connections: usize, time: Duration) -> anyhow::Result<Outcome> {
        let mut opened = Vec::new();
        for _ in 0..connections {
            opened.push(Connection::open(self.to).await?);
        }
        let started = Instant::now();
        let end = started + time;
        let step = self.requests.len() / connections.max(1);
        let asking = opened
            .into_iter()
            .enumerate()
            .map(|(place, connection)| tokio::spawn(ask_until(connection, self.clone(), place * step, end)));
        let all = tokio::time::timeout(time + PATIENCE, try_join_all(asking)).await;
        let mut took = Vec::new();
        for times in all.context("answers stay away")?? {
            took.extend(times?);
        }
        Ok(Outcome {
            requests: took.len() as u64,
            seconds: started.elapsed().as_secs_f64(),
            took: took.into_iter().collect(),
        })
    }

    /// Asks at a fixed rate for so long, over at most so many connections.
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
                let mut connection = pool.take().context("as many connections as permits")?;
                let turn = usize::try_from(next.fetch_add(1, Ordering::Relaxed))?;
                let request = load
                    .requests
                    .get(turn % load.requests.len())
                    .context("there are requests")?;
                check(connection.ask(request).await?, load.expected)?;
                pool.put(connection);
                Ok(())
            }
        })
        .await
    }
}

/// The connections that nobody uses at the moment.
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

async fn ask_until(
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
        check(connection.ask(request).await?, load.expected)?;
        took.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(took)
}

fn check(body: &[u8], expected: &[u8]) -> anyhow::Result<()> {
    let text = || String::from_utf8_lossy(body).into_owned();
    ensure!(body.starts_with(expected), "a request failed: {}", text());
    Ok(())
}

/// Does something at a fixed rate for so long. A thread of its own keeps the time: the runtime's clock has steps of a
/// millisecond.
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
        reason = "some thousands of requests"
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
                // Fails only where the first error has ended the round.
                let _ = done.send(outcome).await;
            });
        }
    });
    let mut took = Vec::new();
    while let Some(outcome) = tokio::time::timeout(PATIENCE, times.recv())
        .await
        .context("answers stay away")?
    {
        took.push(outcome?);
    }
    clock
        .join()
        .map_err(|_| anyhow::anyhow!("the clock's thread ended by a defect"))?;
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
    fn a_body_is_found_once_it_is_whole() {
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc";
        let whole = Answer {
            body: 38..41,
            last: false,
        };
        assert_eq!(Answer::of(answer).unwrap(), Some(whole));
        assert_eq!(Answer::of(&answer[..40]).unwrap(), None);
        assert_eq!(Answer::of(&answer[..20]).unwrap(), None);
        assert!(Answer::of(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").is_err());
        let closed = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
        assert!(Answer::of(closed).unwrap().unwrap().last);
    }

    #[tokio::test]
    async fn a_stall_counts_against_all_that_it_holds_up() {
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
        // About half were due during the stall, and waited for what was left of it.
        assert!(outcome.took.quantile(0.75) > 20.0, "{:?}", outcome.took);
    }
}
