//! Stores samples of VMs and processes as rows in MongoDB, and answers queries for them.
//!
//! Its three parts share only the database: [`ingest`] moves samples from JetStream into it, [`history`] maintains the
//! rollups and the newest row of each VM, and the handlers answer queries. Every replica does all three. JetStream
//! distributes the samples among the replicas, and a NATS queue group distributes the requests.

mod agent_status;
mod blocks;
pub mod commands;
mod compaction;
pub mod config;
mod database;
pub mod deadline;
mod disk;
pub mod documents;
mod error;
mod evaluation;
mod events;
mod filesystems;
mod full_shares;
mod gauges;
mod greatest;
mod handlers;
mod history;
pub mod ingest;
mod instances;
mod known_vms;
mod names;
mod newest;
mod processes;
pub mod reads;
mod removal;
mod retention;
pub mod row_cache;
pub mod row_json;
mod row_kind;
mod row_retention;
mod status;
pub mod store;
pub mod streams;
mod time_buckets;
mod unqueued;
mod vm_row;
mod vms;

use std::{pin::pin, sync::Arc, time::Duration};

use async_nats::jetstream::consumer::PullConsumer;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::{Service, metrics::SAMPLE_STREAM, removal::HistoryRemove};
use vmwatch_bus::{
    Bus, BusError,
    audit::Audit,
    clock,
    serve::{Server, bind},
};
use vmwatch_service::{lifetime::until_done, program::Program};

pub use error::MetricsError;

use crate::{
    agent_status::AgentStatuses,
    compaction::Compaction,
    config::MetricsSettings,
    evaluation::Evaluations,
    events::Events,
    greatest::GreatestProcesses,
    history::Histories,
    ingest::{Ingest, suspects::Suspects},
    known_vms::KnownVms,
    newest::NewestRows,
    processes::Processes,
    removal::Removal,
    row_cache::RowCache,
    row_retention::RowRetention,
    status::StatusReader,
    store::RowStore,
    vms::VmList,
};

/// How long a starting replica waits for the VMs of hypervisors and the labels.
const FIRST_READ: Duration = Duration::from_millis(500);

/// Runs the service until shutdown, then lets running requests finish.
pub async fn run(settings: MetricsSettings, program: Program) -> Result<(), MetricsError> {
    let bus = Bus::connect(Service::Metrics.name(), &settings.bus).await?;
    clock::watch(&bus, SAMPLE_STREAM, program.shutdown().clone());
    let waiting_for = "waiting for the database, the stream of samples and the bus subscriptions";
    let connected = bus.clone();
    let check = move || connected.check();
    program.start_health(settings.health, waiting_for, check).await?;

    let store = RowStore::open(&settings.store, &settings.rows).await?;
    let store = Arc::new(store.with_longest_read(settings.compaction.longest_read()));
    let served = Box::pin(serve(&settings, &bus, &store, &program)).await;
    store.close().await;
    served
}

async fn serve(
    settings: &MetricsSettings,
    bus: &Bus,
    store: &Arc<RowStore>,
    program: &Program,
) -> Result<(), MetricsError> {
    let shutdown = program.shutdown().clone();
    let known_vms = KnownVms::follow(bus, &shutdown);
    let retention = RowRetention::new(settings, Some(known_vms.clone()));
    let histories = Histories::new(store, &Arc::new(retention), settings.rollups);
    let processes = Arc::new(Processes::of(store));
    let rows = Arc::new(RowCache::new(store, settings.newest_kept));
    let greatest = Arc::new(GreatestProcesses::new(settings.process_series));
    let newest = Arc::new(NewestRows::new(store, &greatest, settings.rollups.interval));
    let statuses = Arc::new(AgentStatuses::new(bus, &shutdown));
    let evaluations = Arc::new(Evaluations::new(bus, &settings.stream, &shutdown));
    let vms = Arc::new(VmList::new(
        &known_vms,
        &newest,
        &greatest,
        &statuses.table,
        settings.silent_after,
        settings.rows.offset,
    ));
    let status = Arc::new(StatusReader::new(bus, store, &vms));
    let Some(consumer) = prepare(settings, bus, store, &histories, &shutdown).await else {
        return Ok(());
    };
    evaluations.prepare().await;
    let (events, publishing) = Events::start(bus.clone(), settings.events, Arc::clone(&newest));
    let removal = Arc::new(Removal {
        rows: Arc::clone(store),
        histories: histories.clone(),
        newest: Arc::clone(&newest),
        statuses: Arc::clone(&statuses),
        audit: Audit::new(bus, settings.audit_required),
        events: events.clone(),
    });
    if !settings.retention_rules.is_empty() && !known_vms.filled(FIRST_READ).await {
        warn!(
            "the labels of VMs have not been read yet; until then the longest retention applies to all rows"
        );
    }
    let full_shares = full_shares::follow(bus.clone(), events.clone(), shutdown.clone());
    let keeping_stream = Arc::clone(&evaluations).keep_stream(shutdown.clone());
    let sinks = ingest::Sinks {
        store: Arc::clone(store),
        histories: histories.clone(),
        events,
        evaluations,
    };
    let ingest = Ingest::new(bus, sinks, consumer, settings);
    let ingesting = tokio::spawn(ingest.run(shutdown.clone()));
    let work = [
        tokio::spawn(Arc::clone(&histories.agent).follow(settings.rollups.interval, shutdown.clone())),
        tokio::spawn(Arc::clone(&histories.hypervisor).follow(settings.rollups.interval, shutdown.clone())),
        tokio::spawn(Arc::clone(&histories.agent).rebuild_once(shutdown.clone())),
        tokio::spawn(removal::follow(
            Arc::clone(store),
            histories.clone(),
            settings.rollups.interval,
            shutdown.clone(),
        )),
        tokio::spawn(unqueued::follow(
            Arc::clone(store),
            histories.clone(),
            shutdown.clone(),
        )),
        tokio::spawn(gauges::follow(
            Arc::clone(&status.disk),
            Arc::clone(&vms),
            shutdown.clone(),
        )),
        tokio::spawn(full_shares),
        tokio::spawn(keeping_stream),
        publishing,
        tokio::spawn(statuses.receive(shutdown.clone())),
        tokio::spawn(Arc::clone(&newest).follow(bus.clone(), shutdown.clone())),
        tokio::spawn(Arc::clone(&newest).compare(shutdown.clone())),
        tokio::spawn(Arc::new(Compaction::new(store, settings.compaction, shutdown.clone())).follow()),
    ];
    tokio::join!(newest.pass(), known_vms.filled(FIRST_READ));

    let server = Server::new(bus, Service::Metrics, settings.serve);
    let server = handlers::register(server, store, &rows, &histories, &processes, &vms, &status);
    let server = server.method(HistoryRemove, bind(&removal, Removal::remove));
    // The task that publishes live events ends when all its senders are dropped, so only the server may hold this one.
    drop(removal);
    let answering = server.run(shutdown.clone(), || program.set_serving());
    serve_while_ingesting(answering, ingesting, &shutdown).await?;
    for part in work {
        if let Err(error) = part.await {
            warn!(%error, "a background task of metrics-svc panicked");
        }
    }
    Ok(())
}

/// Waits until the collections, indexes and streams exist. Returns the consumer of samples; `None` at shutdown.
async fn prepare(
    settings: &MetricsSettings,
    bus: &Bus,
    store: &Arc<RowStore>,
    histories: &Histories,
    shutdown: &CancellationToken,
) -> Option<PullConsumer> {
    until_done("the database", shutdown, async || {
        store.prepare(&settings.retention).await?;
        histories.prepare().await?;
        Suspects::new(store).prepare(store).await
    })
    .await?;
    until_done("JetStream", shutdown, async || {
        events::prepare(bus, &settings.events).await?;
        agent_status::prepare(bus, &settings.stream).await?;
        streams::prepare(bus, &settings.stream).await
    })
    .await
}

/// Serves until shutdown. If storing samples fails, ends the process so that it is restarted. Otherwise this replica
/// would stay ready without storing samples.
async fn serve_while_ingesting(
    answering: impl Future<Output = Result<(), BusError>>,
    mut ingesting: JoinHandle<()>,
    shutdown: &CancellationToken,
) -> Result<(), MetricsError> {
    let mut answering = pin!(answering);
    tokio::select! {
        outcome = &mut answering => {
            outcome?;
            if let Err(error) = ingesting.await {
                warn!(%error, "a background task of metrics-svc panicked");
            }
        }
        ended = &mut ingesting => match ended {
            Ok(()) if shutdown.is_cancelled() => answering.await?,
            _ => return Err(MetricsError::IngestionEnded),
        },
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn service_ends_if_ingestion_panics_or_ends() {
        let shutdown = CancellationToken::new();
        for panics in [true, false] {
            let ingesting = tokio::spawn(async move { assert!(!panics, "expected by this test") });
            let served = serve_while_ingesting(pending(), ingesting, &shutdown).await;
            assert!(matches!(served, Err(MetricsError::IngestionEnded)), "{served:?}");
        }
    }

    #[tokio::test]
    async fn on_shutdown_service_drains_after_ingestion_has_ended() {
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        let ingesting = tokio::spawn(ready(()));
        serve_while_ingesting(ready(Ok(())), ingesting, &shutdown)
            .await
            .unwrap();
    }
}
