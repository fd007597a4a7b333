//! The processes of a VM that used the most of a resource over a time range.

mod usage;

use std::ops::Range;

use vmwatch_api::alerts::culprits::{TopMeasure, TopQuery, TopReply};

use self::usage::{Usage, VmValue};
use super::{
    Processes,
    row::{ALL, StoredProcess},
};
use crate::{
    MetricsError,
    deadline::Deadline,
    names::NameMatch,
    reads::{Budget, Query, Scan},
    store::RowKind,
    vm_row::VmRow,
};

/// The fields of a VM's row that the VM's amount is computed from.
const VM_COLUMNS: [&str; 3] = ["mem", "disk_read", "disk_write"];

impl Processes {
    /// Adds up what each process used. If the time range has more rows than a request may decode, the answer includes only
    /// its end.
    pub(crate) async fn top(&self, query: &TopQuery, deadline: Deadline) -> Result<TopReply, MetricsError> {
        let (instance, range) = (&query.instance_id, query.range());
        let name = query.name.as_ref().map(|name| NameMatch::exact(name.as_str()));
        let mut usage = Usage::new(query.measure, name);
        let rows = Query::new(RowKind::Process, instance, &ALL).within_ms(range.from_ms(), range.to_ms());
        let budget = Budget::of_request(&self.rows);
        let mut scan = Scan::open(&self.rows, rows, budget, deadline).await?;
        // A part of an hour is a valid answer, and the limit on decoded bytes also limits the number of processes.
        scan.least_hours = 0;
        let mut unreadable = None;
        let ended = scan.all(|row| match StoredProcess::read(&row.document) {
            Ok(stored) => usage.add(row, stored),
            Err(error) => unreadable = Some(error),
        });
        let partial = ended.await?.is_some();
        drop(scan);
        if let Some(error) = unreadable {
            return Err(error);
        }
        let Some(times) = usage.times() else {
            return Ok(TopReply {
                partial,
                ..TopReply::default()
            });
        };
        let mut before = None;
        if usage.needs_intervals() {
            let previous = self
                .rows
                .sample_before(RowKind::Process, instance, *times.start(), deadline);
            before = previous.await?.map(|sample| sample.effective);
        }
        // The VM's rows of the time that the samples of processes cover.
        let covered = before.unwrap_or(times.start() - 1) + 1..times.end() + 1;
        let vm = match query.measure {
            TopMeasure::Cpu => Vec::new(),
            TopMeasure::Mem | TopMeasure::Disk => self.vm_values(query, covered, deadline).await?,
        };
        Ok(TopReply {
            partial,
            ..usage.into_reply(before, &vm, query.limit().into())
        })
    }

    /// Reads the VM's memory usage (percent) or its disk rate (KiB/s) in each sample of a time range.
    async fn vm_values(
        &self,
        query: &TopQuery,
        time: Range<i64>,
        deadline: Deadline,
    ) -> Result<Vec<VmValue>, MetricsError> {
        let mut rows = Query::new(RowKind::Vm, &query.instance_id, &VM_COLUMNS);
        rows.time = time;
        let budget = Budget::of_request(&self.rows);
        let mut scan = Scan::open(&self.rows, rows, budget, deadline).await?;
        let mut values = Vec::new();
        let mut unreadable = None;
        let ended = scan.all(|row| match VmRow::from_document(&row.document) {
            Ok(read) => {
                let value = match query.measure {
                    TopMeasure::Cpu => None,
                    TopMeasure::Mem => read.values.mem,
                    TopMeasure::Disk => read
                        .values
                        .disk_read
                        .zip(read.values.disk_write)
                        .map(|(r, w)| r + w),
                };
                let at = row.effective;
                values.extend(value.map(|value| VmValue { at, value }));
            }
            Err(error) => unreadable = Some(error),
        });
        ended.await?;
        unreadable.map_or(Ok(values), Err)
    }
}
