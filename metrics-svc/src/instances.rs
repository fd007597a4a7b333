//! Stores the newest row of each VM in one collection, from which every replica fills its memory (see [`crate::newest`]).
//!
//! ```text
//! vm_samples_instances  { _id: "vm-1", newest: { at, create_date, cpu_util, … }, cpu: { "7": { slot, max }, … }, sampled_at }
//! vm_samples_hypervisor_instances  likewise, of the rows that hypervisors measured
//! ```
//!
//! All fields are written with `$max`, which compares documents by their first field: the newest row by its effective date `at`, and a
//! point of the sparkline by its three-minute slot and then by its value. So an older row never replaces a newer one,
//! in whatever order replicas write. The points form a ring in which a new slot replaces the slot of an hour before.
//! `sampled_at` is the time of the last report; retention removes a VM from the list together with its last row.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use bson::{DateTime, Document, RawBsonRef, RawDocument, RawDocumentBuf, bson, doc};
use mongodb::Collection;
use vmwatch_api::{
    InstanceId,
    history::{SPARKLINE_POINTS, SPARKLINE_STEP_MS},
    measures::VmMeasures,
    metrics::Restriction,
    vms::NewestSample,
};
use vmwatch_bus::vms::Row;

use crate::{
    MetricsError,
    database::{find, update},
    deadline::Deadline,
    documents::SAMPLED_AT,
    retention,
    store::{RowKind, RowStore},
    vm_row::{RESTRICTED, VmRow, number},
};

/// The collection with one document per VM: its newest row and recent CPU maxima.
pub(crate) struct Instances {
    instances: Collection<RawDocumentBuf>,
    /// The collection of VMs with the read settings for requests.
    reading: Collection<RawDocumentBuf>,
}

/// The dates of a VM's last report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LastReport {
    pub(crate) instance: InstanceId,
    /// Time of the newest row, in Unix milliseconds.
    pub(crate) at_ms: u64,
    /// Time at which a row was last stored, in Unix milliseconds.
    pub(crate) reported_ms: u64,
}

/// The newest row and the recent CPU maxima among some rows of a VM.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    instance: InstanceId,
    newest: Option<Newest>,
    /// Maximum CPU usage in each three-minute slot.
    cpu: BTreeMap<u64, f64>,
    /// Time at which the VM reported the rows; `None` for rows that were loaded from files or read again in a rebuild.
    reported: Option<SystemTime>,
}

#[derive(Debug, Clone)]
struct Newest {
    create_date: String,
    at_ms: u64,
    values: VmMeasures<Option<f64>>,
    restricted: Option<Restriction>,
}

impl Report {
    /// Creates an empty report, to which rows of the VM are added.
    pub(crate) const fn new(instance: InstanceId) -> Self {
        Self {
            instance,
            newest: None,
            cpu: BTreeMap::new(),
            reported: None,
        }
    }

    /// Sets the time at which the VM reported the rows.
    pub(crate) fn reported(mut self, at: Option<SystemTime>) -> Self {
        self.reported = at;
        self
    }

    /// Adds a row, with its effective date in Unix microseconds, to the report of its VM.
    pub(crate) fn add(&mut self, at: i64, row: &VmRow<'_>) {
        let at_ms = u64::try_from(at.div_euclid(1000)).unwrap_or(0);
        if self
            .newest
            .as_ref()
            .is_none_or(|newest| (newest.at_ms, newest.create_date.as_str()) < (at_ms, row.create_date))
        {
            self.newest = Some(Newest {
                create_date: row.create_date.to_owned(),
                at_ms,
                values: row.values,
                restricted: row.restricted,
            });
        }
        if let Some(cpu) = row.values.cpu_util {
            let slot = self.cpu.entry(at_ms / SPARKLINE_STEP_MS).or_insert(cpu);
            *slot = slot.max(cpu);
            if self.cpu.len() > SPARKLINE_POINTS {
                self.cpu.pop_first();
            }
        }
    }

    /// Returns the update statement, or `None` if the report has no rows.
    fn statement(&self) -> Option<Document> {
        let newest = self.newest.as_ref()?;
        let at = DateTime::from_millis(i64::try_from(newest.at_ms).unwrap_or(i64::MAX));
        let mut row = doc! { "at": at, "create_date": &newest.create_date };
        for (measure, value) in newest.values.described() {
            if let Some(value) = value {
                row.insert(measure.name, value);
            }
        }
        if let Some(restricted) = newest.restricted {
            row.insert(RESTRICTED, restricted.as_str());
        }
        let mut greatest = doc! { "newest": row };
        for (slot, cpu) in &self.cpu {
            let position = format!("cpu.{}", slot % SPARKLINE_POINTS as u64);
            greatest.insert(
                position,
                bson!({ "slot": i64::try_from(*slot).unwrap_or(0), "max": *cpu }),
            );
        }
        if let Some(reported) = self.reported {
            greatest.insert(SAMPLED_AT, DateTime::from_system_time(reported));
        }
        Some(doc! { "q": { "_id": self.instance.as_str() }, "u": { "$max": greatest }, "upsert": true })
    }
}

/// Suffix of the name of the collection of VMs.
const SUFFIX: &str = "instances";

/// Returns the date of a VM's newest row, which its agent has reported or its hypervisor has measured. The date may lag by a
/// few seconds, and it is missing for rows of the software of 2017 until they are rebuilt.
pub(crate) async fn last_report(
    rows: &RowStore,
    kind: RowKind,
    instance: &InstanceId,
    deadline: Deadline,
) -> Result<Option<SystemTime>, MetricsError> {
    let instances = rows.reading_beside::<Document>(&kind.derived(SUFFIX));
    let query = instances
        .find_one(doc! { "_id": instance.as_str() })
        .projection(doc! { "newest.at": 1 })
        .max_time(deadline.left()?);
    let found = find(&instances, query).await?;
    let at = found.and_then(|found| {
        found
            .get_document("newest")
            .ok()?
            .get_datetime("at")
            .ok()
            .copied()
    });
    Ok(at.map(DateTime::to_system_time))
}

impl Instances {
    /// Opens the collection of VMs, which is in the same database as the rows.
    pub(crate) fn new(rows: &RowStore, kind: RowKind) -> Self {
        Self {
            instances: rows.beside(&kind.derived(SUFFIX)),
            reading: rows.reading_beside(&kind.derived(SUFFIX)),
        }
    }

    /// Applies the retention, so that a VM leaves the list together with its last row.
    pub(crate) async fn prepare(&self, rows: &RowStore, keep_rows: Duration) -> Result<(), MetricsError> {
        retention::apply(rows.database(), &self.instances, keep_rows).await
    }

    /// The collection of VMs, for writes.
    pub(crate) const fn documents(&self) -> &Collection<RawDocumentBuf> {
        &self.instances
    }

    /// Writes newest rows and CPU maxima of several VMs to the collection.
    pub(crate) async fn note(&self, reports: &[Report]) -> Result<(), MetricsError> {
        let statements: Vec<_> = reports.iter().filter_map(Report::statement).collect();
        update(&self.instances, &statements).await
    }

    /// For VMs whose rows no agent has reported, sets the internal date (`sampled_at`) to the date of the newest row.
    pub(crate) async fn backfill_dates(&self) -> Result<(), MetricsError> {
        let undated = doc! { SAMPLED_AT: { "$exists": false } };
        let dated = vec![doc! { "$set": { SAMPLED_AT: "$newest.at" } }];
        self.instances.update_many(undated, dated).await?;
        Ok(())
    }

    /// Reads the dates of the last reports of the VMs whose ids come after this id, sorted by id.
    pub(crate) async fn last_reports(
        &self,
        after: Option<&InstanceId>,
        most: u16,
        deadline: Deadline,
    ) -> Result<Vec<LastReport>, MetricsError> {
        let filter = after.map_or_else(Document::new, |after| doc! { "_id": { "$gt": after.as_str() } });
        let query = self
            .reading
            .find(filter)
            .projection(doc! { "newest.at": 1, SAMPLED_AT: 1 })
            .sort(doc! { "_id": 1 })
            .limit(most.into())
            .batch_size(most.into())
            .max_time(deadline.left()?);
        let mut cursor = find(&self.reading, query).await?;
        let mut reports = Vec::new();
        while cursor.advance().await? {
            let document = cursor.current();
            let at_ms = millis(document.get_document("newest")?.get_datetime("at")?);
            let reported = document.get(SAMPLED_AT)?.and_then(RawBsonRef::as_datetime);
            let Ok(instance) = document.get_str("_id")?.parse() else {
                continue;
            };
            reports.push(LastReport {
                instance,
                at_ms,
                reported_ms: reported.map_or(at_ms, millis),
            });
        }
        Ok(reports)
    }

    /// Reads the newest rows of these VMs.
    pub(crate) async fn read(
        &self,
        instances: &[InstanceId],
        deadline: Deadline,
    ) -> Result<Vec<(InstanceId, Row)>, MetricsError> {
        let ids: Vec<_> = instances.iter().map(InstanceId::as_str).collect();
        let query = self
            .reading
            .find(doc! { "_id": { "$in": ids } })
            .batch_size(u32::try_from(instances.len()).unwrap_or(u32::MAX))
            .max_time(deadline.left()?);
        let mut cursor = find(&self.reading, query).await?;
        let mut rows = Vec::with_capacity(instances.len());
        while cursor.advance().await? {
            rows.extend(row(cursor.current())?);
        }
        Ok(rows)
    }

    /// Reads the newest row of one VM.
    pub(crate) async fn get(
        &self,
        instance: &InstanceId,
        deadline: Deadline,
    ) -> Result<Option<(InstanceId, Row)>, MetricsError> {
        let rows = self.read(std::slice::from_ref(instance), deadline).await?;
        Ok(rows.into_iter().next())
    }
}

/// Decodes the newest row and the CPU maxima of a VM; `None` if the id of the VM is not valid.
fn row(document: &RawDocument) -> Result<Option<(InstanceId, Row)>, MetricsError> {
    let Ok(instance) = document.get_str("_id")?.parse() else {
        return Ok(None);
    };
    let newest = document.get_document("newest")?;
    let at_ms = millis(newest.get_datetime("at")?);
    let reported = document.get(SAMPLED_AT)?.and_then(RawBsonRef::as_datetime);
    let read = VmRow::from_document(newest)?;
    let sample = NewestSample {
        at_ms,
        values: read.values.into(),
        restricted: read.restricted,
    };
    let mut row = Row::new(sample, reported.map_or(at_ms, millis));
    if let Some(ring) = document.get("cpu")?.and_then(RawBsonRef::as_document) {
        for element in ring {
            let (_, point) = element?;
            let Some(point) = point.as_document() else {
                continue;
            };
            let slot = u64::try_from(point.get_i64("slot")?).unwrap_or(0);
            if let Some(cpu) = point.get("max")?.and_then(number) {
                row.add_cpu(slot, cpu);
            }
        }
    }
    Ok(Some((instance, row)))
}

fn millis(at: DateTime) -> u64 {
    u64::try_from(at.timestamp_millis()).unwrap_or(0)
}
