//! Deletes what background work has written of a VM after its removal: rollups, process names and the entry in the list of
//! VMs, computed from rows that were read before the removal.
//!
//! ```text
//! vm_samples_removals  { _id: "vm-1", at }
//! ```
//!
//! A removal records itself before it deletes anything. When all work that began before has ended, any replica deletes the
//! VM's derived data again, builds it from the rows that have arrived since, and removes the record last. A replica that
//! is killed meanwhile leaves the record to the next one.

use std::time::{Duration, SystemTime};

use bson::{DateTime, Document, doc};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::InstanceId;

use super::{REMOVALS, delete_derived};
use crate::{MetricsError, database::find, deadline::Deadline, history::Histories, store::RowStore};

/// Time after a removal at which no work is left that has read rows before it. A pass over dirty buckets takes at most a
/// minute.
const AFTER: Duration = Duration::from_mins(3);
/// Minimum pause between two checks for removals.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// Number of removals that are read together.
const TOGETHER: i64 = 100;
/// Time limit for the derived data of one VM.
const LIMIT: Duration = Duration::from_mins(1);

/// Records that the removal of a VM begins.
pub(super) async fn record(
    rows: &RowStore,
    instance: &InstanceId,
    deadline: Deadline,
) -> Result<(), MetricsError> {
    deadline.left()?;
    let removals = rows.beside::<Document>(REMOVALS);
    let id = instance.as_str().to_owned();
    // Run in a separate task, because dropping a call of the MongoDB driver half-way is not safe.
    let recording = tokio::spawn(async move {
        let now = doc! { "$set": { "at": DateTime::now() } };
        removals.update_one(doc! { "_id": id }, now).upsert(true).await
    });
    match tokio::time::timeout(deadline.left()?, recording).await {
        Ok(Ok(recorded)) => recorded.map(drop).map_err(Into::into),
        Ok(Err(panic)) => Err(MetricsError::Io(panic.into())),
        Err(_) => Err(MetricsError::DeadlinePassed),
    }
}

/// Deletes derived data of removed VMs until shutdown.
pub(super) async fn follow(
    rows: &RowStore,
    histories: &Histories,
    interval: Duration,
    shutdown: &CancellationToken,
) {
    let pause = interval.max(MIN_PAUSE);
    while shutdown.run_until_cancelled(sleep(pause)).await.is_some() {
        if let Err(error) = pass(rows, histories, shutdown).await {
            warn!(
                cause = error.cause(),
                "deleting derived data of removed VMs failed; retrying"
            );
        }
    }
}

async fn pass(
    rows: &RowStore,
    histories: &Histories,
    shutdown: &CancellationToken,
) -> Result<(), MetricsError> {
    let removals = rows.beside::<Document>(REMOVALS);
    let due = SystemTime::now().checked_sub(AFTER);
    let due = due.map_or(DateTime::MIN, DateTime::from_system_time);
    let query = removals.find(doc! { "at": { "$lt": due } }).limit(TOGETHER);
    let mut cursor = find(&removals, query).await?;
    while cursor.advance().await? {
        let removal = Document::try_from(cursor.current())?;
        if let Ok(instance) = removal.get_str("_id")?.parse() {
            let mut records = 0;
            for history in histories.both() {
                delete_derived(history, &instance, Deadline::after(LIMIT), &mut records).await?;
                match history.rebuild_vm(&instance, shutdown).await {
                    Ok(true) => {}
                    Ok(false) => return Ok(()),
                    Err(error @ MetricsError::Store(_)) => return Err(error),
                    // The data must not be deleted again in each pass, and other VMs must not wait.
                    Err(error) => warn!(
                        instance_id = %instance, cause = error.cause(),
                        "rebuilding the rollups and process names of a removed VM from newer rows failed; `vmwatch-metrics rebuild` repeats it"
                    ),
                }
            }
            if records > 0 {
                info!(
                    instance_id = %instance, records,
                    "deleted derived data of a removed VM, and rebuilt it from newer rows"
                );
            }
        }
        // A record that another removal has changed meanwhile stays.
        removals.delete_one(removal).await?;
    }
    Ok(())
}
