//! Starts and stops VMs. An operation succeeds only when the hypervisor reports the VM in the wanted state. Each
//! operation has a record with its history, takes effect once, and ends correctly even if a replica, the bus or the
//! hypervisor fails meanwhile.
//!
//! ```text
//! handlers ──> operations ──> state_machine   decides the next step
//!     │            │  └─────> record, store, view: the KV bucket
//!     ├────────> fleet ─────> driver::{libvirt, nova}
//!     ├────────> inventory    the VMs of all hypervisors, polled by one replica each
//!     │            └─────> measures  of these VMs, as their hypervisors see them
//!     ├────────> labels       the labels that operators set: another KV bucket
//!     ├────────> removal      of VMs that no hypervisor has any more
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
mod inventory;
mod labels;
mod lease;
mod measures;
mod operations;
mod removal;
mod state_machine;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use vmwatch_api::Service;
use vmwatch_bus::{
    Bus,
    audit::Audit,
    clock,
    provision::setup::{self, SetupArguments},
};
use vmwatch_service::{lifetime::until_done, program::Program};

pub use error::LifecycleError;

use crate::{
    config::{LifecycleSettings, PollSettings, SetupSettings},
    events::Events,
    fleet::Fleet,
    handlers::Lifecycle,
    inventory::{Inventory, Polling},
    labels::Labels,
    operations::{OPERATION_BUCKET, Operations},
};

/// Creates or updates this service's streams and KV buckets on the bus, according to the settings.
pub async fn set_up(settings: &SetupSettings, arguments: SetupArguments) -> Result<(), LifecycleError> {
    let [vms, leases] = inventory::buckets(settings.operations.replicas);
    let wanted = [
        operations::bucket(&settings.operations).into(),
        vms.into(),
        leases.into(),
        labels::bucket(settings.operations.replicas).into(),
    ];
    Ok(setup::run(Service::Lifecycle, &settings.bus, &wanted, arguments).await?)
}

/// Runs the service until shutdown, then lets running requests finish.
pub async fn run(settings: LifecycleSettings, program: Program) -> Result<(), LifecycleError> {
    let shutdown = program.shutdown().clone();
    let bus = Bus::connect(Service::Lifecycle.name(), &settings.bus).await?;
    clock::watch(&bus, &format!("KV_{OPERATION_BUCKET}"), shutdown.clone());
    let inventory = Arc::new(Inventory::follow(&bus, &shutdown));
    let (calls, keep) = (settings.calls, settings.polling.last_hypervisor_keep);
    let fleet = Fleet::open(settings.hypervisors, calls, keep, Arc::clone(&inventory))?;
    let fleet = Arc::new(fleet);
    let waiting_for = "waiting for the KV buckets of operations, VMs and labels, the audit stream and the bus subscriptions";
    let (connected, reached) = (bus.clone(), Arc::clone(&fleet));
    let check = move || {
        connected.check()?;
        if reached.reachable() {
            Ok(())
        } else {
            Err("no hypervisor answers".into())
        }
    };
    program.start_health(settings.health, waiting_for, check).await?;
    let events = Events::new(&bus);
    let replicas = settings.operations.replicas;
    let ensured = until_done("the KV bucket of labels", &shutdown, || {
        labels::ensure_bucket(&bus, replicas)
    });
    let Some(()) = ensured.await else {
        return Ok(());
    };
    let audit = Audit::new(&bus, settings.operations.audit_required);
    let labels = Labels::new(&bus, audit.clone(), Arc::clone(&inventory));
    let starting = start_polling(&inventory, &fleet, &events, settings.polling, &shutdown);
    let Some(polling) = Box::pin(starting).await else {
        return Ok(());
    };
    let opened = Operations::open(&bus, settings.operations, Arc::clone(&fleet), events, &shutdown);
    let Some(operations) = Box::pin(opened).await? else {
        return Ok(());
    };
    operations.watch(&shutdown);
    let ending = Arc::clone(&operations);
    let lifecycle = Lifecycle {
        fleet,
        operations,
        inventory,
        labels,
        audit,
    };
    lifecycle
        .server(&bus, settings.serve)
        .run(shutdown, || program.set_serving())
        .await?;
    ending.finish().await;
    polling.ended().await;
    Ok(())
}

/// Starts polling the hypervisors, and waits until their VMs have been listed for the first time. Returns `None` at
/// shutdown.
async fn start_polling(
    inventory: &Arc<Inventory>,
    fleet: &Fleet,
    events: &Events,
    settings: PollSettings,
    shutdown: &CancellationToken,
) -> Option<Polling> {
    let ensured = until_done("the KV bucket of VMs", shutdown, || {
        inventory.ensure_buckets(settings.replicas)
    });
    Box::pin(ensured).await?;
    shutdown.run_until_cancelled(inventory.filled()).await?;
    let polling = Polling::start(inventory, fleet, events, settings, shutdown);
    let names = fleet.hypervisor_names();
    let configured: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
    let exporting = Arc::clone(inventory).export(configured.clone());
    tokio::spawn(shutdown.clone().run_until_cancelled_owned(exporting));
    let removing = inventory::remove_unconfigured(Arc::clone(inventory), configured);
    tokio::spawn(shutdown.clone().run_until_cancelled_owned(removing));
    shutdown
        .run_until_cancelled(inventory.first_lists(&names))
        .await?;
    Some(polling)
}
