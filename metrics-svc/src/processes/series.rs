//! History of the selected processes as one series, with their usage summed.

use std::collections::BTreeSet;

use bson::doc;
use vmwatch_api::{
    first_page,
    processes::{ProcessBucket, ProcessHistoryQuery, ProcessRow, ProcessSeries},
    time::CreateDate,
};

use super::{
    Processes,
    row::{self, StoredProcess},
};
use crate::{
    MetricsError,
    database::find,
    deadline::Deadline,
    history::{Chart, sums::Sum},
};

/// Maximum number of names under which a pid is followed.
const MOST_NAMES: usize = 16;
/// Maximum number of ended processes, the newest, that are searched for the names of a pid.
const MOST_ENDS: i64 = 100_000;

/// Total usage of the selected processes at one moment.
#[derive(Debug, Default)]
struct Moment {
    date: String,
    running: f64,
    cpu_util: f64,
    mem: f64,
    disk_read: f64,
    disk_write: f64,
}

impl Moment {
    fn add(&mut self, row: &ProcessRow) {
        if row.ended_ms.is_none() {
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
        let names = match (query.process.name(), query.process.pid()) {
            (Some(name), _) => BTreeSet::from([name.as_str().to_owned()]),
            (None, Some(pid)) => self.names_of(query, pid, deadline).await?,
            (None, None) => BTreeSet::new(),
        };
        let mut moments = vec![Moments::default(); chart.buckets];
        for name in &names {
            self.add_moments(query, name, &chart, &mut moments, deadline)
                .await?;
        }
        let buckets = moments
            .iter()
            .enumerate()
            .filter(|(_, moments)| moments.count > 0)
            .map(|(index, moments)| moments.bucket(chart.start_ms(index)))
            .filter(|bucket| query.after_ms.is_none_or(|after| bucket.at_ms > after));
        let (buckets, more) = first_page(buckets, chart.buckets);
        let step_ms = if buckets.is_empty() { 0 } else { chart.step_ms };
        Ok(ProcessSeries {
            step_ms,
            buckets,
            more,
        })
    }

    /// Adds the samples of the processes with this name; if the query has a pid, only of those with the pid.
    async fn add_moments(
        &self,
        query: &ProcessHistoryQuery,
        name: &str,
        chart: &Chart,
        moments: &mut [Moments],
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        let date = |millis| CreateDate::at_millis(millis, self.offset);
        let range = doc! { "$gte": date(chart.first_ms).as_str(), "$lt": date(chart.end_ms()).as_str() };
        let filter = doc! { "instance_id": query.instance_id.as_str(), "cmd": name, "create_date": range };
        let rows = self
            .collection()
            .find(filter)
            .projection(row::projection())
            .sort(doc! { "create_date": 1, "_id": 1 })
            .batch_size(5000)
            .max_time(deadline.left()?);
        let mut cursor = find(self.collection(), rows).await?;
        let mut moment = Moment::default();
        let mut finish = |moment: &Moment| {
            let at_ms = self.offset.unix_millis_of(&moment.date);
            let index = at_ms.and_then(|at_ms| chart.index(at_ms));
            if let Some(moments) = index.and_then(|index| moments.get_mut(index)) {
                moments.add(moment);
            }
        };
        while cursor.advance().await? {
            let (date, StoredProcess { row, .. }) = row::read(cursor.current())?;
            // The filter cannot select the pid, because no index contains it together with the name (see `read`).
            if query.process.pid().is_some_and(|pid| pid != row.pid) {
                continue;
            }
            if date != moment.date {
                finish(&moment);
                moment = Moment {
                    date: date.to_owned(),
                    ..Moment::default()
                };
            }
            moment.add(&row);
        }
        finish(&moment);
        Ok(())
    }

    /// Returns the names under which a pid was seen, from the last rows of processes that ended and from process tables
    /// that show the others. There is an index by name but none by pid, which would cost an entry for every row.
    async fn names_of(
        &self,
        query: &ProcessHistoryQuery,
        pid: u32,
        deadline: Deadline,
    ) -> Result<BTreeSet<String>, MetricsError> {
        let (instance, range) = (&query.instance_id, query.range);
        let ends = self.ends(instance, range, MOST_ENDS, deadline).await?;
        let mut tables = self.tables(instance, range, deadline).await?;
        // A process that executes another program during its life has one name at the beginning of the range and
        // another at its end.
        if let Some(date) = self.sample_after(instance, range.from_ms(), deadline).await? {
            tables.push(self.table_of(instance, &date, deadline).await?);
        }
        let rows = ends.into_iter().chain(tables.into_iter().flatten());
        let names = rows.filter(|row| row.pid == pid).map(|row| row.name);
        Ok(names.take(MOST_NAMES).collect())
    }
}

/// Rounds a sum to three decimals, to remove the rounding errors of adding floats.
fn tidy(sum: f64) -> f64 {
    (sum * 1000.0).round() / 1000.0
}
