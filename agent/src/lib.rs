//! Samples this VM and its processes and publishes the samples to JetStream, spooling to disk what cannot be
//! published.
//!
//! Two loops run independently, connected by a bounded queue: [`sampling`] reads procfs at fixed intervals, [`ship`]
//! publishes to JetStream and spools while it cannot. Calls that may hang on a disk run on blocking threads and have
//! time limits.

#![cfg_attr(
    test,
    expect(clippy::float_cmp, reason = "the compared values are exact by construction")
)]

mod blocking_worker;
pub mod config;
mod disk;
mod dropped;
mod parts;
mod publish;
mod retry;
pub mod sample;
mod sampling;
mod schedule;
mod select;
mod ship;
mod spool;
mod status;

use std::sync::Arc;

use tokio::sync::mpsc;
use vmwatch_bus::{Bus, BusError};
use vmwatch_service::program::Program;

pub use blocking_worker::WorkerPanicked;
pub use parts::{Part, split};
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

/// Limit of blocking threads: one each for the two samplers, the spool and a DNS lookup, doubled in case each hangs
/// once.
pub const BLOCKING_THREADS: usize = 8;
/// Capacity of the queue between the loops, in samples. The shipping loop stops reading the queue only during a spool
/// call, which takes at most 5 s.
const QUEUE: usize = 64;

/// An error that ends the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The spool cannot be opened.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The NATS connection cannot be set up.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The boot time cannot be read.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The health listener cannot be opened.
    #[error("the health listener cannot be opened")]
    Health(#[from] std::io::Error),
    /// A sampler panicked.
    #[error(transparent)]
    WorkerPanicked(#[from] WorkerPanicked),
}

/// Samples and publishes until shutdown. Then publishes what is queued until the drain deadline and leaves the rest
/// in the spool.
pub async fn run(settings: AgentSettings, program: Program) -> Result<(), AgentError> {
    let id = settings.instance_id;
    let spool = Spool::open(&settings.spool, id.clone())?;
    let sampler = Sampler::new(
        id.clone(),
        settings.utc_offset,
        settings.selection,
        Roots::default(),
    )?;
    // Each agent connects under its own name.
    let bus = Bus::connect(&format!("vmwatch-agent-{id}"), &settings.bus).await?;
    let status = Arc::new(Status::default());
    let (ready_bus, ready_status) = (bus.clone(), Arc::clone(&status));
    let ready = move || {
        ready_status.ready()?;
        if ready_bus.is_connected() {
            Ok(())
        } else {
            Err("no connection to NATS; samples wait in the spool")
        }
    };
    let waiting_for = "waiting for the start of sampling";
    program.start_health(settings.health, waiting_for, ready).await?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let shipper = Shipper::new(bus, &id, spool, Arc::clone(&status));
    let sampling = SampleLoop::new(id, sampler, settings.intervals, sender, status);
    program.set_serving();
    // When sampling ends, the queue closes, which ends shipping.
    let (outcome, ()) = tokio::join!(
        sampling.run(program.shutdown().clone()),
        shipper.run(receiver, settings.drain_deadline)
    );
    Ok(outcome?)
}
