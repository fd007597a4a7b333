//! The work of the replica that holds the lease: evaluating rules, finding culprits, and notifying recipients.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::{
    culprits,
    engine::{self, Setup},
    lease::{Lease, Leases},
    notify,
};

/// Pause before the work begins again after a part of it ended by itself.
const PAUSE: Duration = Duration::from_secs(1);

/// Does the work whenever this replica holds the lease, until shutdown.
pub(crate) async fn follow(setup: Setup, mut leases: Leases, shutdown: CancellationToken) {
    while let Some(mut lease) = shutdown.run_until_cancelled(leases.take()).await {
        let term = shutdown.child_token();
        let mut parts = start(&setup, &lease, &term);
        let is_held = tokio::select! {
            () = shutdown.cancelled() => true,
            () = lease.keep() => false,
            Some(ended) = parts.join_next() => {
                match ended {
                    Ok(()) if shutdown.is_cancelled() => {}
                    Ok(()) => error!("a part of alert-svc ended; starting it again"),
                    Err(error) => error!(%error, "a part of alert-svc panicked; starting it again"),
                }
                true
            }
        };
        term.cancel();
        stop(parts, &mut lease, is_held).await;
        if is_held {
            lease.release().await;
        }
        shutdown.run_until_cancelled(sleep(PAUSE)).await;
    }
}

fn start(setup: &Setup, lease: &Lease, term: &CancellationToken) -> JoinSet<()> {
    let mut parts = JoinSet::new();
    parts.spawn(engine::run(setup.clone(), lease.freshness(), term.clone()));
    let Setup {
        bus,
        store,
        definitions,
        changed,
        delivery,
        ..
    } = setup.clone();
    parts.spawn(culprits::run(
        bus.clone(),
        store.clone(),
        definitions.clone(),
        Arc::clone(&changed),
        term.clone(),
    ));
    parts.spawn(notify::run(delivery, store, definitions, changed, term.clone()));
    parts
}

/// Waits until all parts have ended. The lease is kept meanwhile.
async fn stop(mut parts: JoinSet<()>, lease: &mut Lease, is_held: bool) {
    let ending = async {
        while let Some(ended) = parts.join_next().await {
            if let Err(error) = ended {
                warn!(%error, "a part of alert-svc panicked");
            }
        }
    };
    if is_held {
        tokio::select! {
            () = ending => {}
            () = lease.keep() => {}
        }
    } else {
        ending.await;
    }
}
