//! Runs a program: sets up telemetry, signals, the health listener and readiness.

use std::{
    borrow::Cow,
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

/// Why a program ended with an error.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError<E> {
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error("cannot handle signals")]
    Signals(#[source] std::io::Error),
    #[error(transparent)]
    Failed(E),
}

/// The state that the parts of a running program share.
#[derive(Debug)]
pub struct Program {
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
    serving: Arc<AtomicBool>,
}

/// Runs `serve` with telemetry until it returns. SIGTERM and SIGINT cancel [`Program::shutdown`]. Buffered trace spans
/// are sent at the end, even if `serve` failed.
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
    /// The cancellation token that is cancelled when the program must stop.
    pub const fn shutdown(&self) -> &CancellationToken {
        &self.shutdown
    }

    /// Starts the health listener. The program is ready if `check` succeeds and [`Program::set_serving`] was called. If
    /// only that call is missing, `waiting_for` is the reported reason.
    pub async fn start_health(
        &self,
        address: SocketAddr,
        waiting_for: &'static str,
        check: impl Fn() -> Result<(), Cow<'static, str>> + Send + Sync + 'static,
    ) -> std::io::Result<()> {
        let serving = Arc::clone(&self.serving);
        let ready = move || {
            check()?;
            if serving.load(Ordering::Relaxed) {
                Ok(())
            } else {
                Err(waiting_for.into())
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

    /// Marks the program as serving. A service calls this once NATS delivers requests to it. If the service became
    /// ready earlier, a rolling update could stop the old replica before the new replica receives requests.
    pub fn set_serving(&self) {
        self.serving.store(true, Ordering::Relaxed);
    }
}
