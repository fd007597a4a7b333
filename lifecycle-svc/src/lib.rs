//! Starts and stops VMs. An operation succeeds only when the hypervisor reports the VM in the wanted state. Each
//! operation has a record with its history, takes effect once, and ends correctly even if a replica, the bus or the
//! hypervisor fails meanwhile.
//!
//! ```text
//! handlers ──> operations ──> state_machine   decides the next step
//!     │            │  └─────> record, store, view: the KV bucket
//!     ├────────> fleet ─────> driver::{libvirt, nova}
//!     └────────> events       publishes changes
//! ```

pub mod client;
pub mod config;
mod driver;
mod error;
mod events;
mod fence;
mod fleet;
mod handlers;
mod operations;
mod state_machine;

use std::sync::Arc;

use vmwatch_api::Service;
use vmwatch_bus::{
    Bus, clock,
    provision::setup::{self, SetupArguments},
};
use vmwatch_service::program::Program;

pub use error::LifecycleError;

use crate::{
    config::{LifecycleSettings, SetupSettings},
    events::{Events, ObservedVms},
    fleet::Fleet,
    handlers::Lifecycle,
    operations::{OPERATION_BUCKET, Operations},
};

/// Creates or updates this service's streams and KV buckets on the bus, according to the settings.
pub async fn set_up(settings: &SetupSettings, arguments: SetupArguments) -> Result<(), LifecycleError> {
    let wanted = [operations::bucket(&settings.operations).into()];
    Ok(setup::run(Service::Lifecycle, &settings.bus, &wanted, arguments).await?)
}

/// Runs the service until shutdown, then lets running requests finish.
pub async fn run(settings: LifecycleSettings, program: Program) -> Result<(), LifecycleError> {
    let shutdown = program.shutdown().clone();
    let bus = Bus::connect(Service::Lifecycle.name(), &settings.bus).await?;
    clock::watch(&bus, &format!("KV_{OPERATION_BUCKET}"), shutdown.clone());
    let fleet = Arc::new(Fleet::open(settings.hypervisors, settings.calls)?);
    fleet.watch(&shutdown);
    let waiting_for = "waiting for the KV bucket of operations, the audit stream and the bus subscriptions";
    let (connected, reached) = (bus.clone(), Arc::clone(&fleet));
    let check = move || {
        connected.check_connected()?;
        if reached.reachable() {
            Ok(())
        } else {
            Err("no hypervisor answers")
        }
    };
    program.start_health(settings.health, waiting_for, check).await?;
    let (events, vms) = (Events::new(&bus), Arc::new(ObservedVms::default()));
    let interval = settings.state_interval;
    vms.watch(Arc::clone(&fleet), events.clone(), interval, &shutdown);
    let opened = Operations::open(&bus, settings.operations, Arc::clone(&fleet), events, &shutdown);
    let Some(operations) = Box::pin(opened).await? else {
        return Ok(());
    };
    operations.watch(&shutdown);
    let ending = Arc::clone(&operations);
    let lifecycle = Lifecycle {
        fleet,
        operations,
        vms,
    };
    lifecycle
        .server(&bus, settings.serve)
        .run(shutdown, || program.set_serving())
        .await?;
    ending.finish().await;
    Ok(())
}
