//! Starting VMs truthfully: a command answers well only when the hypervisor itself says that the machine is as it
//! was asked to be.

pub mod client;
pub mod config;
mod driver;
mod error;
mod fleet;
mod handlers;

use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusHandle;
use shared::{
    api::{
        Service,
        lifecycle::{Start, State},
    },
    bus::{Bus, serve::Server},
    health,
};
use tokio_util::sync::CancellationToken;

pub use error::LifecycleError;

use crate::{config::LifecycleSettings, fleet::Fleet};

/// Serves until `shutdown`, then drains.
pub async fn run(
    settings: LifecycleSettings,
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
) -> Result<(), LifecycleError> {
    let bus = Bus::connect(Service::Lifecycle.name(), &settings.bus).await?;
    let fleet = Arc::new(Fleet::open(settings.hypervisors, settings.calls));
    fleet.watch(&shutdown);
    let readiness = {
        let (bus, fleet) = (bus.clone(), Arc::clone(&fleet));
        Arc::new(move || match (bus.is_connected(), fleet.reachable()) {
            (false, _) => Err("the bus is away"),
            (true, false) => Err("no hypervisor answers"),
            (true, true) => Ok(()),
        })
    };
    health::start(settings.health, metrics, readiness, shutdown.clone()).await?;
    let for_start = Arc::clone(&fleet);
    Server::new(&bus, Service::Lifecycle, settings.serve)
        .method::<Start, _, _>(move |context, target| {
            let fleet = Arc::clone(&for_start);
            async move { handlers::start(&fleet, &context, target).await }
        })
        .method::<State, _, _>(move |_, target| {
            let fleet = Arc::clone(&fleet);
            async move { handlers::state(&fleet, target).await }
        })
        .run(shutdown)
        .await?;
    Ok(())
}
