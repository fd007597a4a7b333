//! Reads older rows of processes with a name: only the hours in which such processes ran, as far as that is known.

use std::{collections::BTreeSet, ops::Range};

use bson::{DateTime, RawDocument, doc};

use super::{Budget, Newest, Only, Query};
use crate::{
    MetricsError,
    blocks::HOUR_MICROS,
    database::find,
    deadline::Deadline,
    names::{self, DAY_MILLIS, Hours, NameMatch, ProcessNames, StoredNames, coverage::hours_without_names},
    store::RowStore,
};

/// Number of documents of names that the database returns together.
const BATCH: u32 = 32;

impl RowStore {
    /// Reads the rows of the query before a time in Unix microseconds, the newest first.
    pub(super) async fn read_older(
        &self,
        newest: &mut Newest<'_>,
        mut query: Query<'_>,
        before: i64,
        budget: &mut Budget,
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        if newest.is_over() {
            return Ok(());
        }
        // Other software may write flat rows at any time, and their index on the name makes reading them fast.
        if let Only::Names(names) = query.only.clone()
            && self
                .flat_rows(query.kind, query.durable, deadline)
                .await?
                .is_none()
            && let Some(pending) = hours_without_names(self, query.instance, deadline).await?
        {
            let wanted = Wanted { names, before };
            return self
                .read_named(newest, query, &wanted, pending, budget, deadline)
                .await;
        }
        query.time = i64::MIN..before;
        newest.read(self, &query, budget, deadline).await
    }

    async fn read_named(
        &self,
        newest: &mut Newest<'_>,
        mut query: Query<'_>,
        wanted: &Wanted,
        mut pending: BTreeSet<i64>,
        budget: &mut Budget,
        deadline: Deadline,
    ) -> Result<(), MetricsError> {
        let names = ProcessNames::new(self);
        let documents = names.documents();
        let last = DateTime::from_millis(wanted.before.div_euclid(1000));
        let find_days = documents
            .find(doc! { "instance_id": query.instance.as_str(), "day": { "$lt": last } })
            .sort(doc! { "day": -1 })
            .batch_size(BATCH)
            .max_time(deadline.left()?);
        let mut cursor = find(documents, find_days).await?;
        loop {
            let is_day = cursor.advance().await?;
            let (day, hours) = if is_day {
                wanted.hours(cursor.current())?
            } else {
                (i64::MIN, Vec::new())
            };
            let mut hours: BTreeSet<i64> = hours.into_iter().collect();
            hours.append(&mut pending.split_off(&day));
            for range in joined(hours) {
                query.time = range.start..range.end.min(wanted.before);
                newest.read(self, &query, budget, deadline).await?;
            }
            if !is_day || newest.is_over() {
                return Ok(());
            }
        }
    }
}

/// Which hours to read.
struct Wanted {
    names: NameMatch,
    /// Only hours that begin before this time, Unix microseconds.
    before: i64,
}

impl Wanted {
    /// The start of the day of a document, and the hours to read; both in Unix microseconds.
    fn hours(&self, document: &RawDocument) -> Result<(i64, Vec<i64>), MetricsError> {
        let day = document.get_datetime("day")?.timestamp_millis();
        let hours = match StoredNames::from_document(document) {
            Ok(stored) => {
                let selected = stored.iter().filter(|(name, _)| self.names.matches(name));
                let hours = selected.fold(Hours::default(), |hours, (_, of_name)| hours.or(of_name.hours));
                let may_lack_names =
                    stored.is_full && !stored.iter().any(|(name, _)| self.names.is_only(name));
                if may_lack_names { Hours::ALL } else { hours }
            }
            Err(error) => {
                names::note_unreadable(document, error);
                Hours::ALL
            }
        };
        let day = day.saturating_mul(1000);
        let starts = (0..24).filter(|hour| hours.contains(*hour));
        let starts = starts.map(|hour| day.saturating_add(i64::from(hour) * HOUR_MICROS));
        Ok((day, starts.filter(|start| *start < self.before).collect()))
    }
}

/// Joins hours that follow each other, the newest first.
fn joined(hours: BTreeSet<i64>) -> Vec<Range<i64>> {
    let mut ranges: Vec<Range<i64>> = Vec::new();
    for hour in hours.into_iter().rev() {
        let end = hour.saturating_add(HOUR_MICROS);
        match ranges.last_mut() {
            Some(last) if last.start == end => last.start = hour,
            _ => ranges.push(hour..end),
        }
    }
    ranges
}

const _: () = assert!(DAY_MILLIS * 1000 == 24 * HOUR_MICROS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_that_follow_each_other_are_read_together() {
        let hours = [1, 2, 3, 7, 9].map(|hour| hour * HOUR_MICROS);
        let ranges: Vec<_> = joined(hours.into())
            .into_iter()
            .map(|range| (range.start / HOUR_MICROS, range.end / HOUR_MICROS))
            .collect();
        assert_eq!(ranges, [(9, 10), (7, 8), (1, 4)]);
    }
}
