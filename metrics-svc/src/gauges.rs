//! Updates metrics for alerts periodically: the number of VMs that fell silent and of VMs whose agents have faults, and the
//! disk usage of the database (see [`DiskUsage`]).

use std::{sync::Arc, time::Duration};

use metrics::gauge;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{disk::DiskUsage, vms::VmList};

/// Interval at which the numbers of VMs are updated.
const INTERVAL: Duration = Duration::from_secs(5);
/// The disk usage is measured at every this many intervals, because a database may need seconds to answer.
const DISK_INTERVALS: u32 = 12;
/// How long a silent VM counts as "fell silent". After this time it is assumed to be deleted or stopped on purpose.
const COUNTED_FOR: Duration = Duration::from_mins(15);

/// Updates the metrics until shutdown.
pub(crate) async fn follow(disk: Arc<DiskUsage>, vms: Arc<VmList>, shutdown: CancellationToken) {
    for turn in (0..DISK_INTERVALS).cycle() {
        count_vms(&vms);
        if turn == 0 {
            // Run in a separate task, because dropping a call of the MongoDB driver half-way is not safe.
            let disk = Arc::clone(&disk);
            let measuring = tokio::spawn(async move { disk.measure().await });
            match shutdown.run_until_cancelled(measuring).await {
                None => return,
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => debug!(
                    cause = error.cause(),
                    "failed to update the metrics of the disk usage of the database"
                ),
                Some(Err(error)) => {
                    debug!(%error, "the update of the metrics of the disk usage of the database panicked");
                }
            }
        }
        if shutdown.run_until_cancelled(sleep(INTERVAL)).await.is_none() {
            return;
        }
    }
}

fn count_vms(vms: &VmList) {
    let silent = u32::try_from(vms.fell_silent(COUNTED_FOR)).unwrap_or(u32::MAX);
    gauge!("vmwatch_vms_fell_silent").set(silent);
    let faulty = u32::try_from(vms.faulty()).unwrap_or(u32::MAX);
    gauge!("vmwatch_vms_with_agent_faults").set(faulty);
}
