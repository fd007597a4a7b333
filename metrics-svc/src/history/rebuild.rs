//! Builds the rollups, the newest rows and the process names from rows that were not ingested: rows written by the
//! software of 2017, loaded from files, or stored before rollups existed. The rows of a day are read only once; the
//! rollups of all resolutions are computed from them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bson::{DateTime, Document, doc};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::{InstanceId, history::Resolution};

use super::{History, before_now, rollups::Bucket, sums::Sums};
use crate::{
    MetricsError,
    deadline::Deadline,
    instances::Report,
    reads::{Budget, Most, Newest, Order, Query, Row, micros},
    store::{REBUILT, RowKind, STATE},
    time_buckets::{bucket_start, width_ms},
};

/// Deadline for reading the rows of one VM and day.
const DEADLINE: Duration = Duration::from_mins(5);
/// Pause between attempts to rebuild the rollups while the database is unreachable.
const PAUSE: Duration = Duration::from_secs(10);

/// A set of days, each of one VM.
pub(crate) type Days = BTreeSet<Bucket>;

type Buckets = BTreeMap<Bucket, Sums>;

impl History {
    /// Returns the day that contains a time.
    pub(crate) fn day_of(&self, instance: InstanceId, at_ms: u64) -> Bucket {
        let start_ms = bucket_start(at_ms, width_ms(Resolution::Day), self.offset.as_millis());
        Bucket { instance, start_ms }
    }

    /// Rebuilds all rollups and names once per database; retries until this succeeds or the service shuts down.
    pub(crate) async fn rebuild_once(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            let rebuilding = async {
                let state = self.rows.beside::<Document>(STATE);
                if state.find_one(doc! { "_id": REBUILT }).await?.is_none() {
                    self.rebuild(&shutdown, |_, _| {}).await?;
                }
                Ok::<_, MetricsError>(())
            };
            match rebuilding.await {
                Ok(()) => return,
                Err(error) => warn!(
                    cause = error.cause(),
                    "building the rollups of old rows failed; retrying"
                ),
            }
            if shutdown
                .run_until_cancelled(tokio::time::sleep(PAUSE))
                .await
                .is_none()
            {
                return;
            }
        }
    }

    /// Rebuilds all rollups and names. Calls `done` after each VM with the total number of VMs, which it returns.
    pub(crate) async fn rebuild(
        &self,
        shutdown: &CancellationToken,
        mut done: impl FnMut(&InstanceId, usize),
    ) -> Result<usize, MetricsError> {
        let mut found = self.rows.blocks().distinct("instance_id", doc! {}).await?;
        for flat in self.rows.flat_collections() {
            found.extend(flat.distinct("instance_id", doc! {}).await?);
        }
        // Skip invalid instance ids, because a VM with an invalid id cannot be queried.
        let instances: BTreeSet<InstanceId> =
            found.iter().filter_map(|id| id.as_str()?.parse().ok()).collect();
        for instance in &instances {
            if !self.rebuild_vm(instance, shutdown).await? {
                return Ok(instances.len());
            }
            done(instance, instances.len());
        }
        if !self.has_names() {
            return Ok(instances.len());
        }
        let state = self.rows.beside::<Document>(STATE);
        let now = doc! { "$set": { "at": DateTime::from_system_time(SystemTime::now()) } };
        state
            .update_one(doc! { "_id": REBUILT }, now)
            .upsert(true)
            .await?;
        info!(
            vms = instances.len(),
            "rollups, newest rows and process names rebuilt"
        );
        Ok(instances.len())
    }

    /// Rebuilds the rollups and names of a VM. Returns `false` if shutdown came before the end.
    pub(crate) async fn rebuild_vm(
        &self,
        instance: &InstanceId,
        shutdown: &CancellationToken,
    ) -> Result<bool, MetricsError> {
        let mut report = Report::new(instance.clone());
        let mut next = self.first_since(instance, i64::MIN).await?;
        while let Some(at_ms) = next {
            if shutdown.is_cancelled() {
                return Ok(false);
            }
            let day = self.day_of(instance.clone(), at_ms);
            self.rebuild_day(&day, &mut report).await?;
            let end_ms = day.start_ms + width_ms(Resolution::Day);
            next = self.first_since(instance, micros(end_ms)).await?;
        }
        self.instances.note(&[report]).await?;
        Ok(true)
    }

    /// Rebuilds the rollups and names of the given days. Calls `done` after each day.
    pub(crate) async fn rebuild_days(&self, days: &Days, mut done: impl FnMut()) -> Result<(), MetricsError> {
        let mut reports: BTreeMap<&InstanceId, Report> = BTreeMap::new();
        for day in days {
            let report = reports
                .entry(&day.instance)
                .or_insert_with(|| Report::new(day.instance.clone()));
            self.rebuild_day(day, report).await?;
            done();
        }
        self.instances
            .note(&reports.into_values().collect::<Vec<_>>())
            .await
    }

    async fn rebuild_day(&self, day: &Bucket, report: &mut Report) -> Result<(), MetricsError> {
        let time = micros(day.start_ms)..micros(day.start_ms + width_ms(Resolution::Day));
        let deadline = Deadline::after(DEADLINE);
        if self.has_names() {
            self.rebuild_names(&day.instance, time, deadline).await?;
        }
        let offset_ms = self.offset.as_millis();
        let mut five_minutes = Buckets::new();
        let end_ms = day.start_ms + width_ms(Resolution::Day);
        let read = self.read_rows(day, end_ms, true, Deadline::after(DEADLINE), |at, row| {
            let at_ms = u64::try_from(at.div_euclid(1000)).unwrap_or(0);
            let start_ms = bucket_start(at_ms, width_ms(Resolution::FiveMinutes), offset_ms);
            let bucket = Bucket {
                start_ms,
                ..day.clone()
            };
            five_minutes.entry(bucket).or_default().add(row);
            report.add(at, row);
        });
        if read.await?.is_some() {
            return Err(MetricsError::TooMuch);
        }
        let mut hours = Buckets::new();
        let mut sums = Sums::default();
        for (bucket, part) in &five_minutes {
            let start_ms = bucket_start(bucket.start_ms, width_ms(Resolution::Hour), offset_ms);
            hours
                .entry(Bucket {
                    start_ms,
                    ..day.clone()
                })
                .or_default()
                .merge(part);
            sums.merge(part);
        }
        // Skip time buckets past their retention, which MongoDB would delete within a minute.
        let since = before_now(self.rollups.keep().five_minutes);
        five_minutes.retain(|bucket, _| bucket.start_ms >= since);
        self.rollups.fill(Resolution::FiveMinutes, &five_minutes).await?;
        let since = before_now(self.rollups.keep().hours);
        hours.retain(|bucket, _| bucket.start_ms >= since);
        self.rollups.fill(Resolution::Hour, &hours).await?;
        self.rollups
            .fill(Resolution::Day, &Buckets::from([(day.clone(), sums)]))
            .await
    }

    /// Time of the first row of a VM or its processes since a time in Unix microseconds.
    async fn first_since(&self, instance: &InstanceId, since: i64) -> Result<Option<u64>, MetricsError> {
        let mut found = Vec::new();
        // Nothing is rebuilt from the rows of filesystems.
        let kinds: &[_] = if self.has_names() {
            &[RowKind::Vm, RowKind::Process]
        } else {
            &[self.kind]
        };
        for kind in kinds.iter().copied() {
            let mut query = Query::new(kind, instance, &[]).oldest_first().durable();
            query.time.start = since;
            let one = Most { rows: 1, after: None };
            let mut first = Newest::new(one, Order::Oldest);
            let mut budget = Budget::of_background();
            first
                .read(&self.rows, &query, &mut budget, Deadline::after(DEADLINE))
                .await?;
            found.extend(first.into_rows().first().map(Row::at_ms));
        }
        Ok(found.into_iter().min())
    }
}
