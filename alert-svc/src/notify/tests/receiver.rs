//! A receiver of webhooks that can misbehave.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};

/// How a receiver answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behaviour {
    Status(u16),
    /// Reads the request and never answers.
    Hang,
    /// Reads the request and closes the connection.
    Drop,
    /// Redirects to the port.
    Redirect(u16),
}

/// A request that a receiver got.
#[derive(Debug, Clone)]
pub(super) struct Received {
    pub(super) path: String,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: String,
}

impl Received {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// The id by which the receiver recognizes a duplicate.
    pub(super) fn id(&self) -> &str {
        &self.headers["x-vmwatch-message-id"]
    }
}

/// A receiver on a port of its own.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    behaviour: Arc<Mutex<Behaviour>>,
    task: AbortHandle,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Receiver {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let behaviour = Arc::new(Mutex::new(Behaviour::Status(200)));
        let (requests, behave) = (Arc::clone(&received), Arc::clone(&behaviour));
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (requests, behave) = (Arc::clone(&requests), Arc::clone(&behave));
                tokio::spawn(async move { serve(stream, &requests, &behave).await });
            }
        });
        Self {
            address,
            received,
            behaviour,
            task: task.abort_handle(),
        }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}/hook?x=1", self.address)
    }

    pub(super) fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    pub(super) fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }
}

async fn serve(mut stream: TcpStream, requests: &Mutex<Vec<Received>>, behaviour: &Mutex<Behaviour>) {
    let Some(request) = read(&mut stream).await else {
        return;
    };
    requests.lock().unwrap().push(request);
    let behaviour = *behaviour.lock().unwrap();
    let (status, more) = match behaviour {
        Behaviour::Status(status) => (status, String::new()),
        Behaviour::Redirect(port) => (302, format!("Location: http://127.0.0.1:{port}/\r\n")),
        Behaviour::Drop => return,
        Behaviour::Hang => return std::future::pending().await,
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
