//! Evaluates alert rules on stored samples, finds what explains an alert, and notifies recipients.
//!
//! ```text
//! handlers ──> store: rules, silences, channels, alerts, messages
//!                │ definitions: a copy of the first three, in every replica
//! VMWATCH_EVALUATION ──> engine ──> alerts ──> culprits ──> notify ──> receivers
//!                          └ only in the replica that holds the lease
//! ```

pub mod config;
mod culprits;
mod definitions;
mod engine;
mod error;
mod events;
mod handlers;
mod indexes;
mod known_vms;
mod leader;
mod lease;
mod notify;
mod rekey;
mod retention;
mod seal;
mod starter;
mod store;

use std::sync::Arc;

use async_nats::jetstream::stream::Config;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::Service;
use vmwatch_bus::{
    Bus,
    audit::{Audit, Refusals},
    clock,
    provision::{
        ProvisionError, Wanted, ensure_stream,
        setup::{self, SetupArguments},
    },
};
use vmwatch_service::{lifetime::until_done, program::Program};

pub use error::AlertError;
pub use rekey::Rekeyed;
pub use seal::SealError;

use crate::{
    config::AlertSettings, engine::Setup, events::Events, handlers::Handlers, known_vms::KnownVms,
    lease::Leases, notify::Delivery, store::Store,
};

/// Creates or updates this service's KV buckets on the bus, according to the settings.
pub async fn set_up(settings: &AlertSettings, arguments: SetupArguments) -> Result<(), AlertError> {
    let wanted: [Wanted; 2] = buckets(settings.replicas).map(Wanted::from);
    Ok(setup::run(Service::Alert, &settings.bus, &wanted, arguments).await?)
}

/// The configurations of the KV buckets, with this number of replicas in a NATS cluster.
fn buckets(replicas: usize) -> [Config; 2] {
    [lease::bucket(replicas), engine::watched::bucket(replicas)]
}

/// Seals the secrets of all channels with the first key of the key file.
pub async fn rekey(settings: &AlertSettings) -> Result<Rekeyed, AlertError> {
    let database = settings.store.open_durable(Service::Alert.name()).await?;
    let rekeyed = rekey::run(&Store::new(&database), &settings.notify.keys).await;
    vmwatch_store::close(&database).await;
    rekeyed
}

/// Runs the service until shutdown, then lets running requests finish.
pub async fn run(settings: AlertSettings, program: Program) -> Result<(), AlertError> {
    let name = Service::Alert.name();
    let bus = Bus::connect(name, &settings.bus).await?;
    clock::watch(
        &bus,
        &format!("KV_{}", lease::LEASE_BUCKET),
        program.shutdown().clone(),
    );
    let connected = bus.clone();
    let waiting_for = "waiting for the database, the KV buckets and the NATS subscriptions";
    program
        .start_health(settings.health, waiting_for, move || connected.check())
        .await?;
    let database = settings.store.open_durable(name).await?;
    let store = Store::new(&database);
    let served = serve(&settings, &bus, &store, &program, program.shutdown().clone()).await;
    vmwatch_store::close(&database).await;
    served
}

async fn serve(
    settings: &AlertSettings,
    bus: &Bus,
    store: &Store,
    program: &Program,
    shutdown: CancellationToken,
) -> Result<(), AlertError> {
    let prepared = until_done("the database", &shutdown, async || {
        indexes::prepare(store).await?;
        starter::create(store).await
    });
    let Some(()) = prepared.await else { return Ok(()) };
    let prepared = until_done("the KV buckets", &shutdown, async || {
        for bucket in buckets(settings.replicas) {
            ensure_stream(bus, Service::Alert, &bucket).await?;
        }
        Ok::<_, ProvisionError>(())
    });
    let Some(()) = prepared.await else { return Ok(()) };
    let definitions = definitions::follow(store.clone(), shutdown.clone());
    let retention = retention::follow(store.clone(), settings.retention, shutdown.clone());
    let retention = tokio::spawn(retention);
    if shutdown.run_until_cancelled(definitions.filled()).await.is_none() {
        return Ok(());
    }
    let addresses = notify::addresses(settings).await?;
    let (watched, until) = (Arc::clone(&addresses), shutdown.clone());
    tokio::spawn(async move { until.run_until_cancelled(watched.watch()).await });
    let changed = Arc::new(Notify::new());
    let delivery = Delivery::new(&settings.notify, Arc::clone(&addresses))?;
    let setup = Setup {
        bus: bus.clone(),
        store: store.clone(),
        definitions: definitions.clone(),
        known: KnownVms::follow(bus, &shutdown),
        events: Events::new(bus),
        changed: Arc::clone(&changed),
        delivery: Arc::new(delivery),
    };
    let leases = Leases::new(bus, settings.lease);
    let leading = tokio::spawn(leader::follow(setup, leases, shutdown.clone()));
    let audit = Audit::new(bus, settings.audit_required);
    let handlers = Arc::new(Handlers {
        bus: bus.clone(),
        store: store.clone(),
        definitions,
        events: Events::new(bus),
        keys: Arc::clone(&settings.notify.keys),
        addresses,
        changed,
        refusals: Refusals::new(audit.clone(), Service::Alert),
        audit,
    });
    let (counting, until) = (Arc::clone(&handlers), shutdown.clone());
    tokio::spawn(async move { counting.refusals.run(until).await });
    let server = handlers.server(settings.serve);
    server.run(shutdown, || program.set_serving()).await?;
    handlers.refusals.finish().await;
    for task in [leading, retention] {
        if let Err(error) = task.await {
            warn!(%error, "a background task of alert-svc panicked");
        }
    }
    Ok(())
}
