//! Observes the stream of samples, which metrics-svc reads, and the faults of agents that metrics-svc has noticed.

use std::{collections::HashMap, sync::Arc, time::Duration};

use metrics::counter;
use tokio::{sync::watch, time::sleep};
use tracing::debug;
use vmwatch_api::{
    InstanceId,
    agents::AgentFault,
    metrics::{Limit, SAMPLE_STREAM},
    time::unix_millis,
    vms::{AgentFilter, List, Stale, VmFilter, VmQuery},
    wire::Fault,
};
use vmwatch_bus::Bus;

use super::{operations, silence::Health};

/// Interval at which the stream of samples is observed, and deadline of the request.
const STREAM_INTERVAL: Duration = Duration::from_secs(2);
const STREAM_DEADLINE: Duration = Duration::from_secs(2);
/// Interval at which faults of agents are read.
const FAULTS_INTERVAL: Duration = Duration::from_secs(30);
/// Number of VMs of a page, and maximum number of pages.
const PAGE: u64 = 1000;
const MAX_PAGES: usize = 100;

/// The faults of agents, by VM.
pub(super) type Faults = HashMap<InstanceId, Vec<AgentFault>>;

/// Observes the stream of samples.
pub(super) async fn follow_stream(bus: Bus, health: watch::Sender<Option<Health>>) {
    let mut answered_ms = unix_millis();
    loop {
        let found = bus.stream_info(SAMPLE_STREAM, STREAM_DEADLINE).await;
        let now = match found {
            Ok(info) => {
                answered_ms = unix_millis();
                let first = info.state.first_timestamp.unix_timestamp_nanos() / 1_000_000;
                Health {
                    failing_since_ms: None,
                    oldest_ms: (info.state.messages > 0).then(|| u64::try_from(first).unwrap_or(0)),
                }
            }
            Err(error) => {
                counter!("vmwatch_alert_sources_failed_total", "source" => "stream").increment(1);
                debug!(%error, "the stream of samples did not answer; retrying");
                Health {
                    failing_since_ms: Some(answered_ms),
                    oldest_ms: None,
                }
            }
        };
        health.send_replace(Some(now));
        sleep(STREAM_INTERVAL).await;
    }
}

/// Reads the faults of agents for as long as somebody receives them.
pub(super) async fn follow_faults(bus: Bus, faults: watch::Sender<Option<Arc<Faults>>>) {
    loop {
        match read_faults(&bus).await {
            Ok(Some(read)) => {
                faults.send_replace(Some(Arc::new(read)));
            }
            Ok(None) => debug!("metrics-svc does not know the newest samples; retrying"),
            Err(error) => {
                counter!("vmwatch_alert_sources_failed_total", "source" => "faults").increment(1);
                debug!(%error, "reading the faults of agents failed; retrying");
            }
        }
        sleep(FAULTS_INTERVAL).await;
    }
}

/// Reads all VMs whose agent has a fault; `None` if metrics-svc cannot tell at the moment.
async fn read_faults(bus: &Bus) -> Result<Option<Faults>, Fault> {
    let mut query = VmQuery {
        filter: VmFilter {
            agent: Some(AgentFilter::Faulty),
            ..VmFilter::default()
        },
        limit: Limit::new(PAGE).unwrap_or_default(),
        ..VmQuery::default()
    };
    let mut faults = Faults::new();
    for _ in 0..MAX_PAGES {
        let page = bus
            .call::<List>(&operations::context(operations::DEADLINE), &query)
            .await?;
        if page.stale.contains(&Stale::Samples) {
            return Ok(None);
        }
        faults.extend(page.vms.into_iter().map(|vm| (vm.instance_id, vm.agent_faults)));
        query.cursor = page.next;
        if query.cursor.is_none() {
            break;
        }
    }
    Ok(Some(faults))
}
