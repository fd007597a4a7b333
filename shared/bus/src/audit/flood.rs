//! Limits the number of audit records that one source address or user can cause by refused requests. The first refusals
//! of a period are recorded individually; the rest are only counted, in one record. A flood of refused requests
//! therefore cannot evict other records from the audit.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Maximum number of source addresses or users whose refusals are counted separately; all others share one counter.
const MOST_KEYS: usize = 1000;
const OTHERS: &str = "others";

/// The refusals of one source address or user in the current period.
#[derive(Debug)]
struct Refused {
    since: Instant,
    recorded: u32,
    more: u64,
}

/// Counts refusals by source address or user within this replica.
#[derive(Debug)]
pub struct Flood {
    period: Duration,
    one_by_one: u32,
    keys: Mutex<HashMap<String, Refused>>,
}

impl Flood {
    /// In each period, the first `one_by_one` refusals of each source address or user are recorded individually.
    pub fn new(period: Duration, one_by_one: u32) -> Self {
        Self {
            period,
            one_by_one,
            keys: Mutex::default(),
        }
    }

    /// Counts a refusal. Returns true if the refusal should be recorded individually.
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

    /// Closes the expired periods, or all periods if `all` is true. Returns the source addresses or users that had
    /// refusals without an individual record, with the number of those refusals.
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
    async fn only_first_refusals_of_a_period_are_recorded_individually() {
        let flood = Flood::new(PERIOD, 10);
        let recorded = (0..100).filter(|_| flood.admits("192.0.2.1")).count();
        assert_eq!(recorded, 10);
        assert!(flood.admits("192.0.2.2"));
        assert_eq!(flood.take(false), []);
        tokio::time::advance(PERIOD).await;
        assert_eq!(flood.take(false), [("192.0.2.1".to_owned(), 90)]);
        assert!(
            flood.admits("192.0.2.1"),
            "a new period allows individual records again"
        );
    }

    #[test]
    fn refusals_of_source_addresses_beyond_the_limit_share_one_counter() {
        let flood = Flood::new(PERIOD, 10);
        let recorded = (0..5000).filter(|key| flood.admits(&key.to_string())).count();
        assert_eq!(recorded, MOST_KEYS + 10);
        assert_eq!(flood.take(true), [(OTHERS.to_owned(), 5000 - 1010)]);
    }
}
