//! The newest rows of one source in memory, and their comparison with the database.

use std::{
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use metrics::counter;
use tracing::warn;
use vmwatch_api::{InstanceId, agents::Sender, vms::NewestSample};
use vmwatch_bus::vms::{MAX_ROWS, Row, Rows};

use crate::{
    MetricsError,
    deadline::Deadline,
    instances::{Instances, LastReport},
    store::{RowKind, RowStore},
};

/// Maximum number of VMs in a query for the dates of last reports.
const DATES: u16 = 1000;
/// Maximum number of VMs in a query for rows.
const CHUNK: usize = 250;

/// The newest rows of one source: of agents or of hypervisors.
pub(super) struct Table {
    instances: Instances,
    rows: RwLock<Rows>,
    /// A VM that is missing in the database is kept for this time after its last report, because the collection of VMs
    /// is updated only with the rollups.
    grace_ms: u64,
}

impl Table {
    pub(super) fn new(store: &RowStore, kind: RowKind, grace: Duration) -> Self {
        Self {
            instances: Instances::new(store, kind),
            rows: RwLock::default(),
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Rows> {
        self.rows.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Rows> {
        self.rows.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a row that was stored at this time.
    pub(super) fn note(
        &self,
        id: &InstanceId,
        sample: NewestSample,
        reported_ms: u64,
        sender: Option<&Sender>,
    ) {
        if !self.write().note(id, sample, reported_ms, sender) {
            counter!("vmwatch_vms_omitted_total").increment(1);
        }
    }

    /// Reads the row of one VM from the database.
    pub(super) async fn load(&self, id: &InstanceId, deadline: Deadline) -> Result<(), MetricsError> {
        let found = self.instances.get(id, deadline).await?;
        if let Some((id, row)) = found {
            self.write().merge(&id, row);
        }
        Ok(())
    }

    /// Compares the rows with the database: reads those that are newer, and removes the VMs that it does not have.
    pub(super) async fn compare(&self, begun_ms: u64, deadline: Deadline) -> Result<(), MetricsError> {
        let mut after = None;
        loop {
            let reports = self
                .instances
                .last_reports(after.as_ref(), DATES, deadline)
                .await?;
            let at_end = reports.len() < usize::from(DATES);
            let last = reports.last().map(|report| report.instance.clone());
            self.remove_missing(
                after.as_ref(),
                last.as_ref().filter(|_| !at_end),
                &reports,
                begun_ms,
            );
            let wanted = self.newer(&reports);
            for ids in wanted.chunks(CHUNK) {
                let rows = self.instances.read(ids, deadline).await?;
                let mut known = self.write();
                for (id, row) in rows {
                    known.merge(&id, row);
                }
            }
            if at_end || self.is_full() {
                break;
            }
            after = last;
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        let is_full = self.read().count() >= MAX_ROWS;
        if is_full {
            warn!(
                most = MAX_ROWS,
                "more VMs report than the list of VMs has room for; the others are listed without samples"
            );
        }
        is_full
    }

    /// The VMs whose reports in the database are newer than those in memory.
    fn newer(&self, reports: &[LastReport]) -> Vec<InstanceId> {
        let rows = self.read();
        let is_newer = |report: &&LastReport| {
            rows.get(&report.instance)
                .is_none_or(|row| row.sample.at_ms < report.at_ms || row.reported_ms < report.reported_ms)
        };
        let newer = reports.iter().filter(is_newer);
        newer.map(|report| report.instance.clone()).collect()
    }

    /// Removes the VMs after `after`, up to `until`, that the database does not have and that have not reported recently.
    fn remove_missing(
        &self,
        after: Option<&InstanceId>,
        until: Option<&InstanceId>,
        reports: &[LastReport],
        begun_ms: u64,
    ) {
        let is_stored = |id: &InstanceId| {
            let found = reports.binary_search_by(|report| report.instance.cmp(id));
            found.is_ok()
        };
        let is_old = |row: &Row| row.reported_ms.saturating_add(self.grace_ms) < begun_ms;
        let gone: Vec<_> = {
            let rows = self.read();
            let between = rows.between(after, until);
            let gone = between.filter(|(id, row)| !is_stored(id) && is_old(row));
            gone.map(|(id, _)| id.clone()).collect()
        };
        let mut rows = self.write();
        for id in gone {
            rows.remove(&id);
        }
    }
}
