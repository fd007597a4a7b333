//! Reads rows, from blocks and flat collections merged. Every read of rows is a [`Query`].
//!
//! ```text
//! newest ─ a limited number of the newest or oldest rows of a query
//! scan   ─ all rows of a query, hour by hour
//!            └─ decode: the rows of one block that a query selects
//!            └─ flat:   the rows of a flat collection
//! ```
//!
//! Rows are in the order of their effective dates, then of `create_date`, then of `_id`. A row that is stored several
//! times is returned once. A request decodes at most [`MAX_DECODED`] bytes; then its answer ends early, with a position
//! from which the next request continues. Only if the request would end where it began, it decodes more, one block after
//! another: the rows of an hour of a VM with very many processes.

mod budget;
mod decode;
mod export;
mod flat;
mod named;
mod newest;
mod page;
mod sample;
mod scan;

use std::ops::Range;

use bson::{RawDocumentBuf, oid::ObjectId};
use vmwatch_api::{
    InstanceId,
    time::{CreateDate, UtcOffset},
};
use vmwatch_blocks::RowId;

pub use self::page::PageQuery;
pub(crate) use self::{
    budget::{Budget, MAX_DECODED},
    decode::unreadable_reason,
    newest::{Most, Newest, two_hours_before},
    scan::{Scan, Step},
};
use crate::{documents::micros_of, names::NameMatch, store::RowKind};

/// Which way rows are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// The newest rows first.
    Newest,
    /// The oldest rows first.
    Oldest,
}

/// Which processes to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Only {
    All,
    /// Those with one of these names.
    Names(NameMatch),
    Pid(u32),
}

/// A query for rows of a VM.
#[derive(Debug, Clone)]
pub(crate) struct Query<'a> {
    pub(crate) kind: RowKind,
    pub(crate) instance: &'a InstanceId,
    /// The effective dates of the rows, in Unix microseconds.
    pub(crate) time: Range<i64>,
    pub(crate) order: Order,
    pub(crate) only: Only,
    /// Whether summed rows are left out, which the documented API does not know.
    pub(crate) no_sums: bool,
    /// The fields to read, besides `_id` and `create_date`.
    pub(crate) columns: &'a [&'a str],
    /// Whether later writes depend on the rows, so that they are read from the primary.
    pub(crate) durable: bool,
}

/// A row with the fields that the query names.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// Effective date, Unix microseconds.
    pub(crate) effective: i64,
    pub(crate) create_date: String,
    /// The `_id`, if it is an `ObjectId`.
    pub(crate) id: Option<RowId>,
    pub(crate) document: RawDocumentBuf,
}

/// The place of a row in the order of rows.
pub(crate) type RowKey<'a> = (i64, &'a str, Option<RowId>);

impl Row {
    pub(crate) fn key(&self) -> RowKey<'_> {
        (self.effective, &self.create_date, self.id)
    }

    pub(crate) fn object_id(&self) -> Option<ObjectId> {
        self.id.map(ObjectId::from_bytes)
    }

    /// Effective date in Unix milliseconds.
    pub(crate) fn at_ms(&self) -> u64 {
        u64::try_from(self.effective.div_euclid(1000)).unwrap_or(0)
    }
}

impl<'a> Query<'a> {
    /// Query for all rows of a VM, the newest first.
    pub(crate) const fn new(kind: RowKind, instance: &'a InstanceId, columns: &'a [&'a str]) -> Self {
        Self {
            kind,
            instance,
            time: i64::MIN..i64::MAX,
            order: Order::Newest,
            only: Only::All,
            no_sums: false,
            columns,
            durable: false,
        }
    }

    /// Limits the query to a time range in Unix milliseconds.
    pub(crate) fn within_ms(mut self, from_ms: u64, to_ms: u64) -> Self {
        self.time = micros(from_ms)..micros(to_ms);
        self
    }

    pub(crate) const fn oldest_first(mut self) -> Self {
        self.order = Order::Oldest;
        self
    }

    pub(crate) fn only(mut self, only: Only) -> Self {
        self.only = only;
        self
    }

    /// Leaves out summed rows.
    pub(crate) const fn without_sums(mut self) -> Self {
        self.no_sums = true;
        self
    }

    pub(crate) const fn durable(mut self) -> Self {
        self.durable = true;
        self
    }
}

impl Only {
    /// Processes with this name.
    pub(crate) fn named(name: &str) -> Self {
        Self::Names(NameMatch::exact(name))
    }
}

/// Converts Unix milliseconds to Unix microseconds.
pub(crate) fn micros(millis: u64) -> i64 {
    i64::try_from(millis).unwrap_or(i64::MAX).saturating_mul(1000)
}

/// The time of a `create_date` in Unix microseconds; `None` if it is not a date.
pub(crate) fn micros_of_date(create_date: &str, offset: UtcOffset) -> Option<i64> {
    let date: CreateDate = create_date.parse().ok()?;
    Some(micros_of(date.moment(offset).ok()?))
}
