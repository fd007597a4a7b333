//! Finds blocks whose hours were never queued for compaction, because a program was killed between the two writes.
//!
//! A sample is acknowledged after both, so ingestion repeats them. But `load` may be killed and never repeated, and a sample
//! may expire in the stream before it is delivered again. Its rows may then be missing in rollups and names too, so these
//! are rebuilt. Every replica checks the blocks of level 0 at its start and once a day.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bson::{Binary, Bson, doc, spec::BinarySubtype};
use metrics::counter;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    MetricsError,
    blocks::{AHEAD, HOUR_MICROS, VmHour, hour_of},
    database::find,
    documents::micros_of,
    history::Histories,
    store::RowStore,
};

/// Pause between two searches.
const INTERVAL: Duration = Duration::from_hours(24);
/// Pause before a failed search is repeated.
const FAILED_PAUSE: Duration = Duration::from_mins(1);
/// Minimum time since the end of an hour, in microseconds. By then, running programs have queued their hours.
const MIN_AGE: i64 = HOUR_MICROS;
/// Number of blocks that are listed together, and the pause after them.
const PAGE: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(20);
/// Time limit for listing these blocks.
const PAGE_LIMIT: Duration = Duration::from_secs(10);

/// Queues hours that were never queued, until shutdown.
pub(crate) async fn follow(store: Arc<RowStore>, histories: Histories, shutdown: CancellationToken) {
    loop {
        let pause = match search(&store, &histories, &shutdown).await {
            Ok(()) => INTERVAL,
            Err(error) => {
                warn!(
                    cause = error.cause(),
                    "search for unqueued blocks failed; retrying"
                );
                FAILED_PAUSE
            }
        };
        if shutdown.run_until_cancelled(sleep(pause)).await.is_none() {
            return;
        }
    }
}

/// Checks all blocks of level 0 whose hours ended at least [`MIN_AGE`] ago.
async fn search(
    store: &RowStore,
    histories: &Histories,
    shutdown: &CancellationToken,
) -> Result<(), MetricsError> {
    let end = hour_of(micros_of(SystemTime::now()).saturating_sub(MIN_AGE));
    // Only blocks of level 0 have binary ids, and no id sorts before an empty one.
    let (subtype, bytes) = (BinarySubtype::Generic, Vec::new());
    let mut after = Bson::Binary(Binary { subtype, bytes });
    while !shutdown.is_cancelled() {
        // The database does not filter the blocks further, because a command that finds few of them would read all.
        let query = store
            .blocks()
            .find(doc! { "_id": { "$gt": &after } })
            .projection(doc! { "instance_id": 1, "hour": 1, "expires": 1, AHEAD: 1 })
            .sort(doc! { "_id": 1 })
            .limit(PAGE.into())
            .batch_size(PAGE)
            .max_time(PAGE_LIMIT);
        let mut cursor = find(store.blocks(), query).await?;
        let (mut count, mut hours) = (0, BTreeSet::new());
        while cursor.advance().await? {
            let block = cursor.current();
            count += 1;
            after = block
                .get("_id")?
                .map(Bson::try_from)
                .transpose()?
                .unwrap_or(after);
            let hour = block
                .get_datetime("hour")?
                .timestamp_millis()
                .saturating_mul(1000);
            // Compaction leaves blocks that never expire, and blocks with rows far ahead of their arrival, as they are.
            if hour < end && block.get("expires")?.is_some() && block.get(AHEAD)?.is_none() {
                let instance = block.get_str("instance_id")?.to_owned();
                hours.insert(VmHour { hour, instance });
            }
        }
        store.hours.retain_unqueued(&mut hours).await?;
        if !hours.is_empty() {
            queue(store, histories, &hours).await?;
        }
        if count < PAGE {
            break;
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Rebuilds rollups and names of the hours' days, and queues the hours last, so that they are found again after a kill.
async fn queue(
    store: &RowStore,
    histories: &Histories,
    hours: &BTreeSet<VmHour>,
) -> Result<(), MetricsError> {
    let days = hours.iter().filter_map(|of| {
        let at_ms = u64::try_from(of.hour.div_euclid(1000)).ok()?;
        Some(histories.agent.day_of(of.instance.parse().ok()?, at_ms))
    });
    for day in days.collect::<BTreeSet<_>>() {
        let instance = day.instance.clone();
        let day = BTreeSet::from([day]);
        for history in histories.both() {
            match history.rebuild_days(&day, || {}).await {
                Ok(()) => {}
                Err(error @ MetricsError::Store(_)) => return Err(error),
                Err(error) => warn!(
                    instance_id = %instance, cause = error.cause(),
                    "rebuilding the rollups and process names of a day failed; `vmwatch-metrics rebuild` repeats it"
                ),
            }
        }
    }
    store.hours.note_hours(hours).await?;
    counter!("vmwatch_compaction_hours_found_total").increment(hours.len() as u64);
    info!(
        hours = hours.len(),
        "queued hours of blocks that were never queued for compaction"
    );
    Ok(())
}
