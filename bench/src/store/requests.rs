//! Requests through the gateway, one after the other.

use std::time::Instant;

use anyhow::ensure;
use testkit::Stack;

use crate::{gateway::address, load::Connection, statistics::Series};

/// Sends requests one after the other, and returns how long they took in milliseconds. Each answer must contain the
/// expected text.
pub(super) async fn timed(stack: &Stack, requests: &[Vec<u8>], expected: &[u8]) -> anyhow::Result<Series> {
    let mut connection = Connection::open(address(stack)?).await?;
    let mut took = Vec::new();
    for request in requests {
        let started = Instant::now();
        let body = connection.send(request).await?;
        took.push(started.elapsed().as_secs_f64() * 1e3);
        let found = body.windows(expected.len()).any(|window| window == expected);
        let text = String::from_utf8_lossy(body.get(..500).unwrap_or(body));
        ensure!(
            found,
            "the answer lacks {}: {text}",
            String::from_utf8_lossy(expected)
        );
    }
    Ok(took.into_iter().collect())
}
