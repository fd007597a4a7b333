//! A minimal HTTP/1.1 client for load tests. It never retries and never follows redirects. It uses little CPU time,
//! because it runs on the same machine as the measured programs.

use std::io;

use serde_json::Value;
use testkit::Gateway;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A connection to a gateway.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: TcpStream,
    read: Vec<u8>,
}

/// A gateway's answer.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) http: u16,
    /// The status line and headers, in lower case.
    pub(super) head: String,
    pub(super) body: String,
}

impl Answered {
    /// Returns whether the gateway announces that it closes the connection after this answer.
    pub(super) fn is_last(&self) -> bool {
        self.head.contains("\r\nconnection: close\r\n")
    }

    /// Returns the `status_code` of the answer's envelope, or 0 if there is none.
    pub(super) fn status(&self) -> u64 {
        let envelope = serde_json::from_str::<Value>(&self.body).unwrap_or_default();
        envelope["status_code"].as_u64().unwrap_or_default()
    }
}

/// Returns `HOST:PORT` of the gateway.
pub(super) fn address(gateway: &Gateway) -> String {
    gateway.url("").replace("http://", "")
}

/// Builds a complete HTTP request of the documented API from its body.
pub(super) fn post(body: &str) -> Vec<u8> {
    format!(
        "POST /wsgi_app.py HTTP/1.1\r\nHost: vmwatch\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Builds a complete request of the REST API.
pub(super) fn get(path: &str, session: &str) -> Vec<u8> {
    format!("GET /api/v1{path} HTTP/1.1\r\nHost: vmwatch\r\nAuthorization: Bearer {session}\r\n\r\n")
        .into_bytes()
}

impl Connection {
    pub(super) async fn open(address: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let read = Vec::new();
        Ok(Self { stream, read })
    }

    /// Sends a request and reads its answer.
    pub(super) async fn ask(&mut self, request: &[u8]) -> io::Result<Answered> {
        self.stream.write_all(request).await?;
        self.answer().await
    }

    /// Reads the next answer. Every answer of the gateway states its length.
    pub(super) async fn answer(&mut self) -> io::Result<Answered> {
        let head_end = self
            .read_until(|read| find(read, b"\r\n\r\n").map(|at| at + 4))
            .await?;
        let head = String::from_utf8_lossy(&self.read[..head_end]).to_lowercase();
        let number = |text: Option<&str>| text.and_then(|text| text.trim().parse::<usize>().ok());
        let http = number(head.get(9..12)).ok_or_else(|| io::Error::other(head.clone()))?;
        let length = head
            .split("content-length:")
            .nth(1)
            .and_then(|rest| rest.lines().next());
        let end = head_end + number(length).ok_or_else(|| io::Error::other(head.clone()))?;
        self.read_until(|read| (read.len() >= end).then_some(end)).await?;
        let body = String::from_utf8_lossy(&self.read[head_end..end]).into_owned();
        self.read.drain(..end);
        let http = u16::try_from(http).unwrap_or_default();
        Ok(Answered { http, head, body })
    }

    async fn read_until(&mut self, whole: impl Fn(&[u8]) -> Option<usize>) -> io::Result<usize> {
        loop {
            if let Some(end) = whole(&self.read) {
                return Ok(end);
            }
            if self.stream.read_buf(&mut self.read).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}
