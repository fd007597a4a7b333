//! The agent samples this VM and its processes and publishes the samples to JetStream. Samples that cannot be published
//! are spooled to disk.
//!
//! Two loops run independently, connected by a bounded queue: [`sampling`] reads procfs at fixed intervals, and
//! [`ship`] publishes to JetStream or spools to disk. Calls that may hang on a disk run on threads for blocking work
//! and have time limits.

#![cfg_attr(
    test,
    expect(
        clippy::float_cmp,
        reason = "the tests choose values that floating-point numbers represent exactly"
    )
)]

mod announce;
mod blocking_worker;
pub mod config;
mod disk;
mod dropped;
pub mod enrol;
mod parts;
mod pieces;
mod publish;
mod retry;
pub mod sample;
mod sampling;
mod schedule;
mod select;
mod share;
mod ship;
mod spool;
mod status;

use std::{
    borrow::Cow,
    sync::{Arc, OnceLock},
};

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use vmwatch_blocks::Encoder;
use vmwatch_bus::{Bus, BusError};
use vmwatch_service::program::Program;

pub use blocking_worker::WorkerPanicked;
pub use parts::{Part, split};
pub use select::Selection;
pub use spool::SpoolError;

use crate::{
    config::AgentSettings,
    enrol::{Connection, StartError},
    publish::Origin,
    sample::{Roots, SampleError, Sampler},
    sampling::SampleLoop,
    ship::Shipper,
    spool::{Spool, SpoolLock},
    status::Status,
};

/// Maximum number of threads for blocking work: one each for the three samplers, the spool and DNS lookups, and a second
/// one for each of them in case the first hangs.
pub const BLOCKING_THREADS: usize = 10;
/// Capacity of the queue between the two loops, in samples. The shipping loop stops reading the queue only during a
/// call to the spool, which takes at most 5 s.
const QUEUE: usize = 64;

/// An error that ends the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The spool folder cannot be opened.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The identity cannot be used.
    #[error(transparent)]
    Start(#[from] StartError),
    /// NATS is misconfigured.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The time of the last boot cannot be read from the kernel.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// There is not enough memory to compress samples.
    #[error("memory for the compression of samples could not be allocated")]
    Encoder(#[source] std::io::Error),
    /// The operating system provides no random numbers.
    #[error("the operating system provided no random numbers")]
    Random(#[source] getrandom::Error),
    /// The health listener cannot listen on its address.
    #[error("the health listener could not be started")]
    Health(#[from] std::io::Error),
    /// A sampler panicked.
    #[error(transparent)]
    WorkerPanicked(#[from] WorkerPanicked),
}

impl AgentError {
    /// Whether only a change of a setting helps, so that a restart is useless.
    pub const fn is_invalid_setting(&self) -> bool {
        matches!(self, Self::Start(StartError::Settings(_)))
    }
}

/// Samples and publishes until shutdown. Then publishes what is queued until the drain deadline; what remains stays in
/// the spool. An agent without a login to NATS first waits for its enrolment.
pub async fn run(settings: AgentSettings, program: Program) -> Result<(), AgentError> {
    let status = Arc::new(Status::default());
    let lock = SpoolLock::take(&settings.spool.dir)?;
    let connected = Arc::new(OnceLock::new());
    let (ready_bus, ready_status) = (Arc::clone(&connected), Arc::clone(&status));
    let ready = move || check(ready_bus.get(), &ready_status);
    let waiting_for = "sampling has not started yet";
    program.start_health(settings.health, waiting_for, ready).await?;
    let roots = Roots::default();
    let (spool_dir, shutdown) = (&settings.spool.dir, program.shutdown());
    let connecting = enrol::connection(settings.login, spool_dir, &roots, &status, shutdown);
    let Some(Connection {
        bus,
        instance_id: id,
        timing,
    }) = connecting.await?
    else {
        return Ok(());
    };
    let spool = Spool::open(&settings.spool, id.clone(), lock)?;
    let encoder = Encoder::new().map_err(AgentError::Encoder)?;
    let mut sampler = Sampler::new(id.clone(), timing.utc_offset, settings.selection, roots.clone())?
        .with_exit_records(settings.short_lived_rows);
    if settings.command_lines {
        sampler = sampler.with_command_lines();
    }
    // Each agent has its own client name in NATS.
    let bus = Bus::connect(&format!("vmwatch-agent-{id}"), &bus).await?;
    connected.get_or_init(|| bus.clone());
    let _announcing = AbortOnDropHandle::new(tokio::spawn(announce::run(bus.clone(), id.clone(), roots)));
    let (sender, receiver) = mpsc::channel(QUEUE);
    let origin = Origin::new(timing.utc_offset)?;
    let shipper = Shipper::new(bus, &id, origin, spool, encoder, Arc::clone(&status));
    let sampling = SampleLoop::new(id, sampler, timing.intervals, sender, status);
    program.set_serving();
    // When the sampling loop ends, it drops the queue's sender. This closes the queue and so ends the shipping loop.
    let (outcome, ()) = tokio::join!(
        sampling.run(program.shutdown().clone()),
        shipper.run(receiver, settings.drain_deadline)
    );
    Ok(outcome?)
}

/// Whether the agent is ready, or why not. There is no bus before the agent is enrolled.
fn check(bus: Option<&Bus>, status: &Status) -> Result<(), Cow<'static, str>> {
    match bus {
        Some(bus) if bus.is_login_refused() => Err(
            "NATS refuses the login of this agent, because its key was revoked or the service that checks it (auth-svc) does not \
             answer; trying again; samples wait in the spool"
                .into(),
        ),
        Some(bus) if !bus.is_connected() => {
            status.ready()?;
            Err("no connection to NATS; samples wait in the spool".into())
        }
        _ => status.ready(),
    }
}
