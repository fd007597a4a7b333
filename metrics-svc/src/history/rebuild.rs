//! Rollups and newest rows of rows that ingestion did not see: of an older reporter, loaded, or from before there were
//! rollups. A day is read once and gives all its buckets.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bson::{DateTime, Document, doc};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::{InstanceId, history::Resolution};

use super::{
    History,
    chart::{bucket_start, width_ms},
    rollups::Bucket,
    sums::Sums,
};
use crate::{MetricsError, deadline::Deadline, instances::Report, store::RowKind};

/// The rows of a day; a database that takes longer is slow enough.
const DEADLINE: Duration = Duration::from_mins(5);
/// Between tries while the database is away.
const PAUSE: Duration = Duration::from_secs(10);
/// The document that says that the rows from before there were rollups are in them.
const REBUILT: &str = "rebuilt";

/// Days of VMs, each by its first millisecond.
pub(crate) type Days = BTreeSet<Bucket>;

type Buckets = BTreeMap<Bucket, Sums>;

impl History {
    /// The day that a moment is in.
    pub(crate) fn day_of(&self, instance: InstanceId, at_ms: u64) -> Bucket {
        let start_ms = bucket_start(at_ms, width_ms(Resolution::Day), self.offset.as_millis());
        Bucket { instance, start_ms }
    }

    /// Rebuilds everything, once in the life of a database; goes on trying until shutdown.
    pub(crate) async fn rebuild_once(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            let rebuilding = async {
                let state = self.rows.beside::<Document>("state");
                if state.find_one(doc! { "_id": REBUILT }).await?.is_none() {
                    self.rebuild(&shutdown, |_, _| {}).await?;
                }
                Ok::<_, MetricsError>(())
            };
            match rebuilding.await {
                Ok(()) => return,
                Err(error) => warn!(
                    cause = error.cause(),
                    "old rows are not in the rollups yet; trying again"
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

    /// Rebuilds everything; tells of each VM that is done, and how many there are.
    pub(crate) async fn rebuild(
        &self,
        shutdown: &CancellationToken,
        mut done: impl FnMut(&InstanceId, usize),
    ) -> Result<(), MetricsError> {
        let vms = self.rows.collection(RowKind::Vm);
        let found = vms.distinct("instance_id", doc! {}).await?;
        // Who has no valid id cannot be asked for.
        let instances: Vec<InstanceId> = found.iter().filter_map(|id| id.as_str()?.parse().ok()).collect();
        for instance in &instances {
            let (Some(first), Some(last)) = (self.edge(instance, 1).await?, self.edge(instance, -1).await?)
            else {
                continue;
            };
            let mut day = self.day_of(instance.clone(), first);
            let mut report = Report::of(instance.clone());
            while day.start_ms <= last {
                if shutdown.is_cancelled() {
                    return Ok(());
                }
                self.rebuild_day(&day, &mut report).await?;
                day.start_ms += width_ms(Resolution::Day);
            }
            self.instances.note(&[report]).await?;
            done(instance, instances.len());
        }
        let state = self.rows.beside::<Document>("state");
        let now = doc! { "$set": { "at": DateTime::from_system_time(SystemTime::now()) } };
        state
            .update_one(doc! { "_id": REBUILT }, now)
            .upsert(true)
            .await?;
        info!(instances = instances.len(), "rollups and newest rows rebuilt");
        Ok(())
    }

    /// Rebuilds some days; tells of each that is done.
    pub(crate) async fn rebuild_days(&self, days: &Days, mut done: impl FnMut()) -> Result<(), MetricsError> {
        let mut reports: BTreeMap<&InstanceId, Report> = BTreeMap::new();
        for day in days {
            let report = reports
                .entry(&day.instance)
                .or_insert_with(|| Report::of(day.instance.clone()));
            self.rebuild_day(day, report).await?;
            done();
        }
        self.instances
            .note(&reports.into_values().collect::<Vec<_>>())
            .await
    }

    async fn rebuild_day(&self, day: &Bucket, report: &mut Report) -> Result<(), MetricsError> {
        let offset_ms = self.offset.as_millis();
        let mut five_minutes = Buckets::new();
        let end_ms = day.start_ms + width_ms(Resolution::Day);
        let rows = self.rows.collection(RowKind::Vm);
        self.read_rows(rows, day, end_ms, Deadline::after(DEADLINE), |at_ms, row| {
            let start_ms = bucket_start(at_ms, width_ms(Resolution::FiveMinutes), offset_ms);
            let bucket = Bucket {
                start_ms,
                ..day.clone()
            };
            five_minutes.entry(bucket).or_default().add(row);
            report.add(at_ms, row);
        })
        .await?;
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
        // What is older than it is kept would be deleted within a minute.
        let since = self.kept_since(Resolution::FiveMinutes);
        five_minutes.retain(|bucket, _| bucket.start_ms >= since);
        self.rollups.fill(Resolution::FiveMinutes, &five_minutes).await?;
        let since = self.kept_since(Resolution::Hour);
        hours.retain(|bucket, _| bucket.start_ms >= since);
        self.rollups.fill(Resolution::Hour, &hours).await?;
        self.rollups
            .fill(Resolution::Day, &Buckets::from([(day.clone(), sums)]))
            .await
    }

    /// The moment of the oldest (1) or newest (-1) row of a VM.
    async fn edge(&self, instance: &InstanceId, direction: i32) -> Result<Option<u64>, MetricsError> {
        let vms = self.rows.collection(RowKind::Vm);
        let row = vms
            .find_one(doc! { "instance_id": instance.as_str() })
            .projection(doc! { "_id": 0, "create_date": 1 })
            .sort(doc! { "create_date": direction, "_id": direction })
            .await?;
        let Some(row) = row else { return Ok(None) };
        Ok(self.offset.unix_millis_of(row.get_str("create_date")?))
    }
}
