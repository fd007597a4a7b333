//! Measures how full the file system of the database is and how it grows. Measurements of the last week are kept in a
//! document of the collection of states, at most one per hour, so that all replicas know the growth:
//!
//! ```text
//! { _id: "disk_usage", newest_ms, points: [at_ms, used_bytes, at_ms, used_bytes, …] }
//! ```

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bson::{Bson, Document, doc};
use metrics::gauge;
use mongodb::Collection;
use vmwatch_api::{status::DatabaseDisk, time::unix_millis};

use crate::{
    MetricsError,
    store::{RowStore, STATE},
};

const ID: &str = "disk_usage";
/// Minimum time between two stored measurements.
const STORE_INTERVAL: Duration = Duration::from_hours(1);
/// Age up to which a measurement is used.
const WEEK: Duration = Duration::from_hours(168);
/// Minimum time over which the growth is computed.
const MIN_SPAN: Duration = Duration::from_hours(6);
const DAY: Duration = Duration::from_hours(24);

/// The last measurement of this replica.
pub(crate) struct DiskUsage {
    store: Arc<RowStore>,
    last: Mutex<Option<DatabaseDisk>>,
}

/// The number of bytes in use at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Point {
    at_ms: u64,
    used: u64,
}

impl DiskUsage {
    pub(crate) fn new(store: &Arc<RowStore>) -> Self {
        Self {
            store: Arc::clone(store),
            last: Mutex::default(),
        }
    }

    /// The last measurement; `None` if the database does not report the size of its file system.
    pub(crate) fn last(&self) -> Option<DatabaseDisk> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures the usage, and updates the metrics.
    pub(crate) async fn measure(&self) -> Result<(), MetricsError> {
        let stats = self.store.database().run_command(doc! { "dbStats": 1 }).await?;
        let Some((used, size)) = sizes(&stats) else {
            return Ok(());
        };
        gauge!("vmwatch_database_disk_used_bytes").set(float(used));
        gauge!("vmwatch_database_disk_size_bytes").set(float(size));
        let now_ms = unix_millis();
        let documents: Collection<Document> = self.store.beside(STATE);
        let points = history(&documents, used, now_ms).await?;
        let disk = disk(used, size, &points, now_ms);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(disk);
        Ok(())
    }
}

/// Reads the stored measurements, oldest first. Stores this one too if the newest is old enough.
async fn history(
    documents: &Collection<Document>,
    used: u64,
    now_ms: u64,
) -> Result<Vec<Point>, MetricsError> {
    let found = documents.find_one(doc! { "_id": ID }).await?;
    let mut points = found.as_ref().map(points_of).unwrap_or_default();
    let newest = points.last().map_or(0, |point| point.at_ms);
    if now_ms.saturating_sub(newest) < millis(STORE_INTERVAL) {
        return Ok(points);
    }
    points.retain(|point| now_ms.saturating_sub(point.at_ms) <= millis(WEEK));
    points.push(Point { at_ms: now_ms, used });
    let numbers = points.iter().flat_map(|point| [point.at_ms, point.used]);
    let numbers: Vec<Bson> = numbers.map(|number| integer(number).into()).collect();
    let fields = doc! { "newest_ms": integer(now_ms), "points": numbers };
    if found.is_some() {
        // Another replica may have stored a measurement meanwhile.
        let unchanged = doc! { "_id": ID, "newest_ms": integer(newest) };
        documents.update_one(unchanged, doc! { "$set": fields }).await?;
    } else {
        let added = documents.update_one(doc! { "_id": ID }, doc! { "$setOnInsert": fields });
        added.upsert(true).await?;
    }
    Ok(points)
}

fn points_of(state: &Document) -> Vec<Point> {
    let numbers = state.get_array("points").map(Vec::as_slice).unwrap_or_default();
    let pairs = numbers.chunks_exact(2).filter_map(|pair| match pair {
        [Bson::Int64(at), Bson::Int64(used)] => Some(Point {
            at_ms: u64::try_from(*at).ok()?,
            used: u64::try_from(*used).ok()?,
        }),
        _ => None,
    });
    pairs.collect()
}

/// Adds the growth since the first of the measurements of the last week.
fn disk(used: u64, size: u64, points: &[Point], now_ms: u64) -> DatabaseDisk {
    let first = points
        .iter()
        .map(|point| (now_ms.saturating_sub(point.at_ms), point.used))
        .find(|(age, _)| *age <= millis(WEEK));
    let bytes_per_day = first
        .filter(|(age, _)| *age >= millis(MIN_SPAN))
        .and_then(|(age, before)| {
            let grown = i128::from(used) - i128::from(before);
            i64::try_from(grown * i128::from(millis(DAY)) / i128::from(age)).ok()
        });
    let growth = bytes_per_day.and_then(|growth| u64::try_from(growth).ok());
    DatabaseDisk {
        used_bytes: used,
        size_bytes: size,
        bytes_per_day,
        days_left: growth.and_then(|growth| size.saturating_sub(used).checked_div(growth)),
    }
}

/// Returns used and total bytes of the database's file system, if the database server reports them.
fn sizes(stats: &Document) -> Option<(u64, u64)> {
    let total = number(stats, "fsTotalSize").filter(|&total| total > 0)?;
    Some((number(stats, "fsUsedSize")?, total))
}

fn number(stats: &Document, name: &str) -> Option<u64> {
    match *stats.get(name)? {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "sizes are whole numbers; the cast saturates"
        )]
        Bson::Double(number) => Some(number as u64),
        Bson::Int32(number) => u64::try_from(number).ok(),
        Bson::Int64(number) => u64::try_from(number).ok(),
        _ => None,
    }
}

#[expect(clippy::cast_precision_loss, reason = "an alert does not need byte precision")]
const fn float(number: u64) -> f64 {
    number as f64
}

fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const HOUR: u64 = 3_600_000;

    #[test]
    fn disk_usage_is_read_if_database_reports_it() {
        let stats = doc! { "ok": 1, "fsUsedSize": 3.5e9, "fsTotalSize": 10_000_000_000_i64 };
        assert_eq!(sizes(&stats), Some((3_500_000_000, 10_000_000_000)));
        assert_eq!(sizes(&doc! { "ok": 1, "fsUsedSize": 1 }), None);
        assert_eq!(
            sizes(&doc! { "ok": 1, "fsUsedSize": 0.0, "fsTotalSize": 0.0 }),
            None
        );
    }

    #[test]
    fn days_left_follow_from_the_growth_over_the_last_week() {
        let point = |hours_ago: u64, used: u64| Point {
            at_ms: NOW - hours_ago * HOUR,
            used,
        };
        for (points, growth, days) in [
            (vec![], None, None),
            (vec![point(5, 400)], None, None),
            (vec![point(48, 400), point(1, 590)], Some(100), Some(4)),
            // Older than a week.
            (vec![point(169, 0), point(24, 500)], Some(100), Some(4)),
            (vec![point(12, 650)], Some(-100), None),
            (vec![point(12, 600)], Some(0), None),
        ] {
            let disk = disk(600, 1000, &points, NOW);
            assert_eq!((disk.bytes_per_day, disk.days_left), (growth, days), "{points:?}");
        }
        assert_eq!(disk(1000, 1000, &[point(24, 900)], NOW).days_left, Some(0));
    }

    #[test]
    fn points_survive_their_document() {
        let state = doc! { "points": [1_i64, 2_i64, 3_i64, 4_i64, 5_i64] };
        let expected = [Point { at_ms: 1, used: 2 }, Point { at_ms: 3, used: 4 }];
        assert_eq!(points_of(&state), expected);
        assert_eq!(points_of(&doc! {}), []);
    }
}
