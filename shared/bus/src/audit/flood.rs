//! Limits the records that one source or user can cause by refused requests. The first refusals of a period get a
//! record each; the others are counted in one record, so that a flood cannot evict other records from the audit.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Maximum number of keys counted separately; further keys share one counter.
const MOST_KEYS: usize = 1000;
const OTHERS: &str = "others";

/// The refusals of one key in its current period.
#[derive(Debug)]
struct Refused {
    since: Instant,
    recorded: u32,
    more: u64,
}

/// Refusals by source address or user, in this replica.
#[derive(Debug)]
pub struct Flood {
    period: Duration,
    one_by_one: u32,
    keys: Mutex<HashMap<String, Refused>>,
}

impl Flood {
    /// In each period, `one_by_one` refusals of a key get a record each.
    pub fn new(period: Duration, one_by_one: u32) -> Self {
        Self {
            period,
            one_by_one,
            keys: Mutex::default(),
        }
    }

    /// Counts a refusal. Returns true if it gets a record of its own.
    pub fn admits(&self, key: &str) -> bool {
        let mut keys = self.lock();
        let known = keys.len() < MOST_KEYS || keys.contains_key(key);
        let key = if known { key } else { OTHERS };
        let refused = keys.entry(key.to_owned()).or_insert_with(|| Refused {
            since: Instant::now(),
            recorded: 0,
            more: 0,
        });
        if refused.recorded < self.one_by_one {
            refused.recorded += 1;
            return true;
        }
        refused.more += 1;
        false
    }

    /// Ends expired periods, or all periods. Returns the keys with unrecorded refusals and their number.
    pub fn take(&self, all: bool) -> Vec<(String, u64)> {
        let mut keys = self.lock();
        let ended = keys.extract_if(|_, refused| all || refused.since.elapsed() >= self.period);
        let unrecorded = ended.filter(|(_, refused)| refused.more > 0);
        unrecorded.map(|(key, refused)| (key, refused.more)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Refused>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_mins(1);

    #[tokio::test(start_paused = true)]
    async fn records_first_refusals_of_a_period_and_counts_the_rest() {
        let flood = Flood::new(PERIOD, 10);
        let recorded = (0..100).filter(|_| flood.admits("192.0.2.1")).count();
        assert_eq!(recorded, 10);
        assert!(flood.admits("192.0.2.2"));
        assert_eq!(flood.take(false), []);
        tokio::time::advance(PERIOD).await;
        assert_eq!(flood.take(false), [("192.0.2.1".to_owned(), 90)]);
        assert!(flood.admits("192.0.2.1"), "a new period");
    }

    #[test]
    fn counts_excess_keys_together_in_bounded_memory() {
        let flood = Flood::new(PERIOD, 10);
        let recorded = (0..5000).filter(|key| flood.admits(&key.to_string())).count();
        assert_eq!(recorded, MOST_KEYS + 10);
        assert_eq!(flood.take(true), [(OTHERS.to_owned(), 5000 - 1010)]);
    }
}
