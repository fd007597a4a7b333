//! Updates metrics for alerts periodically: the number of VMs that fell silent and of VMs whose agents have faults, and the
//! disk usage of the database.

use std::{sync::Arc, time::Duration};

use bson::{Bson, Document, doc};
use metrics::gauge;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{MetricsError, store::RowStore, vms::VmList};

/// Interval at which the numbers of VMs are updated.
const INTERVAL: Duration = Duration::from_secs(5);
/// The disk usage is measured at every this many intervals, because a database may need seconds to answer.
const DISK_INTERVALS: u32 = 12;
/// How long a silent VM counts as "fell silent". After this time it is assumed to be deleted or stopped on purpose.
const COUNTED_FOR: Duration = Duration::from_mins(15);

/// Updates the metrics until shutdown.
pub(crate) async fn follow(store: Arc<RowStore>, vms: Arc<VmList>, shutdown: CancellationToken) {
    for turn in (0..DISK_INTERVALS).cycle() {
        count_vms(&vms);
        if turn == 0 {
            // Run in a separate task, because dropping a call of the MongoDB driver half-way is not safe.
            let measuring = tokio::spawn(measure_disk(Arc::clone(&store)));
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

async fn measure_disk(store: Arc<RowStore>) -> Result<(), MetricsError> {
    let stats = store.database().run_command(doc! { "dbStats": 1 }).await?;
    if let Some((used, size)) = disk(&stats) {
        gauge!("vmwatch_database_disk_used_bytes").set(used);
        gauge!("vmwatch_database_disk_size_bytes").set(size);
    }
    Ok(())
}

/// Returns used and total bytes of the database's file system, if the database server reports them.
fn disk(stats: &Document) -> Option<(f64, f64)> {
    Some((number(stats, "fsUsedSize")?, number(stats, "fsTotalSize")?))
}

fn number(stats: &Document, name: &str) -> Option<f64> {
    match *stats.get(name)? {
        Bson::Double(number) => Some(number),
        Bson::Int32(number) => Some(f64::from(number)),
        #[expect(clippy::cast_precision_loss, reason = "an alert does not need byte precision")]
        Bson::Int64(number) => Some(number as f64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_usage_is_read_if_database_reports_it() {
        let stats = doc! { "ok": 1, "fsUsedSize": 3.5e9, "fsTotalSize": 10_000_000_000_i64 };
        assert_eq!(disk(&stats), Some((3.5e9, 1e10)));
        assert_eq!(disk(&doc! { "ok": 1, "fsUsedSize": 1 }), None);
    }
}
