//! The process table of a VM at a moment.

use std::cmp::Ordering;

use vmwatch_api::{
    InstanceId, first_page,
    processes::{Order, ProcessName, ProcessRow, ProcessSort, ProcessTable, ProcessesAtQuery, TablePosition},
    time::unix_millis,
};

use super::{
    Processes,
    row::{ALL, StoredProcess},
    series::tidy,
};
use crate::{
    MetricsError,
    deadline::Deadline,
    reads::{Budget, Only, Query, Row, Scan, micros},
    store::RowKind,
};

/// Within this time all parts of a sample arrive, if its date is ahead.
const PARTS_MICROS: i64 = 60_000_000;

impl Processes {
    /// Returns a page of the process table of the newest sample at or before the moment.
    pub(crate) async fn table(
        &self,
        query: &ProcessesAtQuery,
        deadline: Deadline,
    ) -> Result<ProcessTable, MetricsError> {
        let after = query.after.as_ref();
        let at_ms = after.map(|position| position.at_ms).or(query.at_ms);
        // A sample within the requested millisecond also counts as "at the moment".
        let end = micros(at_ms.unwrap_or_else(unix_millis)).saturating_add(1000);
        let Some(sample) = self
            .rows
            .sample_before(RowKind::Process, &query.instance_id, end, deadline)
            .await?
        else {
            return match after {
                None => Ok(ProcessTable::default()),
                Some(_) => Err(MetricsError::TableExpired),
            };
        };
        let mut processes = self
            .rows_of(&query.instance_id, &sample, query.name.as_ref(), deadline)
            .await?;
        let total = processes.len() as u64;
        let vm_cpu = processes.first().and_then(|process| process.vm_cpu);
        let short_lived = processes.first().and_then(|process| process.short_lived);
        let cpu_seconds: f64 = processes
            .iter()
            .filter_map(|process| process.row.cpu_seconds)
            .sum();
        let order = query.order.unwrap_or_else(|| query.sort.usual_order());
        processes.sort_unstable_by(|one, other| compare(one, other, query.sort, order));
        let sampled_ms = Some(sample.at_ms());
        let first = match after {
            None => 0,
            Some(position) => behind(&processes, sampled_ms, position).ok_or(MetricsError::TableExpired)?,
        };
        let listed = processes.get(first..).unwrap_or_default();
        let rows = listed.iter().map(|stored| &stored.row);
        let (page, more) = first_page(rows, usize::from(query.limit.get()));
        let next = match (
            page.len().checked_sub(1).and_then(|last| listed.get(last)),
            sampled_ms,
        ) {
            (Some(last), Some(at_ms)) if more => Some(TablePosition {
                at_ms,
                id: last.row_id().ok_or(MetricsError::NoCursor)?,
            }),
            _ => None,
        };
        Ok(ProcessTable {
            at_ms: sampled_ms,
            total,
            vm_cpu,
            cpu_seconds: tidy(cpu_seconds),
            short_lived,
            processes: page.into_iter().cloned().collect(),
            next,
        })
    }
}

impl Processes {
    /// Reads the rows of the sample that this row belongs to: of all processes, or of those with one name.
    pub(super) async fn rows_of(
        &self,
        instance: &InstanceId,
        sample: &Row,
        name: Option<&ProcessName>,
        deadline: Deadline,
    ) -> Result<Vec<StoredProcess>, MetricsError> {
        let mut query = Query::new(RowKind::Process, instance, &ALL).oldest_first();
        // The parts of a sample whose date is ahead have different effective dates, because they arrived one by one.
        query.time = sample.effective.saturating_sub(PARTS_MICROS)..sample.effective.saturating_add(1);
        if let Some(name) = name {
            query = query.only(Only::named(name.as_str()));
        }
        let budget = Budget::of_request(&self.rows);
        let mut scan = Scan::open(&self.rows, query, budget, deadline).await?;
        // A sample lies within two hours, so the table is complete however many processes it has.
        scan.least_hours = 2;
        let mut rows = Vec::new();
        let ended = scan
            .all(|row| {
                if row.create_date == sample.create_date {
                    rows.push(row);
                }
            })
            .await?;
        if ended.is_some() {
            return Err(MetricsError::TooMuch);
        }
        rows.iter()
            .map(|row| StoredProcess::read(&row.document))
            .collect()
    }
}

/// Returns the index of the first row after the cursor; `None` if the table or the row of the cursor is no longer
/// stored.
fn behind(processes: &[StoredProcess], sampled_ms: Option<u64>, position: &TablePosition) -> Option<usize> {
    if sampled_ms != Some(position.at_ms) {
        return None;
    }
    let found = processes
        .iter()
        .position(|stored| stored.row_id().as_ref() == Some(&position.id));
    found.map(|index| index + 1)
}

/// Compares two processes by the requested value. Equal processes are ordered by id, so that a table has the same order
/// on each of its pages.
fn compare(one: &StoredProcess, other: &StoredProcess, sort: ProcessSort, order: Order) -> Ordering {
    let ids = (one.id, other.id);
    let (one, other) = (&one.row, &other.row);
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
    by.then_with(|| (one.pid, one.started_ms, ids.0).cmp(&(other.pid, other.started_ms, ids.1)))
}
