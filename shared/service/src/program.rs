//! The one way to start and end a program that serves: telemetry, signals, the health listener, and readiness.

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

/// A program ended with an error.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError<E> {
    /// Telemetry could not be set up.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The handlers of SIGTERM and SIGINT could not be installed.
    #[error("cannot handle signals")]
    Signals(#[source] std::io::Error),
    /// The program itself failed.
    #[error(transparent)]
    Failed(E),
}

/// What a program has in common with all others while it serves.
#[derive(Debug)]
pub struct Program {
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
    serving: Arc<AtomicBool>,
}

/// Runs `serve` with telemetry until it returns; SIGTERM and SIGINT cancel [`Program::shutdown`]. Spans that are still
/// buffered are sent at the end, also when it failed.
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
    /// Cancelled when the program must end.
    pub const fn shutdown(&self) -> &CancellationToken {
        &self.shutdown
    }

    /// Starts the health listener. The program is ready while `check` succeeds, once [`Program::set_serving`] was called;
    /// until then its reason is `waiting_for`.
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

    /// Notes that requests reach the program. A program on the bus calls this when NATS has its subscriptions: before that,
    /// a rolling update would stop an old replica too early.
    pub fn set_serving(&self) {
        self.serving.store(true, Ordering::Relaxed);
    }
}
