//! Rows of VMs and processes in MongoDB.
//!
//! Two halves that share the store and nothing else: [`ingest`] moves samples from JetStream into it, and the handlers
//! answer the newest rows. Every replica does both; JetStream shares the samples out, the queue group the requests.

pub mod commands;
pub mod config;
pub mod documents;
mod error;
mod handlers;
pub mod ingest;
mod retention;
pub mod row_json;
pub mod store;
pub mod streams;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use metrics_exporter_prometheus::PrometheusHandle;
use shared::{
    api::Service,
    bus::{Bus, serve::Server},
    health,
    lifetime::until_done,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use error::MetricsError;

use crate::{config::MetricsSettings, ingest::Ingest, store::RowStore};

/// Serves until `shutdown`, then drains.
pub async fn run(
    settings: MetricsSettings,
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
) -> Result<(), MetricsError> {
    let bus = Bus::connect(Service::Metrics.name(), &settings.bus).await?;
    let serving = Arc::new(AtomicBool::new(false));
    let readiness = {
        let (bus, serving) = (bus.clone(), Arc::clone(&serving));
        Arc::new(
            move || match (bus.is_connected(), serving.load(Ordering::Relaxed)) {
                (false, _) => Err("the bus is away"),
                (true, false) => Err("waiting for the database and the sample stream"),
                (true, true) => Ok(()),
            },
        )
    };
    health::start(settings.health, metrics, readiness, shutdown.clone()).await?;

    let store = Arc::new(RowStore::open(&settings.store, &settings.rows).await?);
    let prepared = until_done("the database", &shutdown, || store.prepare(&settings.retention)).await;
    let Some(()) = prepared else { return Ok(()) };
    let Some(consumer) = until_done("JetStream", &shutdown, || {
        streams::prepare(bus.jetstream(), &settings.stream)
    })
    .await
    else {
        return Ok(());
    };
    let ingest = Ingest::new(&bus, Arc::clone(&store), consumer, &settings);
    let ingesting = tokio::spawn(ingest.run(shutdown.clone()));

    let server = Server::new(&bus, Service::Metrics, settings.serve);
    let server = handlers::register(server, &store);
    serving.store(true, Ordering::Relaxed);
    server.run(shutdown).await?;
    if let Err(error) = ingesting.await {
        warn!(%error, "ingestion ended by a defect");
    }
    Ok(())
}
