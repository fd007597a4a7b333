//! Answers what metrics-svc knows about the state of vmwatch: waiting samples, compaction, the disk of the database, and
//! agents. A part that cannot be read is absent, so that the others are shown while something is wrong.

use std::{sync::Arc, time::Duration};

use tracing::debug;
use vmwatch_api::{
    Scope,
    metrics::{DEAD_LETTER_STREAM, SAMPLE_STREAM},
    status::{CompactionStatus, MetricsState, SampleBacklog, StatusQuery},
    time::unix_millis,
    wire::Fault,
};
use vmwatch_bus::{Bus, Context, jetstream::JetStreamError};

use crate::{compaction, disk::DiskUsage, store::RowStore, vms::VmList};

/// Deadline of a request to JetStream, which normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(2);

/// What the answer is read from.
pub(crate) struct StatusReader {
    bus: Bus,
    store: Arc<RowStore>,
    vms: Arc<VmList>,
    pub(crate) disk: Arc<DiskUsage>,
}

impl StatusReader {
    pub(crate) fn new(bus: &Bus, store: &Arc<RowStore>, vms: &Arc<VmList>) -> Self {
        Self {
            bus: bus.clone(),
            store: Arc::clone(store),
            vms: Arc::clone(vms),
            disk: Arc::new(DiskUsage::new(store)),
        }
    }

    /// Reads the state; agents only of the VMs in the scope of the principal.
    pub(crate) async fn read(
        self: Arc<Self>,
        context: Context,
        _: StatusQuery,
    ) -> Result<MetricsState, Fault> {
        let (samples, compaction) = tokio::join!(self.samples(), self.compaction());
        let nothing = Scope::Only(Vec::new());
        let principal = context.principal.as_ref();
        let scope = principal.map_or(&nothing, |principal| &principal.scope);
        Ok(MetricsState {
            samples: samples
                .inspect_err(|error| debug!(%error, "reading the state of the stream of samples failed"))
                .ok(),
            compaction,
            disk: self.disk.last(),
            agents: self.vms.agents(scope),
        })
    }

    async fn samples(&self) -> Result<SampleBacklog, JetStreamError> {
        let (samples, refused) = tokio::join!(
            self.bus.stream_info(SAMPLE_STREAM, DEADLINE),
            self.bus.stream_info(DEAD_LETTER_STREAM, DEADLINE),
        );
        let samples = samples?;
        let state = samples.state;
        let first_ms = state.first_timestamp.unix_timestamp_nanos() / 1_000_000;
        let oldest_ms = unix_millis().saturating_sub(u64::try_from(first_ms).unwrap_or(0));
        Ok(SampleBacklog {
            messages: state.messages,
            bytes: state.bytes,
            max_bytes: u64::try_from(samples.config.max_bytes).unwrap_or(0),
            oldest_ms: (state.messages > 0).then_some(oldest_ms),
            dead_letters: refused.ok().map(|refused| refused.state.messages),
        })
    }

    async fn compaction(&self) -> Option<CompactionStatus> {
        let progress = compaction::progress(&self.store).await;
        progress
            .inspect_err(|error| debug!(cause = error.cause(), "reading the progress of compaction failed"))
            .ok()?
    }
}
