//! A minimal HTTP client over a plain connection, for input that no HTTP library would send.

use std::time::Duration;

use testkit::{Gateway, PATIENCE};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Opens a connection to the gateway.
pub(super) async fn connect(gateway: &Gateway) -> TcpStream {
    TcpStream::connect(address(gateway))
        .await
        .expect("the gateway listens")
}

/// Returns `HOST:PORT` of the gateway.
pub(super) fn address(gateway: &Gateway) -> String {
    gateway.url("").replace("http://", "")
}

/// Reads until the other side closes the connection; a reset counts as the end.
pub(super) async fn to_end(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await;
    drop(read.expect("the gateway closes the connection"));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Sends the head of a request and then one byte every 100 ms until the gateway closes the connection. Returns
/// everything that the gateway sent.
pub(super) async fn drip(gateway: &Gateway, head: &str, byte: &str) -> String {
    let mut stream = connect(gateway).await;
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut reading, mut writing) = stream.split();
    let dripping = async {
        while writing.write_all(byte.as_bytes()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // The gateway has closed the connection; what it sent can still be read.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        said = to_end(&mut reading) => said,
        () = dripping => unreachable!("the sender never ends"),
    }
}

/// Builds a POST request with this body. The gateway closes the connection after its answer.
pub(super) fn post(path: &str, headers: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}
