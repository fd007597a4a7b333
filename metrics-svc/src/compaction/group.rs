//! Brings the blocks of one VM, kind and hour closer to a single generation of level 1.
//!
//! What to do is decided from what is stored, so any replica continues what another one began:
//!
//! ```text
//! blocks that the newest confirmed generation lacks ─> merge: insert the next generation, unconfirmed
//! unconfirmed generation whose rows are all in other blocks ─> confirm
//! unconfirmed generation with other rows (the VM was removed) ─> delete
//! blocks that the newest confirmed generation contains ─> wait until readers have ended ─> delete
//! ```

use std::{collections::BTreeSet, sync::Arc, time::SystemTime};

use bson::{Bson, Document, doc};
use metrics::{counter, histogram};
use tokio::time::Instant;
use tracing::{debug, info};

use super::{
    Compaction, blocking,
    contained::Wanted,
    found::{Batch, Generations, Group, Part, Source, id_bytes},
    merge::{Merge, Merged},
};
use crate::{MetricsError, documents::micros_of};

/// Maximum number of steps without a pause.
const MAX_STEPS: usize = 8;
/// Number of compaction intervals between two merges of the same hour, so that late rows are merged together.
const LATE_INTERVALS: u32 = 10;
/// Maximum number of blocks that one command deletes.
const DELETE_BATCH: usize = 1000;

/// What this replica remembers of a group. It only says when to continue.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Known {
    /// The newest confirmed generation, and when it was first seen.
    current: Option<(i64, Instant)>,
    /// A generation that lacks parts, and when it was first seen.
    incomplete: Option<(i64, Instant)>,
    merged: Option<Instant>,
    /// Whether the last merge left blocks to the next one.
    more: bool,
    /// When to continue.
    pub(super) next: Option<Instant>,
    /// Whether blocks remain to be merged.
    pub(super) unmerged: bool,
}

/// What comes next for a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// There is nothing to do until more blocks arrive.
    Done,
    /// Continue now.
    Again,
    /// Continue at this time; the flag says whether blocks remain to be merged.
    At(Instant, bool),
}

/// What became of an unconfirmed generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resolved {
    Confirmed,
    Deleted,
    /// A part is unreadable.
    Unknown,
}

impl Known {
    fn since(slot: &mut Option<(i64, Instant)>, generation: i64) -> Instant {
        match *slot {
            Some((known, since)) if known == generation => since,
            _ => {
                let now = Instant::now();
                *slot = Some((generation, now));
                now
            }
        }
    }

    /// Whether this replica may forget the group, because late rows may be merged at once.
    pub(super) fn is_over(&self, compaction: &Compaction) -> bool {
        let pause = compaction.settings.interval * LATE_INTERVALS;
        self.merged.is_none_or(|merged| merged.elapsed() > pause)
            && self.next.is_none_or(|next| next.elapsed() > pause)
    }
}

impl Compaction {
    /// Does what can be done for a group now.
    pub(super) async fn work(&self, group: &Group, known: &mut Known) -> Result<Next, MetricsError> {
        for _ in 0..MAX_STEPS {
            let next = self.step(group, known).await?;
            if next != Next::Again {
                return Ok(next);
            }
        }
        Ok(Next::At(Instant::now() + self.settings.interval, true))
    }

    async fn step(&self, group: &Group, known: &mut Known) -> Result<Next, MetricsError> {
        let generations = group.generations(&self.store).await?;
        let (highest, current) = (generations.highest(), generations.current());
        if highest > current.unwrap_or(0) {
            if generations.is_complete(highest) {
                match self.resolve(group, &generations.parts(highest)).await? {
                    Resolved::Confirmed | Resolved::Deleted => return Ok(Next::Again),
                    Resolved::Unknown => {}
                }
            }
            // Another replica may be inserting it. Later it counts as abandoned.
            let due = Known::since(&mut known.incomplete, highest) + self.settings.delete_after;
            if Instant::now() < due {
                return Ok(Next::At(due, true));
            }
        }
        let Batch { sources, more, .. } = group.others(&self.store, &generations, current).await?;
        if sources.is_empty() {
            return Ok(Next::Done);
        }
        let (contained, others) = self.contained(group, &generations, current, sources).await?;
        let now = Instant::now();
        let mut due = None;
        if let Some(current) = current {
            let deletable = Known::since(&mut known.current, current) + self.settings.delete_after;
            if !contained.is_empty() && deletable <= now {
                self.delete_contained(current, &contained).await?;
                if more {
                    return Ok(Next::Again);
                }
            } else if !contained.is_empty() {
                due = Some(deletable);
            }
        }
        if others.is_empty() {
            return Ok(due.map_or(Next::Done, |due| Next::At(due, more)));
        }
        let next_merge = known.merged.filter(|_| current.is_some() && !known.more);
        let next_merge = next_merge.map(|merged| merged + self.settings.interval * LATE_INTERVALS);
        if let Some(next_merge) = next_merge.filter(|next| now < *next) {
            return Ok(Next::At(due.map_or(next_merge, |due| due.min(next_merge)), true));
        }
        let merge = Merge {
            group: group.clone(),
            generation: highest + 1,
            current: current.map_or_else(Vec::new, |current| generations.parts(current)),
            sources: Arc::new(others),
        };
        if self.merge(&merge).await? {
            known.merged = Some(Instant::now());
            known.more = more;
            let due = Known::since(&mut known.current, merge.generation) + self.settings.delete_after;
            return Ok(Next::At(due, more));
        }
        Ok(Next::Again)
    }

    /// Splits blocks into those whose rows the current generation has, and the others. Unreadable blocks are in neither.
    async fn contained(
        &self,
        group: &Group,
        generations: &Generations,
        current: Option<i64>,
        mut sources: Vec<Source>,
    ) -> Result<(Vec<Source>, Vec<Source>), MetricsError> {
        let of = group.clone();
        let (mut wanted, sources) = blocking(move || {
            let wanted = Wanted::of(&of, &mut sources);
            (wanted, sources)
        })
        .await?;
        for part in current.map_or_else(Vec::new, |current| generations.parts(current)) {
            let Some(part) = part.read(&self.store).await? else {
                continue;
            };
            wanted = find_in(group, wanted, part).await?;
        }
        Ok(wanted.split(sources))
    }

    /// Merges blocks into a new generation and confirms it. Returns `false` if that did not succeed.
    async fn merge(&self, merge: &Merge) -> Result<bool, MetricsError> {
        // Another replica may have finished the hour while this one was stopped. The entries in the queue ensure that
        // unconfirmed blocks are found in any case.
        let entry = BTreeSet::from([merge.group.of.clone()]);
        self.store.hours.note_hours(&entry).await?;
        let confirmed = self.insert_and_confirm(merge).await;
        if !matches!(confirmed, Ok(true)) {
            self.store.hours.note_hours(&entry).await?;
        }
        confirmed
    }

    async fn insert_and_confirm(&self, merge: &Merge) -> Result<bool, MetricsError> {
        let started = Instant::now();
        let Some(merged) = merge.insert(self).await? else {
            debug!(
                instance_id = merge.group.of.instance,
                generation = merge.generation,
                "another replica has merged this hour"
            );
            return Ok(false);
        };
        // If the VM was removed meanwhile, the sources are gone, and the new blocks must not stay. If they still exist,
        // a removal that begins later deletes the new blocks too.
        let present = merge.group.ids(&self.store).await?;
        let ids: Vec<String> = (0..merged.parts)
            .filter_map(|part| merge.group.id(merge.generation, part))
            .collect();
        let are_complete = ids.iter().all(|id| present.contains(id.as_bytes()));
        if !are_complete || !merge.source_ids().is_subset(&present) {
            return Ok(false);
        }
        if !self.confirm(&ids).await? {
            return Ok(false);
        }
        note_merged(merge, merged, started);
        Ok(true)
    }

    /// Inserts a block of level 1. Returns `false` if there is one with the same `_id`.
    pub(super) async fn insert(&self, block: &bson::RawDocumentBuf) -> Result<bool, MetricsError> {
        match self.store.blocks().insert_one(block).await {
            Ok(_) => Ok(true),
            Err(error) if super::lease::is_duplicate(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Confirms the parts of a generation. Returns `false` if one of them was deleted.
    async fn confirm(&self, ids: &[String]) -> Result<bool, MetricsError> {
        let confirmed = doc! { "$unset": { "unconfirmed": "" } };
        let parts = doc! { "_id": { "$in": ids } };
        let updated = self.store.blocks().update_many(parts, confirmed).await?;
        Ok(updated.matched_count == ids.len() as u64)
    }

    /// Confirms a generation if each of its rows is in another block; deletes it otherwise, because its sources were then
    /// deleted with their VM or have expired.
    async fn resolve(&self, group: &Group, parts: &[Part]) -> Result<Resolved, MetricsError> {
        let own: BTreeSet<Vec<u8>> = parts.iter().map(|part| part.id.clone().into_bytes()).collect();
        let mut are_found = true;
        for part in parts {
            let Some(part) = part.read(&self.store).await? else {
                are_found = false;
                break;
            };
            let mut wanted = Wanted::of(group, &mut vec![part]);
            if wanted.is_empty() {
                return Ok(Resolved::Unknown);
            }
            let mut cursor = group.open(&self.store).await?;
            while !wanted.is_found() && cursor.advance().await? {
                if let Some(other) = Source::of_any(cursor.current())
                    && !own.contains(&id_bytes(&other.id))
                {
                    wanted = find_in(group, wanted, other).await?;
                }
            }
            are_found &= wanted.is_found();
        }
        let ids: Vec<String> = parts.iter().map(|part| part.id.clone()).collect();
        if are_found && self.confirm(&ids).await? {
            return Ok(Resolved::Confirmed);
        }
        // If another replica has confirmed them meanwhile, it may have deleted their sources.
        let unconfirmed = doc! { "_id": { "$in": &ids }, "unconfirmed": true };
        let deleted = self.store.blocks().delete_many(unconfirmed).await?;
        info!(
            instance_id = group.of.instance,
            kind = group.kind.name(),
            hour = group.of.hour_text(),
            blocks = deleted.deleted_count,
            "deleted merged blocks, because the blocks that they were made from no longer exist"
        );
        Ok(Resolved::Deleted)
    }

    /// Deletes blocks whose rows are in the current generation: older generations first.
    async fn delete_contained(&self, current: i64, blocks: &[Source]) -> Result<(), MetricsError> {
        let mut deleted = 0;
        for is_level1 in [true, false] {
            let ids = blocks.iter().filter(|block| block.is_level1 == is_level1);
            let ids: Vec<&Bson> = ids.map(|block| &block.id).collect();
            for ids in ids.chunks(DELETE_BATCH) {
                let mut filter = doc! { "_id": { "$in": ids.iter().copied().cloned().collect::<Vec<_>>() } };
                if is_level1 {
                    // A generation that another replica has confirmed meanwhile stays.
                    let either: [Document; 2] = [
                        doc! { "unconfirmed": true },
                        doc! { "generation": { "$lt": current } },
                    ];
                    filter.insert("$or", either.to_vec());
                }
                deleted += self.store.blocks().delete_many(filter).await?.deleted_count;
            }
        }
        counter!("vmwatch_compaction_blocks_deleted_total").increment(deleted);
        debug!(deleted, "merged blocks deleted");
        Ok(())
    }
}

fn note_merged(merge: &Merge, merged: Merged, started: Instant) {
    let kind = merge.group.kind.name();
    counter!("vmwatch_compaction_hours_total", "kind" => kind).increment(1);
    counter!("vmwatch_compaction_rows_total", "kind" => kind).increment(merged.rows as u64);
    counter!("vmwatch_compaction_blocks_merged_total").increment(merge.blocks() as u64);
    histogram!("vmwatch_compaction_merge_seconds").record(started.elapsed().as_secs_f64());
    if merge.current.is_empty() {
        let since_end = micros_of(SystemTime::now()).saturating_sub(merge.group.of.end());
        #[expect(clippy::cast_precision_loss, reason = "a metric does not need microseconds")]
        histogram!("vmwatch_compaction_delay_seconds").record(since_end as f64 / 1e6);
    }
    debug!(
        instance_id = merge.group.of.instance,
        kind,
        hour = merge.group.of.hour_text(),
        generation = merge.generation,
        blocks = merge.blocks(),
        rows = merged.rows,
        parts = merged.parts,
        "blocks merged"
    );
}

/// Marks the rows that a block has. An unreadable block is reported, and has none.
async fn find_in(group: &Group, mut wanted: Wanted, block: Source) -> Result<Wanted, MetricsError> {
    let group = group.clone();
    blocking(move || {
        match block.ids(&group.of.instance) {
            Ok(ids) => wanted.find_in(&ids),
            Err(error) => block.note_unreadable(&group, error),
        }
        wanted
    })
    .await
}
