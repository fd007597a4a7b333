//! Processes of a VM: the process table of any moment, the history of processes, and their starts and ends. All of them
//! are computed from the process rows. The rows of one sample share a `create_date`, so a process table is a short
//! range of an index.

mod events;
mod row;
mod series;
mod table;

use std::{sync::Arc, time::Duration};

use bson::{Document, RawDocumentBuf, doc};
use mongodb::{Collection, IndexModel, options::IndexOptions};
use vmwatch_api::{
    InstanceId,
    history::TimeRange,
    processes::{ProcessName, ProcessRow},
    time::{CreateDate, UtcOffset, unix_millis},
};

use self::row::StoredProcess;
use crate::{
    MetricsError,
    database::find,
    deadline::Deadline,
    store::{RowKind, RowStore},
};

/// Time ranges that are searched for the newest process table before a moment, from short to long; a longer one is
/// searched only if the shorter ones contain none. Most tables are found within an agent's interval. MongoDB would find
/// the newest table in one step, but the substitute for MongoDB in development reads all rows in the range.
const STEPS: [Duration; 11] = [
    Duration::from_secs(2),
    Duration::from_secs(8),
    Duration::from_secs(32),
    Duration::from_mins(2),
    Duration::from_mins(8),
    Duration::from_mins(32),
    Duration::from_hours(2),
    Duration::from_hours(8),
    Duration::from_hours(24),
    Duration::from_hours(72),
    Duration::from_hours(168),
];
/// Maximum number of rows of a process table: twice the default `pid_max` of Linux.
const MOST_ROWS: i64 = 65_536;
/// Maximum number of restarts of a VM for which a process table is read: see [`Processes::tables`].
const MOST_CUTS: usize = 8;

/// Access to the process rows in the database.
pub(crate) struct Processes {
    rows: Arc<RowStore>,
    offset: UtcOffset,
}

impl Processes {
    /// Opens the process rows of this store.
    pub(crate) fn of(rows: &Arc<RowStore>) -> Self {
        Self {
            offset: rows.offset(),
            rows: Arc::clone(rows),
        }
    }

    /// Creates the index of ended processes. It contains only the last row of each process, so it costs nothing for
    /// other rows.
    pub(crate) async fn prepare(&self) -> Result<(), MetricsError> {
        let options = IndexOptions::builder()
            .name("instance_ended".to_owned())
            .partial_filter_expression(doc! { "shutdown_time": { "$gt": 0 } })
            .build();
        let ended = IndexModel::builder()
            .keys(doc! { "instance_id": 1, "shutdown_time": 1 })
            .options(options)
            .build();
        self.rows.collection(RowKind::Process).create_index(ended).await?;
        Ok(())
    }

    fn collection(&self) -> &Collection<RawDocumentBuf> {
        self.rows.reading(RowKind::Process)
    }

    /// Date of the newest sample before a moment, at most seven days older.
    async fn sample_before(
        &self,
        instance: &InstanceId,
        end_ms: u64,
        deadline: Deadline,
    ) -> Result<Option<String>, MetricsError> {
        let mut to_ms = end_ms;
        for step in STEPS {
            let from_ms = end_ms.saturating_sub(millis(step));
            let found = self.edge(instance, from_ms, to_ms, -1, deadline).await?;
            if found.is_some() {
                return Ok(found);
            }
            to_ms = from_ms;
        }
        Ok(None)
    }

    /// Date of the oldest sample at or after a moment, at most seven days later.
    async fn sample_after(
        &self,
        instance: &InstanceId,
        start_ms: u64,
        deadline: Deadline,
    ) -> Result<Option<String>, MetricsError> {
        let now_ms = unix_millis();
        let mut from_ms = start_ms;
        for step in STEPS {
            if from_ms >= now_ms {
                break;
            }
            let to_ms = start_ms.saturating_add(millis(step));
            let found = self.edge(instance, from_ms, to_ms, 1, deadline).await?;
            if found.is_some() {
                return Ok(found);
            }
            from_ms = to_ms;
        }
        Ok(None)
    }

    /// Date of the oldest (`direction` 1) or newest (`direction` -1) sample in a time range.
    async fn edge(
        &self,
        instance: &InstanceId,
        from_ms: u64,
        to_ms: u64,
        direction: i32,
        deadline: Deadline,
    ) -> Result<Option<String>, MetricsError> {
        let date = |millis| CreateDate::at_millis(millis, self.offset);
        let range = doc! { "$gte": date(from_ms).as_str(), "$lt": date(to_ms).as_str() };
        let query = self
            .collection()
            .find_one(doc! { "instance_id": instance.as_str(), "create_date": range })
            .projection(doc! { "_id": 0, "create_date": 1 })
            .sort(doc! { "create_date": direction, "_id": direction })
            .max_time(deadline.left()?);
        let row = find(self.collection(), query).await?;
        row.map_or(Ok(None), |row| Ok(Some(row.get_str("create_date")?.to_owned())))
    }

    /// Reads the rows of the sample with this date, of all processes or of those with one name.
    async fn rows_of(
        &self,
        instance: &InstanceId,
        date: &str,
        name: Option<&ProcessName>,
        deadline: Deadline,
    ) -> Result<Vec<StoredProcess>, MetricsError> {
        let mut filter = doc! { "instance_id": instance.as_str(), "create_date": date };
        if let Some(name) = name {
            filter.insert("cmd", name.as_str());
        }
        self.read(filter, doc! { "_id": 1 }, MOST_ROWS, deadline).await
    }

    /// Reads all processes of the sample with this date.
    async fn table_of(
        &self,
        instance: &InstanceId,
        date: &str,
        deadline: Deadline,
    ) -> Result<Vec<ProcessRow>, MetricsError> {
        let found = self.rows_of(instance, date, None, deadline).await?;
        Ok(found.into_iter().map(|stored| stored.row).collect())
    }

    /// Reads the last rows of the processes that ended in a time range, newest first.
    async fn ends(
        &self,
        instance: &InstanceId,
        range: TimeRange,
        most: i64,
        deadline: Deadline,
    ) -> Result<Vec<ProcessRow>, MetricsError> {
        let ended = doc! { "$gte": seconds(range.from_ms()), "$lt": seconds(range.to_ms()) };
        let filter = doc! { "instance_id": instance.as_str(), "shutdown_time": ended };
        let found = self
            .read(filter, doc! { "shutdown_time": -1 }, most, deadline)
            .await?;
        Ok(found.into_iter().map(|stored| stored.row).collect())
    }

    /// Reads process rows. The filter may use only fields of one index; callers check other conditions on the few rows
    /// that are returned. Otherwise the substitute for MongoDB in development would read the whole collection, and
    /// MongoDB itself would save little.
    async fn read(
        &self,
        filter: Document,
        sort: Document,
        most: i64,
        deadline: Deadline,
    ) -> Result<Vec<StoredProcess>, MetricsError> {
        let query = self
            .collection()
            .find(filter)
            .projection(row::projection())
            .sort(sort)
            .limit(most)
            .batch_size(2000)
            .max_time(deadline.left()?);
        let mut cursor = find(self.collection(), query).await?;
        let mut rows = Vec::new();
        while cursor.advance().await? {
            rows.push(row::read(cursor.current())?.1);
        }
        Ok(rows)
    }

    /// Reads process tables that together show all processes that ran in a time range and did not end in it. These are
    /// the first table after the range, the last table within it, and the last table before each time at which the VM
    /// was switched off with all its processes. The start of the oldest process in a table shows when the VM was
    /// started, and so where to look for the table before.
    async fn tables(
        &self,
        instance: &InstanceId,
        range: TimeRange,
        deadline: Deadline,
    ) -> Result<Vec<Vec<ProcessRow>>, MetricsError> {
        let mut tables = Vec::new();
        if let Some(date) = self.sample_after(instance, range.to_ms(), deadline).await? {
            tables.push(self.table_of(instance, &date, deadline).await?);
        }
        let mut end_ms = range.to_ms();
        for _ in 0..=MOST_CUTS {
            if end_ms <= range.from_ms() {
                break;
            }
            let Some(date) = self.sample_before(instance, end_ms, deadline).await? else {
                break;
            };
            let table = self.table_of(instance, &date, deadline).await?;
            let sampled_ms = self.offset.unix_millis_of(&date).unwrap_or(0);
            let up_ms = table.iter().map(|row| row.started_ms).min().unwrap_or(0);
            tables.push(table);
            if sampled_ms < range.from_ms() {
                break;
            }
            end_ms = up_ms.min(sampled_ms);
        }
        Ok(tables)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Converts Unix milliseconds to Unix seconds, as rows store them.
#[expect(
    clippy::cast_precision_loss,
    reason = "Unix milliseconds stay below 2^53 until long after the year 9999"
)]
fn seconds(millis: u64) -> f64 {
    millis as f64 / 1000.0
}
