//! Updates the process names from dirty buckets: reads the process rows that a dirty bucket stands for, and adds
//! their names to those of the VM and day (see [`crate::names`]).
//!
//! A VM with very many rows gets a limited time per pass. What it has read by then is stored, and its other dirty buckets
//! stay for later passes.

mod day;
mod turns;

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
    time::Duration,
};

use bson::oid::ObjectId;
use futures::{StreamExt, stream};
use metrics::counter;
use tracing::warn;
use vmwatch_api::InstanceId;

use self::day::{Limits, days};
pub(super) use self::turns::Turns;
use super::{History, dirty_buckets::ProcessRows, follow::Touched};
use crate::{MetricsError, deadline::Deadline, names::day_of};

/// Number of VMs whose names are updated concurrently.
const MAX_CONCURRENT: usize = 2;
/// Time limit for the names of one chunk of dirty buckets. The names of the VMs that are left are updated in the next
/// pass, so that a VM with many names delays rollups only for a short time.
const TIME_LIMIT: Duration = Duration::from_secs(20);
/// Time limit for the names of one VM, so that it does not delay those of others.
const VM_TIME_LIMIT: Duration = Duration::from_secs(4);

/// Process rows of one VM in dirty buckets, with the ids of the entries.
type OfVm = Vec<(ObjectId, ProcessRows)>;

/// What became of the process rows of dirty buckets, by the ids of the entries.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// All rows were found, and their names are stored.
    pub(super) added: HashSet<ObjectId>,
    /// The days of the rows were read completely, and some of the rows do not exist.
    pub(super) missing: HashSet<ObjectId>,
    /// The last error.
    error: Option<MetricsError>,
    /// Whether the time limit passed before all rows were read.
    is_cut: bool,
}

impl History {
    /// Adds the names of the process rows in dirty buckets.
    pub(super) async fn update_names(&self, touched: &Touched) -> Named {
        let mut vms: BTreeMap<InstanceId, OfVm> = BTreeMap::new();
        for entry in touched.values().flatten() {
            if let Some(rows) = &entry.processes {
                let of_vm = vms.entry(entry.bucket.instance.clone()).or_default();
                of_vm.push((entry.id, rows.clone()));
            }
        }
        let deadline = Deadline::after(TIME_LIMIT);
        let results: Vec<_> = stream::iter(self.turns.order(vms))
            .map(async |(instance, of_vm)| {
                if deadline.left().is_err() {
                    return None;
                }
                let limits = Limits {
                    turn: deadline.at_most(VM_TIME_LIMIT),
                    deadline,
                };
                let named = self.names_of_vm(&instance, &of_vm, limits).await;
                self.turns.end(&instance, !named.is_cut);
                Some((instance, named))
            })
            .buffer_unordered(MAX_CONCURRENT)
            .filter_map(async |result| result)
            .collect()
            .await;
        let mut all = Named::default();
        let mut failed = (0_u64, None);
        for (instance, named) in results {
            all.added.extend(named.added);
            all.missing.extend(named.missing);
            if let Some(error) = named.error {
                failed = (failed.0 + 1, Some((instance, error)));
            }
        }
        if let (vms, Some((instance, error))) = failed {
            counter!("vmwatch_process_names_failed_total").increment(vms);
            let cause = error.cause();
            warn!(
                vms,
                instance_id = %instance, cause,
                "updating the process names of VMs failed; retrying; `instance_id` is the last of these VMs"
            );
        }
        all
    }

    /// Adds the names of one VM. After an error it continues with the next day.
    async fn names_of_vm(&self, instance: &InstanceId, of_vm: &OfVm, limits: Limits) -> Named {
        let mut named = Named::default();
        let (mut found, mut looked) = (HashSet::new(), HashSet::new());
        for (day_ms, ranges) in days(of_vm.iter().map(|(_, rows)| rows.time.clone())) {
            if named.is_cut {
                break;
            }
            match self.add_names(instance, day_ms, &ranges, limits).await {
                Ok(read) => {
                    found.extend(read.rows);
                    named.is_cut = read.is_cut;
                    if !read.is_cut {
                        looked.insert(day_ms);
                    }
                }
                // A replica of the newer version adds them; replicas of this version read the rows instead.
                Err(error @ MetricsError::NewerNames) => {
                    looked.insert(day_ms);
                    named.error = Some(error);
                }
                Err(error) => named.error = Some(error),
            }
            named.is_cut |= limits.turn.left().is_err();
        }
        // No block has rows of times before 1970, so there is nothing to read.
        let was_read = |micros: i64| micros < 0 || looked.contains(&day_of(micros));
        for (id, rows) in of_vm {
            if rows.rows.iter().all(|row| found.contains(row)) {
                named.added.insert(*id);
            } else if was_read(rows.time.start) && was_read(rows.time.end - 1) {
                named.missing.insert(*id);
            }
        }
        named
    }

    /// Adds the names of all process rows within a range of Unix microseconds.
    pub(crate) async fn rebuild_names(
        &self,
        instance: &InstanceId,
        time: Range<i64>,
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        let limits = Limits {
            turn: deadline,
            deadline,
        };
        for (day_ms, ranges) in days([time].into_iter()) {
            if self.add_names(instance, day_ms, &ranges, limits).await?.is_cut {
                return Err(MetricsError::DeadlinePassed);
            }
        }
        Ok(())
    }
}
