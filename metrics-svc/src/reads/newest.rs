//! Reads the newest (or oldest) rows of a query.

use std::{
    cmp::Ordering,
    collections::HashMap,
    time::{Duration, SystemTime},
};

use vmwatch_blocks::RowId;

use super::{
    Budget, Order, Query, Row, RowKey,
    decode::{Decoded, First, decode},
    flat::{self, Dates},
    scan::{self, Peek},
};
use crate::{
    MetricsError,
    blocks::{EXPECTED_CLOSED_AFTER, HOUR_MICROS, StoredBlock},
    deadline::Deadline,
    documents::micros_of,
    store::RowStore,
};

/// Number of blocks that the database returns together.
const BATCH: usize = 32;

/// How many rows to read, and from where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Most<'a> {
    pub(crate) rows: usize,
    /// Only rows that come after this one in the order of the query.
    pub(crate) after: Option<RowKey<'a>>,
}

/// The first rows of a query, in its order.
#[derive(Debug)]
pub(crate) struct Newest<'a> {
    most: Most<'a>,
    order: Order,
    rows: Vec<Row>,
    /// The bound of the first block.
    begun_at: Option<i64>,
    /// The rows are complete up to this effective date, because the budget ended there.
    pub(crate) ended_at: Option<i64>,
}

impl<'a> Newest<'a> {
    pub(crate) const fn new(most: Most<'a>, order: Order) -> Self {
        Self {
            most,
            order,
            rows: Vec::new(),
            begun_at: None,
            ended_at: None,
        }
    }

    /// Whether reading further rows changes nothing.
    pub(crate) fn is_over(&mut self) -> bool {
        self.ended_at.is_some() || self.is_full()
    }

    pub(crate) fn is_full(&mut self) -> bool {
        if self.rows.len() >= self.most.rows {
            self.tidy();
        }
        self.rows.len() >= self.most.rows
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows found, in the order of the query.
    pub(crate) fn into_rows(mut self) -> Vec<Row> {
        self.tidy();
        if let Some(end) = self.ended_at {
            // A row at or beyond the end may come after rows that were not read.
            let (order, end) = (self.order, (end, "", None));
            self.rows
                .retain(|row| compare(order, row.key(), end) == Ordering::Less && row.effective != end.0);
        }
        self.rows
    }

    /// Adds the rows of the query, which must come after those of earlier queries.
    pub(crate) async fn read(
        &mut self,
        store: &RowStore,
        query: &Query<'_>,
        budget: &mut Budget,
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        if query.time.is_empty() || self.is_over() {
            return Ok(());
        }
        self.read_flat(store, query, deadline).await?;
        let batch = u32::try_from((self.most.rows + 1).clamp(2, BATCH)).unwrap_or(2);
        let mut blocks = scan::blocks(store, query, batch, deadline).await?;
        self.read_blocks(&mut blocks, query, budget, deadline).await
    }

    async fn read_blocks(
        &mut self,
        blocks: &mut Peek,
        query: &Query<'_>,
        budget: &mut Budget,
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        let closed = SystemTime::now()
            .checked_sub(EXPECTED_CLOSED_AFTER)
            .map_or(0, micros_of);
        loop {
            budget.admit(deadline).await?;
            let Some(document) = blocks.next().await? else {
                return Ok(());
            };
            if let Some(block) = StoredBlock::from_document(document) {
                let bound = self.bound(&block, query, closed);
                let begun_at = *self.begun_at.get_or_insert(bound);
                if self.is_complete_before(bound) {
                    return Ok(());
                }
                if !block.is_outside(&query.time) && !self.is_complete_before(self.nearest(&block)) {
                    // Some rows with the date at which the last page ended were on that page.
                    let first = First {
                        rows: self.most.rows,
                        and_at: self.most.after.map(|(effective, ..)| effective),
                    };
                    match decode(&block, query, Some(first), budget) {
                        Decoded::OverBudget if bound == begun_at => {
                            budget.refill();
                            continue;
                        }
                        Decoded::OverBudget => {
                            self.ended_at = Some(bound);
                            return Ok(());
                        }
                        Decoded::Rows(rows) => self.add(rows),
                    }
                }
            } else {
                scan::note_unreadable(query, document);
            }
            blocks.take();
        }
    }

    /// The effective date that no row of the query in this block or a later one comes before, in the order of the query.
    fn bound(&self, block: &StoredBlock<'_>, query: &Query<'_>, closed: i64) -> i64 {
        let bound = match self.order {
            Order::Oldest => return block.from.max(query.time.start),
            // Blocks of an hour that has not ended long ago have one date each, and blocks are sorted by it.
            Order::Newest if block.hour() + HOUR_MICROS > closed => block.to,
            Order::Newest => block.hour() + HOUR_MICROS - 1,
        };
        bound.min(query.time.end.saturating_sub(1))
    }

    /// The effective date that no row of this block comes before, in the order of the query.
    const fn nearest(&self, block: &StoredBlock<'_>) -> i64 {
        match self.order {
            Order::Oldest => block.from,
            Order::Newest => block.to,
        }
    }

    /// Whether there are enough rows that come before every row from this effective date on.
    fn is_complete_before(&mut self, bound: i64) -> bool {
        if !self.is_full() {
            return false;
        }
        let last = self.rows.last().map(|row| row.effective);
        last.is_some_and(|last| match self.order {
            Order::Newest => last > bound,
            Order::Oldest => last < bound,
        })
    }

    async fn read_flat(
        &mut self,
        store: &RowStore,
        query: &Query<'_>,
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        let Some(rows) = store.flat_rows(query.kind, query.durable, deadline).await? else {
            return Ok(());
        };
        let mut parts = vec![Dates::Within];
        let mut query = query.clone();
        if let Some((effective, date, Some(id))) = self.most.after {
            // Rows of that very moment are read apart, because there may be more of them than the page has rows.
            match query.order {
                Order::Newest => query.time.end = query.time.end.min(effective),
                Order::Oldest => query.time.start = query.time.start.max(effective.saturating_add(1)),
            }
            parts.push(Dates::Tied(date, bson::oid::ObjectId::from_bytes(id)));
        }
        for part in parts {
            let mut cursor = flat::open(rows, store.offset(), &query, part, self.most.rows, deadline).await?;
            while cursor.advance().await? {
                self.add(vec![flat::row(cursor.current(), store.offset())?]);
            }
        }
        Ok(())
    }

    fn add(&mut self, rows: Vec<Row>) {
        let (order, after) = (self.order, self.most.after);
        let comes_after =
            |row: &Row| after.is_none_or(|after| compare(order, row.key(), after) == Ordering::Greater);
        self.rows.extend(rows.into_iter().filter(comes_after));
        if self.rows.len() > 2 * self.most.rows + 64 {
            self.tidy();
        }
    }

    /// Sorts the rows, drops all but the first arrival of each row, and keeps as many as wanted.
    fn tidy(&mut self) {
        let mut arrivals: HashMap<RowId, i64> = HashMap::with_capacity(self.rows.len());
        for row in &self.rows {
            if let Some(id) = row.id {
                let first = arrivals.entry(id).or_insert(row.effective);
                *first = row.effective.min(*first);
            }
        }
        self.rows
            .retain(|row| row.id.is_none_or(|id| arrivals.get(&id) == Some(&row.effective)));
        let order = self.order;
        self.rows
            .sort_by(|one, other| compare(order, one.key(), other.key()));
        self.rows
            .dedup_by(|one, other| one.id.is_some() && one.id == other.id);
        self.rows.truncate(self.most.rows);
    }
}

fn compare(order: Order, one: RowKey<'_>, other: RowKey<'_>) -> Ordering {
    match order {
        Order::Oldest => one.cmp(&other),
        Order::Newest => other.cmp(&one),
    }
}

/// Start of the hour two hours before a time, in Unix microseconds.
pub(crate) fn two_hours_before(micros: i64) -> i64 {
    crate::blocks::hour_of(
        micros.saturating_sub(i64::try_from(Duration::from_hours(2).as_micros()).unwrap_or(0)),
    )
}
