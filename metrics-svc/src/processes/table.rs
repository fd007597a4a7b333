//! The process table of a moment.

use std::{cmp::Ordering, time::Duration};

use shared::{
    api::processes::{Order, ProcessRow, ProcessSort, ProcessTable, ProcessesAtQuery},
    time::unix_millis,
};

use super::Processes;
use crate::MetricsError;

impl Processes {
    /// The table of the newest sample at or before the moment.
    pub(crate) async fn table(
        &self,
        query: &ProcessesAtQuery,
        limit: Duration,
    ) -> Result<ProcessTable, MetricsError> {
        // A sample within the millisecond that was asked for is not behind it.
        let end_ms = query.at_ms.unwrap_or_else(unix_millis).saturating_add(1);
        let Some(date) = self.sample_before(&query.instance_id, end_ms, limit).await? else {
            return Ok(ProcessTable::default());
        };
        let mut processes = self
            .rows_of(&query.instance_id, &date, query.name.as_ref(), limit)
            .await?;
        let total = processes.len() as u64;
        let order = query.order.unwrap_or_else(|| query.sort.usual_order());
        processes.sort_unstable_by(|one, other| compare(one, other, query.sort, order));
        processes.truncate(usize::from(query.limit.get()));
        Ok(ProcessTable {
            at_ms: self.offset.unix_millis_of(&date),
            total,
            processes,
        })
    }
}

fn compare(one: &ProcessRow, other: &ProcessRow, sort: ProcessSort, order: Order) -> Ordering {
    let disk = |row: &ProcessRow| row.disk_read + row.disk_write;
    let by = match sort {
        ProcessSort::Cpu => one.cpu_util.total_cmp(&other.cpu_util),
        ProcessSort::Mem => one.mem.total_cmp(&other.mem),
        ProcessSort::Disk => disk(one).total_cmp(&disk(other)),
        ProcessSort::Pid => one.pid.cmp(&other.pid),
        ProcessSort::Name => one.name.cmp(&other.name),
    };
    let by = match order {
        Order::Asc => by,
        Order::Desc => by.reverse(),
    };
    by.then_with(|| (one.pid, one.started_ms).cmp(&(other.pid, other.started_ms)))
}
