//! Starting and stopping a program: waiting for dependencies, and a cancellation token that SIGTERM or SIGINT cancels.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Returns a cancellation token that the first SIGTERM or SIGINT cancels.
pub fn shutdown_on_signal() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = CancellationToken::new();
    let cancelled = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => info!("SIGTERM: draining"),
            _ = interrupt.recv() => info!("SIGINT: draining"),
        }
        cancelled.cancel();
    });
    Ok(shutdown)
}

/// Retries an operation once per second until it succeeds; the program cannot start before that. Returns `None` at
/// shutdown.
pub async fn until_done<T, E, F>(
    what: &str,
    shutdown: &CancellationToken,
    attempt: impl Fn() -> F,
) -> Option<T>
where
    E: std::error::Error,
    F: Future<Output = Result<T, E>>,
{
    loop {
        match shutdown.run_until_cancelled(attempt()).await? {
            Ok(done) => return Some(done),
            Err(error) => warn!(cause = chain(&error), "waiting for {what}"),
        }
        shutdown
            .run_until_cancelled(tokio::time::sleep(Duration::from_secs(1)))
            .await?;
    }
}

/// Formats the error and its sources in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}
