//! Starting and stopping VMs truthfully: a command answers well only when the hypervisor itself says that the machine
//! is as it was asked to be. Each command is a record with its history, acts once, and ends right whoever dies.
//!
//! ```text
//! handlers ──> operations ──> machine   what to do next: pure
//!     │            │  └─────> record, store, view: the bucket
//!     ├────────> fleet ─────> driver::{libvirt, nova}
//!     └────────> events       what changed, told live
//! ```

pub mod client;
pub mod config;
mod driver;
mod error;
mod events;
mod fence;
mod fleet;
mod handlers;
mod machine;
mod operations;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use metrics_exporter_prometheus::PrometheusHandle;
use shared::{
    api::Service,
    bus::{
        Bus, clock,
        provision::setup::{self, SetupArguments},
    },
    health,
};
use tokio_util::sync::CancellationToken;

pub use error::LifecycleError;

use crate::{
    config::{LifecycleSettings, SetupSettings},
    events::{Events, Machines},
    fleet::Fleet,
    handlers::Lifecycle,
    operations::{OPERATION_BUCKET, Operations},
};

/// Makes or changes what this service owns on the bus, as the settings have it.
pub async fn set_up(settings: &SetupSettings, arguments: SetupArguments) -> Result<(), LifecycleError> {
    let wanted = [operations::bucket(&settings.operations).into()];
    Ok(setup::run(Service::Lifecycle, &settings.bus, &wanted, arguments).await?)
}

/// Serves until `shutdown`, then drains.
pub async fn run(
    settings: LifecycleSettings,
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
) -> Result<(), LifecycleError> {
    let bus = Bus::connect(Service::Lifecycle.name(), &settings.bus).await?;
    clock::watch(&bus, &format!("KV_{OPERATION_BUCKET}"), shutdown.clone());
    let fleet = Arc::new(Fleet::open(settings.hypervisors, settings.calls)?);
    fleet.watch(&shutdown);
    let serving = Arc::new(AtomicBool::new(false));
    let readiness = {
        let (bus, fleet, serving) = (bus.clone(), Arc::clone(&fleet), Arc::clone(&serving));
        Arc::new(move || {
            if !bus.is_connected() {
                Err("the bus is away")
            } else if !serving.load(Ordering::Relaxed) {
                Err("waiting for the bucket of records, the audit, and its subscriptions")
            } else if !fleet.reachable() {
                Err("no hypervisor answers")
            } else {
                Ok(())
            }
        })
    };
    health::start(settings.health, metrics, readiness, shutdown.clone()).await?;
    let (events, machines) = (Events::new(&bus), Arc::new(Machines::default()));
    let interval = settings.state_interval;
    machines.watch(Arc::clone(&fleet), events.clone(), interval, &shutdown);
    let opened = Operations::open(&bus, settings.operations, Arc::clone(&fleet), events, &shutdown);
    let Some(operations) = Box::pin(opened).await? else {
        return Ok(());
    };
    operations.watch(&shutdown);
    let lifecycle = Lifecycle {
        fleet,
        operations,
        machines,
    };
    lifecycle
        .server(&bus, settings.serve)
        .tells(serving)
        .run(shutdown)
        .await?;
    Ok(())
}
