//! Starts and ends of processes.

use std::{cmp::Reverse, collections::HashSet};

use vmwatch_api::{
    first_page,
    history::TimeRange,
    processes::{
        EventPlace, ProcessEvent, ProcessEventKind, ProcessEventList, ProcessEventsQuery, ProcessRow,
    },
};

use super::{MOST_ROWS, Processes};
use crate::{MetricsError, deadline::Deadline};

impl Processes {
    /// A page of the newest starts and ends of a range of time.
    ///
    /// An end is a row with `shutdown_time`. A start is the `running_time` of such a row, or of a row of a table that
    /// shows processes which did not end in the range.
    pub(crate) async fn events(
        &self,
        query: &ProcessEventsQuery,
        deadline: Deadline,
    ) -> Result<ProcessEventList, MetricsError> {
        let instance = &query.instance_id;
        let Some(range) = up_to(query.range, query.before) else {
            return Ok(ProcessEventList::default());
        };
        let most = usize::from(query.limit.get());
        let ends = self.newest_ends(query, range, deadline).await?;
        let tables = self.tables(instance, range, deadline).await?;
        let started = ends.iter().chain(tables.iter().flatten());
        let started = started.filter(|row| (range.from_ms()..range.to_ms()).contains(&row.started_ms));
        let mut seen = HashSet::new();
        let mut events: Vec<_> = ends
            .iter()
            .map(|row| (ProcessEventKind::Ended, row))
            .chain(started.map(|row| (ProcessEventKind::Started, row)))
            .filter(|(kind, row)| seen.insert((*kind, row.pid, row.started_ms)))
            .map(|(kind, row)| event(kind, row))
            .filter(|event| query.before.is_none_or(|place| event.place() < place))
            .collect();
        events.sort_unstable_by_key(|event| Reverse(event.place()));
        let (events, more) = first_page(events, most);
        Ok(ProcessEventList { events, more })
    }

    /// The last rows of the processes that ended in the range: enough of the newest for a page and one more, which
    /// tells that there are more. The starts of those that ended before these are older than all of them.
    async fn newest_ends(
        &self,
        query: &ProcessEventsQuery,
        range: TimeRange,
        deadline: Deadline,
    ) -> Result<Vec<ProcessRow>, MetricsError> {
        let (instance, one_more) = (&query.instance_id, i64::from(query.limit.get()) + 1);
        let Some(place) = query.before else {
            return self.ends(instance, range, one_more, deadline).await;
        };
        // Of the moment at which the page before ended all are read: any number of processes may end at one. An end is
        // at the millisecond nearest to it, which may be the one behind.
        let tied = place.at_ms.saturating_sub(1).max(range.from_ms());
        let mut ends = match TimeRange::new(tied, range.to_ms()) {
            Some(tie) => self.ends(instance, tie, MOST_ROWS, deadline).await?,
            None => Vec::new(),
        };
        if let Some(older) = TimeRange::new(range.from_ms(), tied) {
            ends.extend(self.ends(instance, older, one_more, deadline).await?);
        }
        Ok(ends)
    }
}

/// The part of the range that holds all events behind a place; `None` where it is empty.
fn up_to(range: TimeRange, before: Option<EventPlace>) -> Option<TimeRange> {
    let to_ms = before.map_or(range.to_ms(), |place| {
        place.at_ms.saturating_add(1).min(range.to_ms())
    });
    TimeRange::new(range.from_ms(), to_ms)
}

fn event(kind: ProcessEventKind, row: &ProcessRow) -> ProcessEvent {
    let at_ms = match kind {
        ProcessEventKind::Started => row.started_ms,
        ProcessEventKind::Ended => row.ended_ms.unwrap_or(0),
    };
    ProcessEvent {
        at_ms,
        kind,
        name: row.name.clone(),
        pid: row.pid,
        started_ms: row.started_ms,
    }
}
