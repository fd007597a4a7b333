//! `vmwatch-metrics backfill-dates` sets the internal date of rows that the software of 2017 wrote without one.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use bson::{Bson, DateTime, RawDocumentBuf, doc, oid::ObjectId};
use futures::TryStreamExt;
use indicatif::ProgressBar;
use mongodb::Collection;
use vmwatch_api::InstanceId;
use vmwatch_blocks::{Block, Limits, MAX_ROWS};

use crate::{
    MetricsError,
    blocks::{StoredBlock, VmHour},
    config::RetentionSettings,
    database::update,
    deadline::Deadline,
    documents::SAMPLED_AT,
    history::History,
    reads::MAX_DECODED,
    store::{RowKind, RowStore},
};

/// Time limit for the names of one VM and day.
const NAMES_LIMIT: Duration = Duration::from_mins(5);
/// Number of rows that one database command changes.
const BATCH: i64 = 5000;

pub(super) async fn run(
    store: &RowStore,
    history: &History,
    retention: &RetentionSettings,
    dry_run: bool,
) -> Result<(), MetricsError> {
    // All rows of filesystems have dates.
    for kind in RowKind::FLAT {
        if let Some(rows) = store.collection(kind) {
            one_collection(rows, retention.of(kind), dry_run).await?;
        }
        blocks(store, history, kind, dry_run).await?;
    }
    if dry_run {
        return Ok(());
    }
    // Names expire with the last of their rows.
    let progress = ProgressBar::new_spinner().with_message("days whose process names get an expiry");
    let mut after = String::new();
    loop {
        let days = history.names.without_expiry(&after).await?;
        let Some((last, ..)) = days.last() else { break };
        after.clone_from(last);
        for (_, instance, day_ms) in days {
            history
                .redate_names(&instance, day_ms, Deadline::after(NAMES_LIMIT))
                .await?;
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    // Retention also removes VMs from the list of VMs, by the date of their newest row, so the list needs dates too.
    history.instances.backfill_dates().await
}

async fn one_collection(
    rows: &Collection<RawDocumentBuf>,
    keep: Duration,
    dry_run: bool,
) -> Result<(), MetricsError> {
    // Take the date from the `_id`, which the MongoDB driver created when the row was reported.
    let undated = doc! { SAMPLED_AT: { "$exists": false }, "_id": { "$type": "objectId" } };
    let count = rows.count_documents(undated.clone()).await?;
    let mut past = undated.clone();
    past.insert("_id", doc! { "$type": "objectId", "$lt": first_id_after(keep) });
    let expired = rows.count_documents(past).await?;
    let days = keep.as_secs() / 86_400;
    println!(
        "{}: {count} rows without a date, {expired} of them older than {days} days",
        rows.name()
    );
    if dry_run {
        return Ok(());
    }
    let progress = ProgressBar::new(count);
    loop {
        let found = rows
            .find(undated.clone())
            .projection(doc! { "_id": 1 })
            .limit(BATCH)
            .await?;
        let ids: Vec<_> = found.try_collect().await?;
        let ids: Vec<Bson> = ids
            .iter()
            .filter_map(|row| row.get_object_id("_id").ok())
            .map(Bson::ObjectId)
            .collect();
        if ids.is_empty() {
            break;
        }
        let dated = vec![doc! { "$set": { SAMPLED_AT: { "$toDate": "$_id" } } }];
        rows.update_many(doc! { "_id": { "$in": &ids } }, dated).await?;
        progress.inc(ids.len() as u64);
    }
    progress.finish();
    println!(
        "{}: every row has a date now; MongoDB will delete the {expired} older ones within minutes",
        rows.name()
    );
    Ok(())
}

/// Sets when blocks of undated rows expire: as soon as the retention of their newest row has passed. Queues their hours,
/// because compaction merges only blocks that expire.
async fn blocks(
    store: &RowStore,
    history: &History,
    kind: RowKind,
    dry_run: bool,
) -> Result<(), MetricsError> {
    let blocks = store.blocks();
    let undated = doc! { "kind": kind.name(), "expires": { "$exists": false } };
    let count = blocks.count_documents(undated.clone()).await?;
    println!(
        "{}: {count} blocks of {} rows without a date",
        blocks.name(),
        kind.name()
    );
    if dry_run {
        return Ok(());
    }
    let progress = ProgressBar::new(count);
    let mut unreadable = 0_u64;
    let mut cursor = blocks
        .find(undated)
        .projection(doc! { "instance_id": 1, "from": 1, "to": 1, "data": 1 })
        .batch_size(32)
        .await?;
    let (mut statements, mut hours) = (Vec::new(), BTreeSet::new());
    while cursor.advance().await? {
        let document = cursor.current();
        let instance = document
            .get_str("instance_id")
            .ok()
            .and_then(|id| id.parse().ok());
        let last = StoredBlock::from_document(document)
            .zip(instance)
            .and_then(|(block, instance)| {
                let second = last_internal_second(block.data, &instance)?;
                Some((second, block.hour(), instance))
            });
        match last {
            None => unreadable += 1,
            Some((second, hour, instance)) => {
                hours.insert(VmHour {
                    hour,
                    instance: instance.to_string(),
                });
                let keep = history.retention.of(kind, &instance);
                let keep = i64::try_from(keep.as_secs()).unwrap_or(i64::MAX);
                let expires = DateTime::from_millis(second.saturating_add(keep).saturating_mul(1000));
                let id = document.get("_id")?.map(bson::RawBson::from);
                statements.push(doc! {
                    "q": { "_id": id.and_then(|id| Bson::try_from(id).ok()) },
                    "u": { "$set": { "expires": expires } },
                });
            }
        }
        if statements.len() >= 1000 {
            update(blocks, &std::mem::take(&mut statements)).await?;
            store.hours.note_hours(&std::mem::take(&mut hours)).await?;
        }
        progress.inc(1);
    }
    update(blocks, &statements).await?;
    store.hours.note_hours(&hours).await?;
    progress.finish();
    if unreadable > 0 {
        println!(
            "{}: {unreadable} blocks are unreadable and were left as they are",
            blocks.name()
        );
    }
    Ok(())
}

/// The Unix second in the newest `_id` of a block's rows.
fn last_internal_second(data: &[u8], instance: &InstanceId) -> Option<i64> {
    let limits = Limits {
        rows: MAX_ROWS,
        bytes: MAX_DECODED,
    };
    let mut block = Block::open(data, limits).ok()?;
    let ids = block.ids(instance.as_str()).ok()?;
    let seconds = (0..block.len()).map(|row| {
        let [a, b, c, d, ..] = ids.get(row);
        i64::from(u32::from_be_bytes([a, b, c, d]))
    });
    seconds.max()
}

/// The smallest `_id` of a row that is not past its retention.
fn first_id_after(keep: Duration) -> ObjectId {
    let moment = SystemTime::now()
        .checked_sub(keep)
        .map_or(DateTime::MIN, DateTime::from_system_time);
    let second = u32::try_from(moment.timestamp_millis().div_euclid(1000)).unwrap_or(0);
    let mut bytes = [0; 12];
    let (head, _) = bytes.split_at_mut(4);
    head.copy_from_slice(&second.to_be_bytes());
    ObjectId::from_bytes(bytes)
}
