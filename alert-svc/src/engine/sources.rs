//! The sources that tasks of their own read: the stream of samples, faults of agents, and failed operations.

use std::sync::Arc;

use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use vmwatch_bus::Bus;

use super::{
    health::{self, Faults},
    operations::{FailuresByVm, Operations},
    silence::Health,
};

/// The newest state of each source.
pub(super) struct Sources {
    pub(super) health: watch::Receiver<Option<Health>>,
    pub(super) faults: watch::Receiver<Option<Arc<Faults>>>,
    /// `None` until they were read for the first time.
    pub(super) failures: watch::Receiver<Option<Arc<FailuresByVm>>>,
}

impl Sources {
    pub(super) fn follow(
        bus: &Bus,
        operations: &Arc<Operations>,
        tasks: &mut JoinSet<()>,
        term: &CancellationToken,
    ) -> Self {
        let (health_sender, health) = watch::channel(None);
        let (faults_sender, faults) = watch::channel(None);
        let (failures_sender, failures) = watch::channel(None);
        let (stream, agents) = (bus.clone(), bus.clone());
        let newest = Arc::clone(operations);
        let token = term.clone();
        tasks.spawn(async move {
            let following = async {
                tokio::join!(
                    health::follow_stream(stream, health_sender),
                    health::follow_faults(agents, faults_sender),
                    newest.follow(failures_sender),
                )
            };
            token.run_until_cancelled(Box::pin(following)).await;
        });
        Self {
            health,
            faults,
            failures,
        }
    }
}
