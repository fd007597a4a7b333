//! Which rows the names lack: those in dirty buckets, and older rows until the names were built from them once.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use bson::{Document, RawDocumentBuf, doc};
use vmwatch_api::{InstanceId, history::Resolution};

use crate::{
    MetricsError,
    blocks::{HOUR_MICROS, hour_of},
    database::find,
    deadline::Deadline,
    documents::micros_of,
    store::{DIRTY_BUCKETS, REBUILT, RowStore, STATE},
    time_buckets::width_ms,
};

/// Maximum number of dirty buckets that a request reads. There are fewer unless the rollups fall behind.
const MAX_READ: i64 = 1000;

/// Reads the hours of a VM (Unix microseconds) whose rows the names may lack, because they are in dirty buckets. Returns
/// `None` if the names may lack rows of any hour.
///
/// A dirty bucket is removed after its names were written, so this must be read before the names.
pub(crate) async fn hours_without_names(
    rows: &RowStore,
    instance: &InstanceId,
    deadline: Deadline,
) -> Result<Option<BTreeSet<i64>>, MetricsError> {
    if !is_rebuilt(rows, deadline).await? {
        return Ok(None);
    }
    let dirty_buckets = rows.beside::<RawDocumentBuf>(DIRTY_BUCKETS);
    let query = dirty_buckets
        .find(doc! {})
        .projection(doc! { "instance_id": 1, "start": 1 })
        .limit(MAX_READ)
        .batch_size(1000)
        .max_time(deadline.left()?);
    let mut cursor = find(&dirty_buckets, query).await?;
    let (mut count, mut hours) = (0, BTreeSet::new());
    while cursor.advance().await? {
        count += 1;
        let entry = cursor.current();
        if entry.get_str("instance_id")? == instance.as_str() {
            let start = entry.get_datetime("start")?.timestamp_millis();
            let width = i64::try_from(width_ms(Resolution::FiveMinutes)).unwrap_or(0);
            // The time bucket may begin in one hour and end in the next, and so may the samples of a clock that is ahead.
            let first = hour_of(start.saturating_mul(1000));
            let last = hour_of(start.saturating_add(width).saturating_mul(1000));
            hours.extend([first - HOUR_MICROS, first, last]);
        }
    }
    Ok((count < MAX_READ).then_some(hours))
}

/// Reads the time, in Unix milliseconds, before which all stored rows are contained in the names, by the clocks of the
/// replicas that stored them: that of the oldest dirty bucket, or now. Returns `None` until the names were built once.
///
/// Like [`hours_without_names`], this must be read before the names.
pub(crate) async fn complete_to(rows: &RowStore, deadline: Deadline) -> Result<Option<u64>, MetricsError> {
    if !is_rebuilt(rows, deadline).await? {
        return Ok(None);
    }
    let now = SystemTime::now();
    let dirty_buckets = rows.beside::<RawDocumentBuf>(DIRTY_BUCKETS);
    let query = dirty_buckets
        .find_one(doc! {})
        .sort(doc! { "_id": 1 })
        .max_time(deadline.left()?);
    let complete_to = match find(&dirty_buckets, query).await? {
        None => now,
        // Ids begin with the second, so dirty buckets of one second are in no particular order.
        Some(oldest) => oldest.get_datetime("at")?.to_system_time().min(now) - Duration::from_secs(1),
    };
    Ok(u64::try_from(micros_of(complete_to).div_euclid(1000)).ok())
}

/// Whether the names were built once from the rows that were stored before.
async fn is_rebuilt(rows: &RowStore, deadline: Deadline) -> Result<bool, MetricsError> {
    let state = rows.beside::<Document>(STATE);
    let query = state.find_one(doc! { "_id": REBUILT }).max_time(deadline.left()?);
    Ok(find(&state, query).await?.is_some())
}
