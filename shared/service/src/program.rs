//! Runs a service: telemetry, signals, the health listener, and readiness.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    health,
    lifetime::shutdown_on_signal,
    telemetry::{Telemetry, TelemetryError, TelemetrySettings},
};

/// The program ended with an error.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError<E> {
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error("cannot handle signals")]
    Signals(#[source] std::io::Error),
    #[error(transparent)]
    Failed(E),
}

/// The common state of a running program.
#[derive(Debug)]
pub struct Program {
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
    serving: Arc<AtomicBool>,
}

/// Runs `serve` with telemetry until it returns; SIGTERM and SIGINT cancel [`Program::shutdown`]. Buffered spans are
/// sent at the end, even if `serve` failed.
pub async fn run<E, Done>(
    name: &'static str,
    telemetry: &TelemetrySettings,
    serve: impl FnOnce(Program) -> Done,
) -> Result<(), ProgramError<E>>
where
    Done: Future<Output = Result<(), E>>,
{
    let telemetry = Telemetry::start(name, telemetry)?;
    let outcome = match shutdown_on_signal() {
        Ok(shutdown) => {
            let program = Program {
                metrics: telemetry.metrics(),
                shutdown,
                serving: Arc::default(),
            };
            Box::pin(serve(program)).await.map_err(ProgramError::Failed)
        }
        Err(error) => Err(ProgramError::Signals(error)),
    };
    telemetry.finish();
    outcome
}

impl Program {
    /// The token that is cancelled when the program must stop.
    pub const fn shutdown(&self) -> &CancellationToken {
        &self.shutdown
    }

    /// Starts the health listener. The program is ready while `check` succeeds, but not before
    /// [`Program::set_serving`] was called; until then the reason is `waiting_for`.
    pub async fn start_health(
        &self,
        address: SocketAddr,
        waiting_for: &'static str,
        check: impl Fn() -> Result<(), &'static str> + Send + Sync + 'static,
    ) -> std::io::Result<()> {
        let serving = Arc::clone(&self.serving);
        let ready = move || {
            check()?;
            if serving.load(Ordering::Relaxed) {
                Ok(())
            } else {
                Err(waiting_for)
            }
        };
        health::start(
            address,
            self.metrics.clone(),
            Arc::new(ready),
            self.shutdown.clone(),
        )
        .await
    }

    /// Marks the program as serving. A program on the bus calls this once NATS has its subscriptions; earlier
    /// readiness would let a rolling update stop the old replica too soon.
    pub fn set_serving(&self) {
        self.serving.store(true, Ordering::Relaxed);
    }
}
