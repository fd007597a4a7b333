//! History of the selected processes as one series, with their usage summed.

use std::collections::HashMap;

use vmwatch_api::processes::{ProcessBucket, ProcessHistoryQuery, ProcessRow, ProcessRowKind, ProcessSeries};

use super::{
    Processes,
    row::{StoredProcess, USAGE},
};
use crate::{
    MetricsError,
    deadline::Deadline,
    history::{Chart, sums::Sum},
    reads::{Budget, Only, Query, Scan, Step},
    store::RowKind,
};

/// Total usage of the selected processes at one moment.
#[derive(Debug, Default)]
struct Moment {
    at_ms: u64,
    running: f64,
    cpu_util: f64,
    mem: f64,
    disk_read: f64,
    disk_write: f64,
}

impl Moment {
    fn add(&mut self, row: &ProcessRow) {
        // The processes of a summed row mostly have ended.
        if row.ended_ms.is_none() && row.kind == ProcessRowKind::Process {
            self.running += 1.0;
        }
        self.cpu_util += row.cpu_util;
        self.mem += row.mem;
        self.disk_read += row.disk_read;
        self.disk_write += row.disk_write;
    }
}

/// Aggregates of the moments in a time bucket.
#[derive(Debug, Clone, Default)]
struct Moments {
    count: u64,
    running: Sum,
    cpu_util: Sum,
    mem: Sum,
    disk_read: Sum,
    disk_write: Sum,
}

impl Moments {
    fn add(&mut self, moment: &Moment) {
        self.count += 1;
        self.running.add(moment.running);
        self.cpu_util.add(tidy(moment.cpu_util));
        self.mem.add(tidy(moment.mem));
        self.disk_read.add(tidy(moment.disk_read));
        self.disk_write.add(tidy(moment.disk_write));
    }

    fn bucket(&self, at_ms: u64) -> ProcessBucket {
        let stat = |sum: &Sum| sum.stat().unwrap_or_default();
        ProcessBucket {
            at_ms,
            count: self.count,
            processes: stat(&self.running),
            cpu_util: stat(&self.cpu_util),
            mem: stat(&self.mem),
            disk_read: stat(&self.disk_read),
            disk_write: stat(&self.disk_write),
        }
    }
}

impl Processes {
    /// Returns the history of the processes that the query selects.
    pub(crate) async fn series(
        &self,
        query: &ProcessHistoryQuery,
        deadline: Deadline,
    ) -> Result<ProcessSeries, MetricsError> {
        let chart = Chart::of_rows(query.range, query.points, self.offset.as_millis());
        let mut moments = vec![Moments::default(); chart.buckets];
        let start_ms = chart.page_start(query.after_ms);
        let only = match (query.process.name(), query.process.pid()) {
            (Some(name), _) => Only::named(name.as_str()),
            (None, Some(pid)) => Only::Pid(pid),
            (None, None) => Only::All,
        };
        let rows = Query::new(RowKind::Process, &query.instance_id, &USAGE)
            .within_ms(start_ms, chart.end_ms())
            .oldest_first()
            .only(only);
        let ended = self
            .add_moments(rows, query.process.pid(), &chart, &mut moments, deadline)
            .await?;
        let buckets = moments
            .iter()
            .enumerate()
            .filter(|(_, moments)| moments.count > 0)
            .map(|(index, moments)| moments.bucket(chart.start_ms(index)));
        let (buckets, next) = chart.page(buckets, |bucket| bucket.at_ms, query.after_ms, ended)?;
        let is_empty = buckets.is_empty() && next.is_none();
        Ok(ProcessSeries {
            step_ms: if is_empty { 0 } else { chart.step_ms },
            buckets,
            next,
        })
    }

    /// Adds the samples of the processes that the query selects; with a pid, only of those that also have the pid.
    /// Returns the start of the first hour whose rows were not all read, if there were too many.
    async fn add_moments(
        &self,
        rows: Query<'_>,
        pid: Option<u32>,
        chart: &Chart,
        moments: &mut [Moments],
        deadline: Deadline,
    ) -> Result<Option<i64>, MetricsError> {
        let budget = Budget::of_request(&self.rows);
        let mut scan = Scan::open(&self.rows, rows, budget, deadline).await?;
        loop {
            // The rows of one sample have one date, and nearly always one hour.
            let mut of_hour: HashMap<String, Moment> = HashMap::new();
            let mut unreadable = None;
            let step = scan.hour(|row| match StoredProcess::read(&row.document) {
                Ok(stored) if pid.is_none_or(|pid| stored.row.has_pid(pid)) => {
                    let at_ms = row.at_ms();
                    let moment = of_hour.entry(row.create_date).or_default();
                    moment.at_ms = moment.at_ms.max(at_ms);
                    moment.add(&stored.row);
                }
                Ok(_) => {}
                Err(error) => unreadable = Some(error),
            });
            let step = step.await?;
            if let Some(error) = unreadable {
                return Err(error);
            }
            match step {
                Step::Hour(_) => {}
                Step::OverBudget(hour) => return Ok(Some(hour)),
                Step::End => return Ok(None),
            }
            for moment in of_hour.values() {
                let index = chart.index(moment.at_ms);
                if let Some(moments) = index.and_then(|index| moments.get_mut(index)) {
                    moments.add(moment);
                }
            }
        }
    }
}

/// Rounds a sum to three decimals, to remove the rounding errors of adding floats.
pub(crate) fn tidy(sum: f64) -> f64 {
    (sum * 1000.0).round() / 1000.0
}
