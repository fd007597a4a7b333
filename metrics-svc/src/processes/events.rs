//! Starts and ends of processes.

use std::{collections::HashSet, time::Duration};

use bson::{Document, doc};
use shared::api::processes::{
    ProcessEvent, ProcessEventKind, ProcessEventList, ProcessEventsQuery, ProcessRow,
};

use super::{Processes, row, seconds};
use crate::{MetricsError, database::find};

/// What is asked of the rows, and which events its answers tell.
struct Question {
    filter: Document,
    newest_first: Document,
    kind: ProcessEventKind,
}

impl Processes {
    /// The newest starts and ends of a range of time.
    ///
    /// An end is a row with `shutdown_time`. A start is the `running_time` of such a row, whenever the process ended, or
    /// of a row of a table that shows processes which did not end.
    pub(crate) async fn events(
        &self,
        query: &ProcessEventsQuery,
        limit: Duration,
    ) -> Result<ProcessEventList, MetricsError> {
        let most = usize::from(query.limit.get());
        let mut events = Vec::new();
        let mut seen = HashSet::new();
        for question in self.questions(query, limit).await? {
            let rows = self
                .collection()
                .find(question.filter)
                .projection(row::projection())
                .sort(question.newest_first)
                // Each alone could have all of the newest, and one more tells that there are more.
                .limit(i64::from(query.limit.get()) + 1)
                .max_time(limit);
            let mut cursor = find(self.collection(), rows).await?;
            while cursor.advance().await? {
                let (_, row) = row::read(cursor.current())?;
                let event = event(row, question.kind);
                if seen.insert((event.kind, event.pid, event.started_ms)) {
                    events.push(event);
                }
            }
        }
        events.sort_unstable_by(|one, other| {
            let key = |event: &ProcessEvent| (event.at_ms, event.kind, event.pid);
            key(other).cmp(&key(one))
        });
        let more = events.len() > most;
        events.truncate(most);
        Ok(ProcessEventList { events, more })
    }

    async fn questions(
        &self,
        query: &ProcessEventsQuery,
        limit: Duration,
    ) -> Result<Vec<Question>, MetricsError> {
        let (from_ms, to_ms) = (query.range.from_ms(), query.range.to_ms());
        let instance = query.instance_id.as_str();
        let range = doc! { "$gte": seconds(from_ms), "$lt": seconds(to_ms) };
        let mut questions = vec![
            Question {
                filter: doc! { "instance_id": instance, "shutdown_time": range.clone() },
                newest_first: doc! { "shutdown_time": -1 },
                kind: ProcessEventKind::Ended,
            },
            Question {
                filter: doc! {
                    "instance_id": instance, "running_time": range.clone(), "shutdown_time": { "$gt": 0 },
                },
                newest_first: doc! { "running_time": -1 },
                kind: ProcessEventKind::Started,
            },
        ];
        let tables = self.tables(&query.instance_id, from_ms, to_ms, limit).await?;
        questions.extend(tables.into_iter().map(|date| Question {
            filter: doc! { "instance_id": instance, "create_date": date, "running_time": range.clone() },
            newest_first: doc! { "running_time": -1 },
            kind: ProcessEventKind::Started,
        }));
        Ok(questions)
    }
}

fn event(row: ProcessRow, kind: ProcessEventKind) -> ProcessEvent {
    let at_ms = match kind {
        ProcessEventKind::Started => row.started_ms,
        ProcessEventKind::Ended => row.ended_ms.unwrap_or(0),
    };
    ProcessEvent {
        at_ms,
        kind,
        name: row.name,
        pid: row.pid,
        started_ms: row.started_ms,
    }
}
