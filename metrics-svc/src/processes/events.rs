//! Starts and ends of processes, derived from process rows.

use std::{cmp::Reverse, collections::HashSet};

use vmwatch_api::{
    first_page,
    history::TimeRange,
    processes::{
        EventPosition, ProcessEvent, ProcessEventKind, ProcessEventList, ProcessEventsQuery, ProcessRow,
    },
};

use super::{MOST_ROWS, Processes};
use crate::{MetricsError, deadline::Deadline};

impl Processes {
    /// Returns a page of the newest starts and ends of processes in a time range.
    ///
    /// The end of a process is known from its row with `shutdown_time`. Its start is the `running_time` of such a row
    /// or, for a process that did not end in the range, of a row in a process table that shows the process.
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
            .filter(|event| query.before.is_none_or(|position| event.position() < position))
            .collect();
        events.sort_unstable_by_key(|event| Reverse(event.position()));
        let (events, more) = first_page(events, most);
        Ok(ProcessEventList { events, more })
    }

    /// Returns the last rows of the newest processes that ended in the range: enough for a page and one more, which
    /// shows whether there is another page. Processes that ended before these also started before them.
    async fn newest_ends(
        &self,
        query: &ProcessEventsQuery,
        range: TimeRange,
        deadline: Deadline,
    ) -> Result<Vec<ProcessRow>, MetricsError> {
        let (instance, one_more) = (&query.instance_id, i64::from(query.limit.get()) + 1);
        let Some(position) = query.before else {
            return self.ends(instance, range, one_more, deadline).await;
        };
        // Read all processes that ended at the moment at which the previous page ended, because any number of them may
        // have ended at that moment. Ends are rounded to milliseconds, so the millisecond before is included.
        let tied = position.at_ms.saturating_sub(1).max(range.from_ms());
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

/// Returns the part of the range that contains all events after the cursor; `None` if it is empty.
fn up_to(range: TimeRange, before: Option<EventPosition>) -> Option<TimeRange> {
    let to_ms = before.map_or(range.to_ms(), |position| {
        position.at_ms.saturating_add(1).min(range.to_ms())
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
