//! Reads all rows of a query, hour by hour.

use std::collections::HashSet;

use bson::{DateTime, RawDocument, RawDocumentBuf, doc};
use metrics::counter;
use mongodb::Cursor;
use vmwatch_blocks::RowId;

use super::{
    Budget, Order, Query, Row,
    decode::{Decoded, decode},
    flat::{self, Dates},
};
use crate::{
    MetricsError,
    blocks::{Expires, StoredBlock, hour_of},
    database::find,
    deadline::Deadline,
    documents::SAMPLED_AT,
    store::RowStore,
};

/// Maximum number of rows of an hour that are returned, because their ids are in memory: more than an agent may send in half
/// an hour. With them, a set of ids takes 27 MB.
const MAX_SEEN: usize = 1_835_008;
/// Number of blocks that the database returns together.
const BATCH: u32 = 32;

/// A cursor whose next document can be looked at before it is taken.
///
/// Blocks may be merged and deleted while a cursor is open. A cursor therefore ends before a block can be deleted that
/// was merged after the cursor was opened.
pub(super) struct Peek {
    cursor: Cursor<RawDocumentBuf>,
    deadline: Deadline,
    ready: bool,
    done: bool,
}

impl Peek {
    pub(super) const fn new(cursor: Cursor<RawDocumentBuf>, deadline: Deadline) -> Self {
        Self {
            cursor,
            deadline,
            ready: false,
            done: false,
        }
    }

    /// The next document; it stays the next one until [`Peek::take`].
    pub(super) async fn next(&mut self) -> Result<Option<&RawDocument>, MetricsError> {
        if !self.ready && !self.done {
            self.ready = self.cursor.advance().await?;
            // The program may have been stopped before the database executed the command.
            self.deadline.left()?;
            self.done = !self.ready;
        }
        Ok(self.ready.then(|| self.cursor.current()))
    }

    pub(super) const fn take(&mut self) {
        self.ready = false;
    }
}

/// Finds the blocks that may have rows of the query, in its order.
pub(super) async fn blocks(
    store: &RowStore,
    query: &Query<'_>,
    batch: u32,
    deadline: Deadline,
) -> Result<Peek, MetricsError> {
    let deadline = deadline.at_most(store.longest_read());
    let blocks = if query.durable {
        store.blocks()
    } else {
        store.reading_blocks()
    };
    let direction = match query.order {
        Order::Newest => -1,
        Order::Oldest => 1,
    };
    // A block lies within one hour, so one that ends in the time range begins at the earliest with its first hour.
    let from = DateTime::from_millis(hour_of(query.time.start).div_euclid(1000));
    let to = DateTime::from_millis(query.time.end.saturating_add(999).div_euclid(1000));
    // The filter has no other fields: with a further one, the development database reads all blocks of the VM.
    let find_blocks = blocks
        .find(doc! {
            "instance_id": query.instance.as_str(),
            "kind": query.kind.name(),
            "from": { "$gte": from, "$lt": to },
        })
        .projection(doc! { "from": 1, "to": 1, "data": 1, "expires": 1 })
        .sort(doc! { "from": direction })
        .batch_size(batch)
        .max_time(deadline.left()?);
    Ok(Peek::new(find(blocks, find_blocks).await?, deadline))
}

/// Counts and logs a block whose document lacks a field.
pub(super) fn note_unreadable(query: &Query<'_>, document: &RawDocument) {
    counter!("vmwatch_blocks_unreadable_total", "reason" => "corrupt").increment(1);
    tracing::warn!(
        instance_id = %query.instance, block = ?document.get("_id"),
        "a block of stored rows lacks a field; its rows are missing in answers"
    );
}

/// Reads all rows of a query, hour by hour in its order. Within an hour the rows have no order.
pub(crate) struct Scan<'a> {
    store: &'a RowStore,
    query: Query<'a>,
    deadline: Deadline,
    pub(crate) budget: Budget,
    blocks: Peek,
    flat: Option<Peek>,
    /// When the last block that was read expires.
    pub(crate) expires: Expires,
    /// The last internal date of flat rows, for a durable query.
    pub(crate) flat_date: Expires,
    /// The ids of the rows of the hour.
    seen: HashSet<RowId>,
    /// Number of hours that were read.
    hours: usize,
    /// Number of hours that are read whatever the budget, so that a request never ends where it began.
    pub(crate) least_hours: usize,
}

/// What came next in a scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// All rows of the hour that begins at this time (Unix microseconds) were read.
    Hour(i64),
    /// The request has decoded as much as it may. The rows of the hour that begins at this time were not all read.
    OverBudget(i64),
    /// There are no more rows.
    End,
}

impl<'a> Scan<'a> {
    pub(crate) async fn open(
        store: &'a RowStore,
        query: Query<'a>,
        budget: Budget,
        deadline: Deadline,
    ) -> Result<Self, MetricsError> {
        let flat = match store.flat_rows(query.kind, query.durable, deadline).await? {
            Some(rows) => {
                let cursor = flat::open(rows, store.offset(), &query, Dates::Within, 0, deadline).await?;
                Some(Peek::new(cursor, deadline))
            }
            None => None,
        };
        Ok(Self {
            blocks: blocks(store, &query, BATCH, deadline).await?,
            store,
            query,
            deadline,
            budget,
            flat,
            expires: Expires::NoRows,
            flat_date: Expires::NoRows,
            seen: HashSet::new(),
            hours: 0,
            least_hours: 1,
        })
    }

    /// Reads the rows of all hours. Returns the start of the hour whose rows were not all read, if the budget ended.
    pub(crate) async fn all(&mut self, mut each: impl FnMut(Row)) -> Result<Option<i64>, MetricsError> {
        loop {
            match self.hour(&mut each).await? {
                Step::Hour(_) => {}
                Step::OverBudget(hour) => return Ok(Some(hour)),
                Step::End => return Ok(None),
            }
        }
    }

    /// Reads the rows of the next hour that has any.
    pub(crate) async fn hour(&mut self, mut each: impl FnMut(Row)) -> Result<Step, MetricsError> {
        self.seen.clear();
        let Some(hour) = self.next_hour().await? else {
            return Ok(Step::End);
        };
        loop {
            self.budget.admit(self.deadline).await?;
            let Some(document) = self.blocks.next().await? else {
                break;
            };
            match StoredBlock::from_document(document) {
                None => note_unreadable(&self.query, document),
                Some(block) if block.hour() != hour => break,
                Some(block) if block.is_outside(&self.query.time) => {}
                Some(block) => match decode(&block, &self.query, None, &mut self.budget) {
                    Decoded::OverBudget if self.hours < self.least_hours => {
                        self.budget.refill();
                        continue;
                    }
                    Decoded::OverBudget => return Ok(Step::OverBudget(hour)),
                    Decoded::Rows(rows) => {
                        self.expires = self.expires.max(block.expires);
                        let seen = &mut self.seen;
                        rows.into_iter()
                            .filter(|row| row.id.is_none_or(|id| seen.insert(id)))
                            .for_each(&mut each);
                    }
                },
            }
            if self.seen.len() > MAX_SEEN {
                return Err(MetricsError::TooMuch);
            }
            self.blocks.take();
        }
        while let Some(flat) = &mut self.flat {
            let Some(document) = flat.next().await? else { break };
            let row = flat::row(document, self.store.offset())?;
            let date = document.get_datetime(SAMPLED_AT);
            let date = date.map_or(Expires::Never, |at| Expires::At(at.timestamp_millis()));
            if hour_of(row.effective) != hour {
                break;
            }
            if !self.budget.take(row.document.as_bytes().len()) {
                if self.hours >= self.least_hours {
                    return Ok(Step::OverBudget(hour));
                }
                self.budget.refill();
            }
            flat.take();
            self.flat_date = self.flat_date.max(date);
            if row.id.is_none_or(|id| self.seen.insert(id)) {
                each(row);
            }
            if self.seen.len() > MAX_SEEN {
                return Err(MetricsError::TooMuch);
            }
            self.budget.admit(self.deadline).await?;
        }
        self.hours += 1;
        Ok(Step::Hour(hour))
    }

    /// The hour of the next row or block.
    async fn next_hour(&mut self) -> Result<Option<i64>, MetricsError> {
        let block = loop {
            let Some(document) = self.blocks.next().await? else {
                break None;
            };
            match StoredBlock::from_document(document) {
                Some(block) => break Some(block.hour()),
                None => note_unreadable(&self.query, document),
            }
            self.blocks.take();
        };
        let flat = match &mut self.flat {
            None => None,
            Some(flat) => match flat.next().await? {
                Some(document) => Some(hour_of(flat::row(document, self.store.offset())?.effective)),
                None => None,
            },
        };
        Ok(match (block, flat, self.query.order) {
            (Some(block), Some(flat), Order::Newest) => Some(block.max(flat)),
            (Some(block), Some(flat), Order::Oldest) => Some(block.min(flat)),
            (block, flat, _) => block.or(flat),
        })
    }
}
