//! Starts and ends of processes, derived from process rows.

use std::collections::BTreeMap;

use vmwatch_api::{
    InstanceId, first_page,
    history::TimeRange,
    processes::{
        EventPosition, ProcessEvent, ProcessEventKind, ProcessEventList, ProcessEventsQuery, ProcessRow,
        ProcessRowKind,
    },
};

use super::{Processes, row::StoredProcess};
use crate::{
    MetricsError,
    blocks::HOUR_MICROS,
    deadline::Deadline,
    reads::{Budget, Most, Newest, Order, Query, Scan, Step, micros},
    store::RowKind,
};

/// The fields that events need.
const COLUMNS: [&str; 5] = ["cmd", "pid", "running_time", "shutdown_time", "processes"];
/// A process that started or ended in a range is in a sample that was taken at most this long after the range.
const WEEK_MS: u64 = 7 * 24 * 3_600_000;

/// The newest events that were found so far.
struct Found {
    /// The events must be in this range, and after the position of the last page.
    range: TimeRange,
    before: Option<EventPosition>,
    /// Number of events on a page. One more is kept, by which it is known whether the page is the last one.
    most: usize,
    events: BTreeMap<EventPosition, ProcessEvent>,
}

impl Processes {
    /// Returns a page of the newest starts and ends of processes in a time range.
    ///
    /// The end of a process is known from its last row, which has `shutdown_time`. Its start is the `running_time` of any
    /// of its rows. So the rows are read from the first sample after the range backwards, until a page is full: an event
    /// is never later than the rows that show it.
    pub(crate) async fn events(
        &self,
        query: &ProcessEventsQuery,
        deadline: Deadline,
    ) -> Result<ProcessEventList, MetricsError> {
        let Some(range) = up_to(query.range, query.before) else {
            return Ok(ProcessEventList::default());
        };
        let mut found = Found {
            range,
            before: query.before,
            most: usize::from(query.limit.get()),
            events: BTreeMap::new(),
        };
        let end = self
            .end_of_next_sample(&query.instance_id, range, deadline)
            .await?;
        let mut rows = Query::new(RowKind::Process, &query.instance_id, &COLUMNS);
        rows.time = micros(range.from_ms())..end;
        let budget = Budget::of_request(&self.rows);
        let mut scan = Scan::open(&self.rows, rows, budget, deadline).await?;
        // The hour of the next sample, which may have no events of the range, and one hour of the range.
        scan.least_hours = 2;
        let mut ended = None;
        loop {
            let mut unreadable = None;
            let step = scan.hour(|row| match StoredProcess::read(&row.document) {
                Ok(stored) => found.add(&stored.row),
                Err(error) => unreadable = Some(error),
            });
            let step = step.await?;
            if let Some(error) = unreadable {
                return Err(error);
            }
            match step {
                Step::Hour(hour) if found.since(hour) > found.most => break,
                Step::Hour(_) => {}
                Step::OverBudget(hour) => {
                    ended = Some(hour);
                    break;
                }
                Step::End => break,
            }
        }
        Ok(found.page(ended))
    }

    /// The time (Unix microseconds) after the first sample at or after the end of a range; the end of the range if there
    /// is none.
    pub(super) async fn end_of_next_sample(
        &self,
        instance: &InstanceId,
        range: TimeRange,
        deadline: Deadline,
    ) -> Result<i64, MetricsError> {
        let next = Query::new(RowKind::Process, instance, &[])
            .within_ms(range.to_ms(), range.to_ms().saturating_add(WEEK_MS))
            .oldest_first();
        let one = Most { rows: 1, after: None };
        let mut first = Newest::new(one, Order::Oldest);
        let mut budget = Budget::of_request(&self.rows);
        first.read(&self.rows, &next, &mut budget, deadline).await?;
        let sample = first.into_rows().into_iter().next();
        Ok(sample.map_or(micros(range.to_ms()), |row| row.effective.saturating_add(1)))
    }
}

impl Found {
    /// Adds the events that a row shows.
    fn add(&mut self, row: &ProcessRow) {
        if row.kind == ProcessRowKind::Sum {
            return;
        }
        let ended = row.ended_ms.map(|at_ms| (ProcessEventKind::Ended, at_ms));
        for (kind, at_ms) in [Some((ProcessEventKind::Started, row.started_ms)), ended]
            .into_iter()
            .flatten()
        {
            let event = ProcessEvent {
                at_ms,
                kind,
                name: row.name.clone(),
                pid: row.pid,
                started_ms: row.started_ms,
            };
            let in_range = (self.range.from_ms()..self.range.to_ms()).contains(&at_ms);
            let on_page = self.before.is_none_or(|position| event.position() < position);
            if in_range && on_page {
                self.events.entry(event.position()).or_insert(event);
                if self.events.len() > self.most + 1 {
                    self.events.pop_first();
                }
            }
        }
    }

    /// Number of events since this time (Unix microseconds).
    fn since(&self, micros: i64) -> usize {
        self.events.range(first_at(micros)..).count()
    }

    /// Returns the newest events as a page. `ended` is the start of the hour whose rows were not all read, because the
    /// request has decoded as much as it may; the page then ends with the hour after it.
    fn page(mut self, ended: Option<i64>) -> ProcessEventList {
        let end = ended.map(|hour| first_at(hour.saturating_add(HOUR_MICROS)));
        if let Some(end) = &end {
            self.events = self.events.split_off(end);
        }
        let (events, more) = first_page(self.events.into_values().rev(), self.most);
        let last = events.last().filter(|_| more).map(ProcessEvent::position);
        ProcessEventList {
            events,
            next: last.or(end),
        }
    }
}

/// The position of the first event that is possible at a time in Unix microseconds.
fn first_at(micros: i64) -> EventPosition {
    EventPosition {
        at_ms: u64::try_from(micros.div_euclid(1000)).unwrap_or(0),
        kind: ProcessEventKind::Started,
        pid: 0,
        started_ms: 0,
    }
}

/// Returns the part of the range that contains all events after the cursor; `None` if it is empty.
fn up_to(range: TimeRange, before: Option<EventPosition>) -> Option<TimeRange> {
    let to_ms = before.map_or(range.to_ms(), |position| {
        position.at_ms.saturating_add(1).min(range.to_ms())
    });
    TimeRange::new(range.from_ms(), to_ms)
}
