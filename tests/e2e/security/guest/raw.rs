//! A NATS client that sends arbitrary protocol lines.

use std::{net::SocketAddr, time::Duration};

use testkit::PATIENCE;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpSocket,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

use super::filter::GUEST_ADDRESS;

/// A connection from the address of the guest.
pub(in crate::security) struct Raw {
    pub(super) reader: OwnedReadHalf,
    pub(super) writer: OwnedWriteHalf,
}

impl Raw {
    /// Connects to the NATS server with this URL, and does not log in.
    pub(in crate::security) async fn open(url: &str) -> Self {
        let address = url.strip_prefix("nats://").unwrap();
        let socket = TcpSocket::new_v4().unwrap();
        socket
            .bind(SocketAddr::new(GUEST_ADDRESS.parse().unwrap(), 0))
            .unwrap();
        let connected = socket.connect(address.parse().unwrap()).await.unwrap();
        let (reader, writer) = connected.into_split();
        Self { reader, writer }
    }

    /// Sends bytes. It is not an error if the server has closed the connection.
    pub(in crate::security) async fn send(&mut self, bytes: &[u8]) {
        let _ = timeout(PATIENCE, self.writer.write_all(bytes))
            .await
            .expect("the server reads the bytes in time");
    }

    /// Returns what the server sends until it has processed all input or closed the connection.
    pub(in crate::security) async fn settle(&mut self) -> String {
        self.send(b"PING\r\n").await;
        self.settle_until("PONG\r\n").await
    }

    /// Waits until the server has closed the connection.
    pub(in crate::security) async fn closed(&mut self) {
        let mut buffer = vec![0; 16 << 10];
        let reading = async { while !matches!(self.reader.read(&mut buffer).await, Ok(0) | Err(_)) {} };
        let closed = timeout(PATIENCE, reading).await;
        closed.expect("the server closes the connection");
    }

    /// Returns what the server sends until it contains this text or the connection is closed.
    pub(in crate::security) async fn settle_until(&mut self, end: &str) -> String {
        let mut output = Vec::new();
        let mut buffer = vec![0; 16 << 10];
        let reading = async {
            loop {
                match self.reader.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(bytes) => output.extend_from_slice(&buffer[..bytes]),
                }
                if String::from_utf8_lossy(&output).contains(end) {
                    break;
                }
            }
        };
        let _ = timeout(PATIENCE.min(Duration::from_secs(20)), reading).await;
        String::from_utf8_lossy(&output).into_owned()
    }
}

/// Builds a `PUB` command, or an `HPUB` command if there are headers.
pub(in crate::security) fn message(
    subject: &str,
    reply: Option<&str>,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Vec<u8> {
    let reply = reply.map(|reply| format!(" {reply}")).unwrap_or_default();
    let mut bytes = if headers.is_empty() {
        format!("PUB {subject}{reply} {}\r\n", body.len()).into_bytes()
    } else {
        let lines: Vec<_> = headers
            .iter()
            .map(|(name, value)| format!("{name}: {value}\r\n"))
            .collect();
        let head = format!("NATS/1.0\r\n{}\r\n", lines.concat());
        let (size, total) = (head.len(), head.len() + body.len());
        format!("HPUB {subject}{reply} {size} {total}\r\n{head}").into_bytes()
    };
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(b"\r\n");
    bytes
}
