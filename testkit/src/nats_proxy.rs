//! A proxy between a program and NATS that can hold back what the program sends.

use std::sync::Arc;

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

use crate::{PATIENCE, eventually};

/// Maximum length of a line of the NATS protocol, far above what programs send.
const LONGEST_LINE: usize = 1 << 20;

/// How the proxy handles lines that start with its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    /// The proxy holds back the next line with the prefix and everything that the program sends after it.
    Armed,
    /// The proxy is holding back a line and everything after it.
    Held,
    Open,
}

/// A proxy that forwards everything until the program sends a line with the prefix. It then holds back that line and
/// everything after it until [`NatsProxy::release`] is called. The proxy ends with the async runtime.
#[derive(Debug)]
pub struct NatsProxy {
    url: String,
    gate: Arc<watch::Sender<Gate>>,
}

impl NatsProxy {
    /// Starts a proxy in front of the NATS server at the given address.
    pub async fn start(server: &str, prefix: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("binding a free port succeeds");
        let address = listener.local_addr().expect("the listener has an address");
        let gate = Arc::new(watch::Sender::new(Gate::Armed));
        let target = server.trim_start_matches("nats://").to_owned();
        let shared = Arc::clone(&gate);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&target).await else {
                    continue;
                };
                let (from_client, mut to_client) = client.into_split();
                let (mut from_server, to_server) = server.into_split();
                tokio::spawn(async move { copy(&mut from_server, &mut to_client).await });
                tokio::spawn(forward(from_client, to_server, prefix, Arc::clone(&shared)));
            }
        });
        Self {
            url: format!("nats://{address}"),
            gate,
        }
    }

    /// The URL of the proxy, to be used instead of the NATS server's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Waits until the proxy holds back a line.
    pub async fn held(&self) {
        eventually("the proxy holds back a line", PATIENCE, async || {
            let gate = *self.gate.borrow();
            (gate == Gate::Held).then_some(()).ok_or(format!("{gate:?}"))
        })
        .await;
    }

    /// Forwards the held-back lines, and everything that the program sends later.
    pub fn release(&self) {
        self.gate.send_replace(Gate::Open);
    }

    /// Holds back the next line with the prefix and everything after it, as at the start.
    pub fn arm(&self) {
        self.gate.send_replace(Gate::Armed);
    }
}

async fn forward(
    from_client: OwnedReadHalf,
    mut to_server: OwnedWriteHalf,
    prefix: &str,
    gate: Arc<watch::Sender<Gate>>,
) {
    let mut from_client = BufReader::new(from_client);
    let mut line = Vec::new();
    loop {
        line.clear();
        // The proxy splits message payloads into lines as well, which makes no difference to the server.
        match from_client.read_until(b'\n', &mut line).await {
            Ok(1..LONGEST_LINE) => {}
            _ => return,
        }
        if line.starts_with(prefix.as_bytes()) {
            gate.send_if_modified(|gate| {
                let armed = *gate == Gate::Armed;
                if armed {
                    *gate = Gate::Held;
                }
                armed
            });
            let mut gate = gate.subscribe();
            // Waiting fails only if the sender was dropped, but this task owns the sender.
            let _ = gate.wait_for(|gate| *gate == Gate::Open).await;
        }
        if to_server.write_all(&line).await.is_err() {
            return;
        }
    }
}
