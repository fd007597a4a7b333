//! The agent: samples this VM and its processes, and hands the samples to the bus, keeping on disk what the bus
//! cannot take.
//!
//! Two loops with a short queue between them, so that neither waits for the other: [`sampling`] reads procfs at steady
//! intervals, [`ship`] publishes to JetStream and spools meanwhile. Whatever may hang on a disk runs on a thread of
//! its own and is waited for with a limit.

#![cfg_attr(
    test,
    expect(clippy::float_cmp, reason = "the figures compared are exact by construction")
)]

pub mod config;
mod disk;
mod parts;
mod publish;
mod retry;
pub mod sample;
mod sampling;
mod schedule;
mod seat;
mod select;
mod ship;
mod spool;
mod status;

use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusHandle;
use shared::{
    bus::{Bus, BusError},
    health,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use parts::{Part, split};
pub use seat::Lost;
pub use select::Selection;
pub use spool::SpoolError;

use crate::{
    config::AgentSettings,
    sample::{Roots, SampleError, Sampler},
    sampling::SampleLoop,
    ship::Shipper,
    spool::Spool,
    status::Status,
};

/// The threads that the runtime needs for what may block: both samplers, the spool, a name look-up, and as many
/// again in case each hangs once.
pub const BLOCKING_THREADS: usize = 8;
/// Samples between the loops. The second is away from its queue only while a call to the spool lasts, which is
/// bounded by 5 s.
const QUEUE: usize = 64;

/// The agent cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// See [`SpoolError`].
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// See [`BusError`].
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The boot time cannot be read.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The health listener cannot be opened.
    #[error("the health listener cannot be opened")]
    Health(#[from] std::io::Error),
    /// See [`Lost`].
    #[error(transparent)]
    Lost(#[from] Lost),
}

/// Samples and ships until shutdown; then sends what is left within the drain deadline and leaves the rest spooled.
pub async fn run(
    settings: AgentSettings,
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let id = settings.instance_id;
    let spool = Spool::open(&settings.spool, id.clone())?;
    let sampler = Sampler::new(
        id.clone(),
        settings.utc_offset,
        settings.selection,
        Roots::default(),
    )?;
    // Each agent is an identity of its own on the bus, with an inbox of its own.
    let bus = Bus::connect(&format!("vmwatch-agent-{id}"), &settings.bus).await?;
    let status = Arc::new(Status::default());
    let (of_bus, of_loops) = (bus.clone(), Arc::clone(&status));
    let ready = move || {
        of_loops.ready()?;
        if of_bus.is_connected() {
            Ok(())
        } else {
            Err("no connection to NATS: samples wait in the spool")
        }
    };
    health::start(settings.health, metrics, Arc::new(ready), shutdown.clone()).await?;
    let (taken, to_ship) = mpsc::channel(QUEUE);
    let shipper = Shipper::new(bus, &id, spool, Arc::clone(&status));
    let sampling = SampleLoop::new(id, sampler, settings.intervals, taken, status);
    // The end of sampling closes the queue, which ends shipping.
    let (outcome, ()) = tokio::join!(
        sampling.run(shutdown),
        shipper.run(to_ship, settings.drain_deadline)
    );
    Ok(outcome?)
}
