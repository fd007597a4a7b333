//! History of VMs: rollups of rows, which stay correct if rows arrive late or twice, and the charts that are computed
//! from them.
//!
//! Ingestion records which time buckets it has touched ([`dirty_buckets`]). [`follow`] recomputes these and writes the
//! [`rollups`] and the process names ([`names`]). [`chart`] chooses the resolution for a time range.

pub(crate) mod chart;
pub(crate) mod dirty_buckets;
mod follow;
mod late;
mod names;
pub(crate) mod rebuild;
pub(crate) mod rollups;
pub(crate) mod sums;

pub(crate) use chart::Chart;

use std::{sync::Arc, time::Duration};

use bson::{Document, RawDocumentBuf};
use mongodb::Collection;
use vmwatch_api::{
    InstanceId,
    history::{Resolution, VmHistoryQuery, VmSeries},
    time::{UtcOffset, unix_millis},
};

use self::{
    dirty_buckets::DirtyBuckets,
    names::Turns,
    rollups::{Bucket, Rollups},
    sums::Sums,
};
use crate::{
    MetricsError,
    config::RollupSettings,
    deadline::Deadline,
    instances::Instances,
    names::ProcessNames,
    row_retention::RowRetention,
    store::{RowKind, RowStore},
};

/// The histories of VMs: of what agents reported, and of what hypervisors measured.
#[derive(Clone)]
pub(crate) struct Histories {
    pub(crate) agent: Arc<History>,
    pub(crate) hypervisor: Arc<History>,
}

impl Histories {
    /// Opens the collections of both, without sending a command to the database yet.
    pub(crate) fn new(rows: &Arc<RowStore>, retention: &Arc<RowRetention>, keep: RollupSettings) -> Self {
        let of = |kind| Arc::new(History::new(rows, Arc::clone(retention), keep, kind));
        Self {
            agent: of(RowKind::Vm),
            hypervisor: of(RowKind::Hypervisor),
        }
    }

    /// Both histories, that of agents last: a VM that is removed leaves the list of VMs with it.
    pub(crate) const fn both(&self) -> [&Arc<History>; 2] {
        [&self.hypervisor, &self.agent]
    }

    /// Creates the indexes, and applies the retention settings.
    pub(crate) async fn prepare(&self) -> Result<(), MetricsError> {
        for history in self.both() {
            history.prepare().await?;
        }
        Ok(())
    }
}

/// Access to VM rows, their rollups, the newest row of each VM, and the process names.
pub(crate) struct History {
    rows: Arc<RowStore>,
    /// The kind of the rows: those of agents or those of hypervisors. Process names belong to the history of agents.
    kind: RowKind,
    pub(crate) dirty_buckets: DirtyBuckets,
    rollups: Rollups,
    pub(crate) instances: Instances,
    pub(crate) names: ProcessNames,
    pub(crate) retention: Arc<RowRetention>,
    offset: UtcOffset,
    turns: Turns,
}

impl History {
    /// Opens the collections of rows and rollups, without sending a command to the database yet.
    fn new(rows: &Arc<RowStore>, retention: Arc<RowRetention>, keep: RollupSettings, kind: RowKind) -> Self {
        Self {
            kind,
            dirty_buckets: DirtyBuckets::new(rows, kind),
            rollups: Rollups::new(rows, keep, kind),
            instances: Instances::new(rows, kind),
            names: ProcessNames::new(rows),
            retention,
            offset: rows.offset(),
            turns: Turns::default(),
            rows: Arc::clone(rows),
        }
    }

    /// Creates the indexes of process names, and applies the retention settings to rollups and to the list of VMs. A VM
    /// stays in the list as long as any VM's last row is kept.
    async fn prepare(&self) -> Result<(), MetricsError> {
        self.rollups.prepare(&self.rows).await?;
        if self.has_names() {
            self.names.prepare().await?;
        }
        let keep = self.retention.longest(self.kind);
        self.instances.prepare(&self.rows, keep).await
    }

    /// Whether process names are collected with this history.
    pub(crate) fn has_names(&self) -> bool {
        self.kind == RowKind::Vm
    }

    /// Oldest time for which a VM's data of this resolution is kept, in Unix milliseconds.
    fn kept_since(&self, resolution: Resolution, instance: &InstanceId) -> u64 {
        let keep = match resolution {
            Resolution::Raw => self.retention.of(self.kind, instance),
            Resolution::FiveMinutes => self.rollups.keep().five_minutes,
            Resolution::Hour => self.rollups.keep().hours,
            Resolution::Day => self.rollups.keep().days,
        };
        before_now(keep)
    }

    /// The collections of rollups, with a filter for the rollups of a VM.
    pub(crate) fn rollup_documents(
        &self,
        instance: &InstanceId,
    ) -> [(&Collection<RawDocumentBuf>, Document); 3] {
        self.rollups.documents(instance)
    }

    /// Computes the chart of a VM.
    pub(crate) async fn series(
        &self,
        query: &VmHistoryQuery,
        deadline: Deadline,
    ) -> Result<VmSeries, MetricsError> {
        let chart = Chart::plan(query.range, query.points, self.offset.as_millis(), |of| {
            self.kept_since(of, &query.instance_id)
        });
        let mut sums = vec![Sums::default(); chart.buckets];
        let start_ms = chart.page_start(query.after_ms);
        let from = Bucket {
            instance: query.instance_id.clone(),
            start_ms,
        };
        let mut ended = None;
        if chart.resolution == Resolution::Raw {
            ended = self
                .read_rows(&from, chart.end_ms(), false, deadline, |at, row| {
                    let at_ms = u64::try_from(at.div_euclid(1000)).unwrap_or(0);
                    if let Some(sums) = chart.index(at_ms).and_then(|index| sums.get_mut(index)) {
                        sums.add(row);
                    }
                })
                .await?;
        } else {
            self.rollups
                .read(chart.resolution, from, chart.end_ms(), deadline, |at_ms, part| {
                    if let Some(sums) = chart.index(at_ms).and_then(|index| sums.get_mut(index)) {
                        sums.merge(&part);
                    }
                })
                .await?;
        }
        let buckets = sums.iter().enumerate().filter(|(_, sums)| sums.samples() > 0);
        let buckets = buckets.map(|(index, sums)| sums.bucket(chart.start_ms(index)));
        let (buckets, next) = chart.page(buckets, |bucket| bucket.at_ms, query.after_ms, ended)?;
        if buckets.is_empty() && next.is_none() {
            return Ok(VmSeries::default());
        }
        Ok(VmSeries {
            step_ms: chart.step_ms,
            resolution: chart.resolution,
            buckets,
            next,
        })
    }
}

/// A time this long ago, in Unix milliseconds.
fn before_now(time: Duration) -> u64 {
    unix_millis().saturating_sub(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}
