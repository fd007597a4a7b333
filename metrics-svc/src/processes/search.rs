//! Which VMs ran a process: answered from the names of each VM and day (see [`crate::names`]).
//!
//! ```text
//! documents that have the name ─ few:  their ids ─┐
//!                               └ many: all VMs in order of their ids ─┤
//! ids of the VMs of a limited scope ───────────────┴─> documents, sorted by VM and day ─> VMs ─> page
//!                                       full, without the name: rows of that VM and day ─┘
//! ```
//!
//! A page ends early if half of the request's time is over or if it may not decode more rows; the next page continues
//! with the VM at which it ended. If that is the first VM of a page, the page lists it as not searched.

mod days;
mod page;

use std::ops::Range;

use tokio::time::Instant;
use vmwatch_api::{
    Scope,
    process_search::{ProcessMatch, ProcessSearchPage, ProcessSearchQuery},
};

use self::{days::Days, page::Page};
use super::Processes;
use crate::{
    MetricsError,
    blocks::{HOUR_MICROS, hour_of},
    deadline::Deadline,
    names::{DAY_MILLIS, Hours, NameMatch, coverage, day_of},
    reads::micros,
};

/// What to search for.
pub(super) struct Search {
    pub(super) wanted: NameMatch,
    /// Whole hours, Unix microseconds.
    pub(super) time: Range<i64>,
    pub(super) deadline: Deadline,
    /// After this time no further VM is added to the page.
    pub(super) ends_at: Instant,
}

impl Search {
    fn new(query: &ProcessSearchQuery, deadline: Deadline) -> Result<Self, MetricsError> {
        let name = query.name().as_str();
        let range = query.range();
        let end = micros(range.to_ms()).saturating_add(HOUR_MICROS - 1);
        Ok(Self {
            wanted: match query.matching() {
                ProcessMatch::Exact => NameMatch::exact(name),
                ProcessMatch::Prefix => NameMatch::prefix(name),
            },
            time: hour_of(micros(range.from_ms()))..hour_of(end),
            deadline,
            ends_at: Instant::now() + deadline.left()? / 2,
        })
    }

    /// The first and the last day, Unix milliseconds.
    pub(super) const fn days(&self) -> (i64, i64) {
        (day_of(self.time.start), day_of(self.time.end - 1))
    }

    /// The hours of a day that are searched.
    pub(super) fn hours(&self, day_ms: i64) -> Hours {
        let of_day = |micros: i64| micros.div_euclid(1000).saturating_sub(day_ms);
        Hours::touched(of_day(self.time.start), of_day(self.time.end))
    }

    /// The part of a day that is searched, Unix microseconds.
    pub(super) fn part_of_day(&self, day_ms: i64) -> Range<i64> {
        let (start, end) = (day_ms * 1000, (day_ms + DAY_MILLIS) * 1000);
        self.time.start.max(start)..self.time.end.min(end)
    }
}

impl Processes {
    /// Returns a page of the VMs in the scope in which the processes ran. The names of VMs are not filled in.
    pub(crate) async fn search(
        &self,
        scope: &Scope,
        query: &ProcessSearchQuery,
        deadline: Deadline,
    ) -> Result<ProcessSearchPage, MetricsError> {
        let search = Search::new(query, deadline)?;
        let complete_to = coverage::complete_to(&self.rows, deadline).await?;
        let mut days = Days::select(self, &search, scope, query.after.as_ref()).await?;
        let mut page = Page::new(self, &search, usize::from(query.limit.get()));
        while let Some(document) = days.next(&search).await? {
            if page.add(document).await? {
                return Ok(page.finish(complete_to));
            }
        }
        if !page.end_vm().await? && days.is_cut {
            page.end_after(days.passed.take());
        }
        Ok(page.finish(complete_to))
    }
}

/// Length of an hour in milliseconds.
const HOUR_MILLIS: u32 = 3_600_000;
