//! Gauges for alerts, measured periodically: VMs that fell silent, and the database's disk usage.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bson::{Bson, Document, doc};
use metrics::gauge;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{MetricsError, instances::Instances, store::RowStore};

/// Interval of the measurements.
const INTERVAL: Duration = Duration::from_secs(5);
/// For this long a silent VM counts as "fell silent"; after that it is assumed to be deleted or stopped on purpose.
const COUNTED_FOR: Duration = Duration::from_mins(15);

/// Sets the gauges until shutdown. A VM is silent when it has not reported for `silent_after`.
pub(crate) async fn follow(store: Arc<RowStore>, silent_after: Duration, shutdown: CancellationToken) {
    loop {
        // Runs in its own task, because dropping a driver call half-way is not safe.
        let measuring = tokio::spawn(measure(Arc::clone(&store), silent_after));
        match shutdown.run_until_cancelled(measuring).await {
            None => return,
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => debug!(cause = error.cause(), "measuring VMs and disk failed"),
            Some(Err(error)) => debug!(%error, "measuring VMs and disk panicked"),
        }
        if shutdown.run_until_cancelled(sleep(INTERVAL)).await.is_none() {
            return;
        }
    }
}

async fn measure(store: Arc<RowStore>, silent_after: Duration) -> Result<(), MetricsError> {
    let now = SystemTime::now();
    let silent = now - silent_after;
    let count = Instances::new(&store)
        .last_reported_within(silent - COUNTED_FOR..silent)
        .await?;
    gauge!("vmwatch_vms_fell_silent").set(f64::from(u32::try_from(count).unwrap_or(u32::MAX)));
    let stats = store.database().run_command(doc! { "dbStats": 1 }).await?;
    if let Some((used, size)) = disk(&stats) {
        gauge!("vmwatch_database_disk_used_bytes").set(used);
        gauge!("vmwatch_database_disk_size_bytes").set(size);
    }
    Ok(())
}

/// Used and total bytes of the database's file system, if the server reports them.
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
    fn reads_disk_usage_if_reported() {
        let stats = doc! { "ok": 1, "fsUsedSize": 3.5e9, "fsTotalSize": 10_000_000_000_i64 };
        assert_eq!(disk(&stats), Some((3.5e9, 1e10)));
        assert_eq!(disk(&doc! { "ok": 1, "fsUsedSize": 1 }), None);
    }
}
