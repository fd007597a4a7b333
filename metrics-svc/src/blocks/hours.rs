//! The queue of hours that compaction has work in: one entry per VM and hour (UTC).
//!
//! ```text
//! blocks_hours  { _id: "2026-11-27T03:00:00Z/vm-1", instance_id: "vm-1", hour, notes: 3 }
//! ```
//!
//! An insert of blocks notes their hours before the samples are acknowledged, so no block is missed. Within an hour that
//! has not ended, a replica notes each VM once. After that it notes every insert. Compaction removes an entry only if its
//! counter `notes` is as it was before compaction read the blocks.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ops::Range,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use bson::{DateTime, Document, RawDocumentBuf, doc};
use futures::TryStreamExt;
use mongodb::Collection;

use super::HOUR_MICROS;
use crate::{MetricsError, database::update, documents::micros_of};

/// Maximum number of VMs whose current hour is remembered as noted. The hours of further VMs are noted at every insert.
const MAX_NOTED: usize = 65_536;

/// The queue of hours that compaction has work in.
#[derive(Debug)]
pub(crate) struct HourQueue {
    entries: Collection<Document>,
    /// The VMs that are noted already, by hours that have not ended.
    noted: Mutex<HashMap<i64, HashSet<String>>>,
}

/// A VM and an hour.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct VmHour {
    /// Start of the hour, Unix microseconds.
    pub(crate) hour: i64,
    pub(crate) instance: String,
}

/// An entry of the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct QueuedHour {
    pub(crate) of: VmHour,
    id: String,
    notes: i64,
}

impl VmHour {
    /// The start of the hour as a text that sorts by time; `None` if the year does not have four digits.
    pub(crate) fn hour_text(&self) -> Option<String> {
        hour_text(self.hour)
    }

    /// End of the hour, Unix microseconds.
    pub(crate) const fn end(&self) -> i64 {
        self.hour.saturating_add(HOUR_MICROS)
    }

    fn key(&self) -> Option<String> {
        Some(format!("{}/{}", self.hour_text()?, self.instance))
    }
}

fn hour_text(hour: i64) -> Option<String> {
    let date = DateTime::from_millis(hour.div_euclid(1000));
    let text = date.try_to_rfc3339_string().ok()?;
    (text.len() == "2026-11-27T03:00:00Z".len()).then_some(text)
}

impl HourQueue {
    pub(crate) fn new(entries: Collection<Document>) -> Self {
        Self {
            entries,
            noted: Mutex::default(),
        }
    }

    /// Notes the hours of blocks that were inserted, and returns when a majority of the database servers has stored the
    /// entries.
    pub(crate) async fn note(&self, blocks: &[RawDocumentBuf]) -> Result<(), MetricsError> {
        let now = micros_of(SystemTime::now());
        let mut hours = BTreeSet::new();
        for block in blocks {
            hours.insert(VmHour {
                hour: block
                    .get_datetime("hour")?
                    .timestamp_millis()
                    .saturating_mul(1000),
                instance: block.get_str("instance_id")?.to_owned(),
            });
        }
        hours.retain(|hour| !self.is_noted(hour, now));
        self.note_hours(&hours).await?;
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        noted.retain(|hour, _| hour.saturating_add(HOUR_MICROS) > now);
        for VmHour { hour, instance } in hours {
            if (hour..hour.saturating_add(HOUR_MICROS)).contains(&now) {
                let vms = noted.entry(hour).or_default();
                if vms.len() < MAX_NOTED {
                    vms.insert(instance);
                }
            }
        }
        Ok(())
    }

    fn is_noted(&self, hour: &VmHour, now: i64) -> bool {
        let noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        let vms = noted.get(&hour.hour).filter(|_| hour.end() > now);
        vms.is_some_and(|vms| vms.contains(&hour.instance))
    }

    /// Adds the hours to the queue, or counts up their entries.
    pub(crate) async fn note_hours(&self, hours: &BTreeSet<VmHour>) -> Result<(), MetricsError> {
        let statements: Vec<Document> = hours
            .iter()
            .filter_map(|of| {
                let hour = DateTime::from_millis(of.hour.div_euclid(1000));
                Some(doc! {
                    "q": { "_id": of.key()? },
                    "u": {
                        "$inc": { "notes": 1_i64 },
                        "$setOnInsert": { "instance_id": &of.instance, "hour": hour },
                    },
                    "upsert": true,
                })
            })
            .collect();
        if statements.is_empty() {
            return Ok(());
        }
        match update(&self.entries, &statements).await {
            // Two replicas may insert the same entry at the same time; the second attempt finds it.
            Err(MetricsError::Write(_)) => update(&self.entries, &statements).await,
            other => other,
        }
    }

    /// Removes the hours that are in the queue from `hours`.
    pub(crate) async fn retain_unqueued(&self, hours: &mut BTreeSet<VmHour>) -> Result<(), MetricsError> {
        let keys: Vec<String> = hours.iter().filter_map(VmHour::key).collect();
        let found = self.entries.find(doc! { "_id": { "$in": keys } }).await?;
        let entries: Vec<Document> = found.try_collect().await?;
        for entry in entries.iter().filter_map(QueuedHour::from_document) {
            hours.remove(&entry.of);
        }
        Ok(())
    }

    /// Reads entries of hours that begin in a time range (Unix microseconds), oldest first, after the entry `after`.
    pub(crate) async fn read(
        &self,
        hours: Range<i64>,
        after: Option<&QueuedHour>,
        limit: u32,
    ) -> Result<Vec<QueuedHour>, MetricsError> {
        let from = hour_text(hours.start).unwrap_or_default();
        let to = hour_text(hours.end).unwrap_or_default();
        let from = after.map_or_else(
            || doc! { "$gte": from, "$lt": &to },
            |after| doc! { "$gt": &after.id, "$lt": &to },
        );
        let found = self
            .entries
            .find(doc! { "_id": from })
            .sort(doc! { "_id": 1 })
            .limit(limit.into())
            .await?;
        let entries: Vec<Document> = found.try_collect().await?;
        Ok(entries.iter().filter_map(QueuedHour::from_document).collect())
    }

    /// Removes an entry unless it was noted again since it was read.
    pub(crate) async fn remove(&self, entry: &QueuedHour) -> Result<(), MetricsError> {
        let unchanged = doc! { "_id": &entry.id, "notes": entry.notes };
        self.entries.delete_one(unchanged).await?;
        Ok(())
    }
}

impl QueuedHour {
    fn from_document(entry: &Document) -> Option<Self> {
        Some(Self {
            of: VmHour {
                hour: entry
                    .get_datetime("hour")
                    .ok()?
                    .timestamp_millis()
                    .saturating_mul(1000),
                instance: entry.get_str("instance_id").ok()?.to_owned(),
            },
            id: entry.get_str("_id").ok()?.to_owned(),
            notes: entry.get_i64("notes").ok()?,
        })
    }
}
