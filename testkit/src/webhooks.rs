//! A receiver of webhooks that can misbehave.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};

/// How a receiver answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Answers with this status.
    Status(u16),
    /// Accepts the connection and never reads the request.
    Ignore,
    /// Reads the request and never answers.
    Hang,
    /// Reads the request and closes the connection.
    Drop,
    /// Redirects to the port.
    Redirect(u16),
}

/// A request that a receiver has read.
#[derive(Debug, Clone)]
pub struct Received {
    /// The path with the query.
    pub path: String,
    /// The headers; their names are in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
}

impl Received {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// The id by which the receiver recognizes a duplicate.
    pub fn id(&self) -> &str {
        &self.headers["x-vmwatch-message-id"]
    }
}

#[derive(Debug)]
struct State {
    received: Mutex<Vec<Received>>,
    behaviour: Mutex<Behaviour>,
    ignored: AtomicUsize,
}

/// A receiver on a port of its own. Dropping it ends it.
#[derive(Debug)]
pub struct Receiver {
    /// The address of its listener, on loopback.
    pub address: SocketAddr,
    state: Arc<State>,
    task: AbortHandle,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Receiver {
    /// Starts a receiver that answers 200.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            received: Mutex::default(),
            behaviour: Mutex::new(Behaviour::Status(200)),
            ignored: AtomicUsize::new(0),
        });
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&shared);
                tokio::spawn(async move { serve(stream, &state).await });
            }
        });
        Self {
            address,
            state,
            task: task.abort_handle(),
        }
    }

    /// The URL for a webhook channel.
    pub fn url(&self) -> String {
        format!("http://{}/hook?x=1", self.address)
    }

    /// Sets how the receiver answers from now on.
    pub fn behave(&self, behaviour: Behaviour) {
        *self.state.behaviour.lock().unwrap() = behaviour;
    }

    /// All requests that were read, oldest first.
    pub fn received(&self) -> Vec<Received> {
        self.state.received.lock().unwrap().clone()
    }

    /// Number of connections that were accepted and not read.
    pub fn ignored(&self) -> usize {
        self.state.ignored.load(Ordering::Relaxed)
    }
}

async fn serve(mut stream: TcpStream, state: &State) {
    if *state.behaviour.lock().unwrap() == Behaviour::Ignore {
        state.ignored.fetch_add(1, Ordering::Relaxed);
        return std::future::pending().await;
    }
    let Some(request) = read(&mut stream).await else {
        return;
    };
    state.received.lock().unwrap().push(request);
    let behaviour = *state.behaviour.lock().unwrap();
    let (status, more) = match behaviour {
        Behaviour::Status(status) => (status, String::new()),
        Behaviour::Redirect(port) => (302, format!("Location: http://127.0.0.1:{port}/\r\n")),
        Behaviour::Drop => return,
        Behaviour::Hang | Behaviour::Ignore => return std::future::pending().await,
    };
    let answer =
        format!("HTTP/1.1 {status} -\r\nContent-Length: 7\r\nConnection: close\r\n{more}\r\nanswer\n");
    let _ = stream.write_all(answer.as_bytes()).await;
}

async fn read(stream: &mut TcpStream) -> Option<Received> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|part| part == b"\r\n\r\n") {
            let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let headers: BTreeMap<_, _> = head
                .lines()
                .filter_map(|line| line.split_once(": "))
                .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
                .collect();
            let length: usize = headers
                .get("content-length")
                .map_or(0, |text| text.parse().unwrap());
            if let Some(body) = bytes.get(end + 4..end + 4 + length) {
                return Some(Received {
                    path: head.split(' ').nth(1).unwrap().to_owned(),
                    headers,
                    body: String::from_utf8(body.to_vec()).unwrap(),
                });
            }
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}
