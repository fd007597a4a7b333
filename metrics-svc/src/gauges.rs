//! Gauges for alerts that no request sets: VMs that fell silent, and the disk of the database.

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

/// How often they are set.
const INTERVAL: Duration = Duration::from_secs(5);
/// A VM counts as fallen silent for so long; after that it is taken for one that is gone, or stopped on purpose.
const COUNTED: Duration = Duration::from_mins(15);

/// Sets them until shutdown. A VM is silent when it has not reported for `silent_after`.
pub(crate) async fn follow(store: Arc<RowStore>, silent_after: Duration, shutdown: CancellationToken) {
    loop {
        // In a task of its own: a driver's call is not safe to drop half-way.
        let measuring = tokio::spawn(measure(Arc::clone(&store), silent_after));
        match shutdown.run_until_cancelled(measuring).await {
            None => return,
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => debug!(cause = error.cause(), "VMs and disk could not be measured"),
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
    let count = Instances::beside(&store)
        .last_reported_within(silent - COUNTED..silent)
        .await?;
    gauge!("vmwatch_vms_fell_silent").set(f64::from(u32::try_from(count).unwrap_or(u32::MAX)));
    let stats = store.database().run_command(doc! { "dbStats": 1 }).await?;
    if let Some((used, size)) = disk(&stats) {
        gauge!("vmwatch_database_disk_used_bytes").set(used);
        gauge!("vmwatch_database_disk_size_bytes").set(size);
    }
    Ok(())
}

/// Bytes used and in all, of the file system that holds the database; a server may not say.
fn disk(stats: &Document) -> Option<(f64, f64)> {
    Some((number(stats, "fsUsedSize")?, number(stats, "fsTotalSize")?))
}

fn number(stats: &Document, name: &str) -> Option<f64> {
    match *stats.get(name)? {
        Bson::Double(number) => Some(number),
        Bson::Int32(number) => Some(f64::from(number)),
        #[expect(clippy::cast_precision_loss, reason = "an alert needs no single bytes")]
        Bson::Int64(number) => Some(number as f64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_disk_where_the_server_tells_it() {
        let stats = doc! { "ok": 1, "fsUsedSize": 3.5e9, "fsTotalSize": 10_000_000_000_i64 };
        assert_eq!(disk(&stats), Some((3.5e9, 1e10)));
        assert_eq!(disk(&doc! { "ok": 1, "fsUsedSize": 1 }), None);
    }
}
