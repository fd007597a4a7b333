//! Starts and ends of processes.

use std::{collections::HashSet, time::Duration};

use shared::api::processes::{
    ProcessEvent, ProcessEventKind, ProcessEventList, ProcessEventsQuery, ProcessRow,
};

use super::Processes;
use crate::MetricsError;

impl Processes {
    /// The newest starts and ends of a range of time.
    ///
    /// An end is a row with `shutdown_time`. A start is the `running_time` of such a row, or of a row of a table that
    /// shows processes which did not end in the range.
    pub(crate) async fn events(
        &self,
        query: &ProcessEventsQuery,
        limit: Duration,
    ) -> Result<ProcessEventList, MetricsError> {
        let (instance, range) = (&query.instance_id, query.range);
        let most = usize::from(query.limit.get());
        // One more tells that there are more. The starts of those that ended before these are older than all of them.
        let one_more = i64::from(query.limit.get()) + 1;
        let ends = self.ends(instance, range, one_more, limit).await?;
        let tables = self.tables(instance, range, limit).await?;
        let started = ends.iter().chain(tables.iter().flatten());
        let started = started.filter(|row| (range.from_ms()..range.to_ms()).contains(&row.started_ms));
        let mut seen = HashSet::new();
        let mut events: Vec<_> = ends
            .iter()
            .map(|row| (ProcessEventKind::Ended, row))
            .chain(started.map(|row| (ProcessEventKind::Started, row)))
            .filter(|(kind, row)| seen.insert((*kind, row.pid, row.started_ms)))
            .map(|(kind, row)| event(kind, row))
            .collect();
        events.sort_unstable_by(|one, other| {
            let key = |event: &ProcessEvent| (event.at_ms, event.kind, event.pid);
            key(other).cmp(&key(one))
        });
        let more = events.len() > most;
        events.truncate(most);
        Ok(ProcessEventList { events, more })
    }
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
