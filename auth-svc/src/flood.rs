//! Failed logins by source. The first of a minute are recorded one by one, the others as one record with their number, so
//! that one source can't evict what the audit holds of the others.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How long failures of a source are collected.
const PERIOD: Duration = Duration::from_mins(1);
/// Failures of a source that have a record each, in a period.
const ONE_BY_ONE: u32 = 10;
/// Most sources that are counted separately; further ones are counted together.
const MOST_SOURCES: usize = 1000;
const OTHERS: &str = "other sources";

/// The failures of one source since a moment.
#[derive(Debug)]
struct Failures {
    since: Instant,
    recorded: u32,
    more: u64,
}

/// The failures of all sources, of this replica.
#[derive(Debug, Default)]
pub(crate) struct Flood(Mutex<HashMap<String, Failures>>);

impl Flood {
    /// Counts a failure; whether it is to have a record of its own.
    pub(crate) fn admits(&self, source: &str) -> bool {
        let mut sources = self.lock();
        let known = sources.len() < MOST_SOURCES || sources.contains_key(source);
        let key = if known { source } else { OTHERS };
        let failures = sources.entry(key.to_owned()).or_insert_with(|| Failures {
            since: Instant::now(),
            recorded: 0,
            more: 0,
        });
        if failures.recorded < ONE_BY_ONE {
            failures.recorded += 1;
            return true;
        }
        failures.more += 1;
        false
    }

    /// Ends the periods that are over (or all), and gives back the sources with failures that have no record, and how
    /// many those are.
    pub(crate) fn take(&self, all: bool) -> Vec<(String, u64)> {
        let mut sources = self.lock();
        let ended = sources.extract_if(|_, failures| all || failures.since.elapsed() >= PERIOD);
        let unrecorded = ended.filter(|(_, failures)| failures.more > 0);
        unrecorded
            .map(|(source, failures)| (source, failures.more))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Failures>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_failures_of_a_minute_have_records_and_the_others_are_counted() {
        let flood = Flood::default();
        let recorded = (0..100).filter(|_| flood.admits("192.0.2.1")).count();
        assert_eq!(recorded, 10);
        assert!(flood.admits("192.0.2.2"));
        assert_eq!(flood.take(false), []);
        tokio::time::advance(PERIOD).await;
        assert_eq!(flood.take(false), [("192.0.2.1".to_owned(), 90)]);
        assert!(flood.admits("192.0.2.1"), "a new minute");
    }

    #[test]
    fn many_sources_are_counted_together_and_take_bounded_memory() {
        let flood = Flood::default();
        let recorded = (0..5000)
            .filter(|source| flood.admits(&source.to_string()))
            .count();
        assert_eq!(recorded, MOST_SOURCES + 10);
        assert_eq!(flood.take(true), [(OTHERS.to_owned(), 5000 - 1010)]);
    }
}
