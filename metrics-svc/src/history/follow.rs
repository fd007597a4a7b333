//! From the marks to the rollups and the newest rows: each touched bucket is read again whole and written whole.
//!
//! ```text
//! marks ─> rows of five minutes ─> 5m ─> of the hour ─> 1h ─> of the day ─> 1d ─> remove the marks
//!                     └─> newest row and sparkline of the VM
//! ```
//!
//! Every replica follows. Two that meet at the same mark write the same twice, which is harmless (see
//! [`super::rollups`]); a mark is removed last, so that a crash anywhere leaves it to whoever comes next.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bson::{RawDocumentBuf, doc, oid::ObjectId};
use futures::{StreamExt, TryStreamExt, stream};
use metrics::{counter, gauge, histogram};
use mongodb::Collection;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::{history::Resolution, time::CreateDate};

use super::{
    History,
    chart::{bucket_start, width_ms},
    late::{self, Moment},
    marks::{CHUNK, GIVEN_UP, Mark},
    rollups::Bucket,
    sums::{MEASURES, Sums, VmRow},
};
use crate::{MetricsError, database::find, deadline::Deadline, instances::Report, store::RowKind};

/// Buckets read at once, so that a follower never fills the pool of connections that requests share.
const AT_ONCE: usize = 4;
/// One chunk of marks; a database that takes longer is slow enough.
const DEADLINE: Duration = Duration::from_mins(1);

/// The marks of a bucket.
type Touched = BTreeMap<Bucket, Vec<Mark>>;

/// A bucket as its rows are now.
struct Fresh {
    sums: Sums,
    rows: HashSet<ObjectId>,
    moments: Vec<Moment>,
    report: Report,
}

impl History {
    /// Follows until shutdown.
    pub(crate) async fn follow(self: Arc<Self>, interval: Duration, shutdown: CancellationToken) {
        while shutdown.run_until_cancelled(sleep(interval)).await.is_some() {
            let started = Instant::now();
            if let Err(error) = self.pass(&shutdown).await {
                warn!(
                    cause = error.cause(),
                    "the rollups do not follow at the moment; trying again"
                );
            }
            histogram!("vmwatch_rollup_pass_seconds").record(started.elapsed().as_secs_f64());
        }
        info!("rollups stopped");
    }

    /// Works through all marks that there are, the oldest first.
    async fn pass(self: &Arc<Self>, shutdown: &CancellationToken) -> Result<(), MetricsError> {
        let mut behind = None;
        let mut left = 0_u32;
        while !shutdown.is_cancelled() {
            // In a task of its own: a driver's call is not safe to drop half-way.
            let work = {
                let this = Arc::clone(self);
                tokio::spawn(async move { this.chunk(behind).await })
            };
            let done = timeout(DEADLINE, work)
                .await
                .map_err(|_| MetricsError::Unanswered(DEADLINE))?;
            let chunk = done.map_err(|defect| MetricsError::Io(defect.into()))??;
            left = left.saturating_add(chunk.left);
            behind = chunk.last;
            if chunk.marks < CHUNK {
                break;
            }
        }
        gauge!("vmwatch_rollup_marks_left").set(left);
        Ok(())
    }

    /// One chunk of marks.
    async fn chunk(&self, behind: Option<ObjectId>) -> Result<Chunk, MetricsError> {
        let marks = self.marks.read(behind).await?;
        let (count, last) = (marks.len(), marks.last().map(|mark| mark.id));
        let mut touched = Touched::new();
        for mark in marks {
            touched.entry(mark.bucket.clone()).or_default().push(mark);
        }
        let fresh: BTreeMap<Bucket, Fresh> = stream::iter(touched.keys().cloned())
            .map(async |bucket| {
                let fresh = self.fresh(&bucket).await?;
                Ok::<_, MetricsError>((bucket, fresh))
            })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        self.write_five_minutes(&fresh).await?;
        let hours = self.roll_up(fresh.keys(), Resolution::Hour).await?;
        self.roll_up(hours.keys(), Resolution::Day).await?;
        let done = done(&touched, &fresh);
        let reports = fresh.into_iter().map(|(bucket, fresh)| {
            let marks = touched.get(&bucket).into_iter().flatten();
            fresh.report.reported(marks.map(|mark| mark.at).max())
        });
        self.instances.note(&reports.collect::<Vec<_>>()).await?;
        let left = count - done.len();
        self.marks.remove(done).await?;
        Ok(Chunk {
            marks: count,
            last,
            left: u32::try_from(left).unwrap_or(u32::MAX),
        })
    }

    /// Reads the rows of five minutes.
    async fn fresh(&self, bucket: &Bucket) -> Result<Fresh, MetricsError> {
        let mut fresh = Fresh {
            sums: Sums::default(),
            rows: HashSet::new(),
            moments: Vec::new(),
            report: Report::of(bucket.instance.clone()),
        };
        let end_ms = bucket.start_ms + width_ms(Resolution::FiveMinutes);
        let rows = self.rows.collection(RowKind::Vm);
        self.read_rows(rows, bucket, end_ms, Deadline::after(DEADLINE), |at_ms, row| {
            fresh.sums.add(row);
            fresh.rows.extend(row.id);
            fresh.moments.extend(self.moment(bucket, row));
            fresh.report.add(at_ms, row);
        })
        .await?;
        Ok(fresh)
    }

    /// Writes the buckets as their rows are now, and adds late rows to those whose first rows may be gone.
    async fn write_five_minutes(&self, fresh: &BTreeMap<Bucket, Fresh>) -> Result<(), MetricsError> {
        let mut whole = Vec::new();
        for (bucket, fresh) in fresh {
            if self.may_lack_rows(bucket) && self.add_late(bucket, &fresh.moments).await? {
                continue;
            }
            let micros: Vec<u32> = fresh.moments.iter().map(|moment| moment.micros).collect();
            whole.push((bucket, fresh.sums, late::encoded(&micros)));
        }
        self.rollups.write_five_minutes(whole.into_iter()).await
    }

    /// When a row was sampled, from the start of its bucket on.
    fn moment(&self, bucket: &Bucket, row: &VmRow<'_>) -> Option<Moment> {
        let micros = self.offset.unix_micros_of(row.create_date)?;
        Some(Moment {
            micros: u32::try_from(micros.checked_sub(bucket.start_ms * 1000)?).ok()?,
            values: row.values,
        })
    }

    /// Reads the VM rows of a range of time.
    pub(crate) async fn read_rows(
        &self,
        rows: &Collection<RawDocumentBuf>,
        from: &Bucket,
        to_ms: u64,
        deadline: Deadline,
        mut each: impl FnMut(u64, &VmRow<'_>),
    ) -> Result<(), MetricsError> {
        let date = |millis| CreateDate::at_millis(millis, self.offset);
        let range = doc! { "$gte": date(from.start_ms).as_str(), "$lt": date(to_ms).as_str() };
        let mut wanted = doc! { "create_date": 1 };
        wanted.extend(MEASURES.iter().map(|measure| ((*measure).to_owned(), 1.into())));
        let query = rows
            .find(doc! { "instance_id": from.instance.as_str(), "create_date": range })
            .projection(wanted)
            .max_time(deadline.left()?);
        let mut cursor = find(rows, query).await?;
        while cursor.advance().await? {
            let row = VmRow::of(cursor.current())?;
            match self.offset.unix_millis_of(row.create_date) {
                Some(at_ms) => each(at_ms, &row),
                None => counter!("vmwatch_unreadable_values_total").increment(1),
            }
        }
        Ok(())
    }

    /// Makes the buckets of a coarser resolution that finer ones lie in, and gives them back.
    async fn roll_up(
        &self,
        finer: impl Iterator<Item = &Bucket>,
        into: Resolution,
    ) -> Result<BTreeMap<Bucket, Sums>, MetricsError> {
        let (from, width) = match into {
            Resolution::Day => (Resolution::Hour, width_ms(Resolution::Day)),
            _ => (Resolution::FiveMinutes, width_ms(Resolution::Hour)),
        };
        let coarser = finer.map(|bucket| Bucket {
            instance: bucket.instance.clone(),
            start_ms: bucket_start(bucket.start_ms, width, self.offset.as_millis()),
        });
        let coarser: BTreeSet<Bucket> = coarser.collect();
        let rolled: BTreeMap<Bucket, Sums> = stream::iter(coarser)
            .map(async |bucket| {
                let mut sums = Sums::default();
                let end_ms = bucket.start_ms + width;
                self.rollups
                    .read_durable(
                        from,
                        bucket.clone(),
                        end_ms,
                        Deadline::after(DEADLINE),
                        |_, part| {
                            sums.merge(&part);
                        },
                    )
                    .await?;
                Ok::<_, MetricsError>((bucket, sums))
            })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        self.rollups.write(into, &rolled).await?;
        Ok(rolled)
    }
}

/// What became of a chunk.
struct Chunk {
    marks: usize,
    last: Option<ObjectId>,
    left: u32,
}

/// The marks all of whose rows were counted, and those that are given up.
fn done(touched: &Touched, fresh: &BTreeMap<Bucket, Fresh>) -> Vec<ObjectId> {
    let now = SystemTime::now();
    let mut done = Vec::new();
    for (bucket, marks) in touched {
        let Some(fresh) = fresh.get(bucket) else { continue };
        for mark in marks {
            let counted = mark.rows.iter().all(|row| fresh.rows.contains(row));
            if !counted && mark.at + GIVEN_UP > now {
                continue;
            }
            if !counted {
                counter!("vmwatch_rollup_marks_given_up_total").increment(1);
                warn!(instance = %bucket.instance, "rows that were to be stored never appeared; a mark is given up");
            }
            done.push(mark.id);
        }
    }
    done
}
