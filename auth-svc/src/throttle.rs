//! Slows down password guessing without enabling anyone to lock out others.
//!
//! Recent failures are counted by (user, source), by source and by user, in a bucket shared by all replicas:
//!
//! | counted by | at the limit |
//! |---|---|
//! | (user, source) | that user from that source waits until the failures expire |
//! | source | each further user from there has one try instead of the usual number |
//! | user | each further source for that user has one try instead of the usual number |
//!
//! An administrator under attack from elsewhere can therefore still log in from another source at the first try, and
//! so can other users that share an attacker's address. A name or an address gives at most its limit of tries plus one
//! for each source or user combined with it. Unknown names are counted like known ones, so that the throttle does not
//! reveal which users exist.

use std::{net::Ipv6Addr, time::Duration};

use async_nats::jetstream::kv::Entry;
use metrics::counter;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::warn;
use vmwatch_api::{UserKey, time::unix_millis};
use vmwatch_bus::Bus;

use crate::{
    AuthError,
    bucket::{Bucket, Kept, Spec, Value},
    config::ThrottleSettings,
};

const BUCKET: &str = "vmwatch_login_failures";
/// Enough for about 400,000 counters. At the rate that password hashing allows, they expire long before that.
const BUCKET_BYTES: i64 = 64 << 20;
/// Maximum attempts to count a failure while other replicas change the same counter.
const COUNT_TRIES: usize = 8;

/// Recent failures under one key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Failures {
    count: u32,
    last_ms: u64,
}

pub(crate) struct Throttle {
    bucket: Bucket,
    settings: ThrottleSettings,
}

/// The keys that a login is counted under.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pair: String,
    source: String,
    user: String,
}

impl Attempt {
    /// An attempt of this user, in any spelling, from this source. Keys are hashes, because names can contain any
    /// character and the bucket need not reveal them.
    pub(crate) fn new(user: &UserKey, source: &str) -> Self {
        let source = &network(source);
        let key = |kind: &str, parts: &[&str]| {
            let mut hash = Sha256::new();
            for part in parts {
                hash.update((part.len() as u64).to_be_bytes());
                hash.update(part.as_bytes());
            }
            let digest: [u8; 32] = hash.finalize().into();
            format!("{kind}.{}", hex::encode(digest))
        };
        Self {
            pair: key("pair", &[user.as_str(), source]),
            source: key("source", &[source]),
            user: key("user", &[user.as_str()]),
        }
    }

    /// The key shared by all attempts of this user from this source.
    pub(crate) fn id(&self) -> &str {
        &self.pair
    }
}

impl Throttle {
    /// The configuration of the bucket.
    pub(crate) const fn bucket(settings: ThrottleSettings, replicas: usize) -> Spec {
        Spec {
            name: BUCKET,
            description: "recent failed logins",
            max_age: settings.window,
            max_bytes: BUCKET_BYTES,
            replicas,
        }
    }

    /// Opens the bucket and creates it if it is missing.
    pub(crate) async fn open(
        bus: &Bus,
        settings: ThrottleSettings,
        replicas: usize,
    ) -> Result<Self, AuthError> {
        let bucket = Bucket::open(bus, Self::bucket(settings, replicas)).await?;
        Ok(Self { bucket, settings })
    }

    /// Admits the attempt; otherwise the error has the time to wait.
    pub(crate) async fn admit(&self, attempt: &Attempt) -> Result<(), AuthError> {
        let (pair, source, user) = tokio::try_join!(
            self.failures(&attempt.pair),
            self.failures(&attempt.source),
            self.failures(&attempt.user)
        )?;
        match wait(self.settings, pair, source, user, unix_millis()) {
            None => Ok(()),
            Some(wait) => {
                counter!("vmwatch_logins_throttled_total").increment(1);
                Err(AuthError::Throttled(wait))
            }
        }
    }

    /// Counts a failure. This precedes the answer, so that an attempt that cannot be counted gets no answer.
    pub(crate) async fn count_failure(&self, attempt: &Attempt) -> Result<(), AuthError> {
        // If every attempt to count conflicted, other failures raise the counter fast enough.
        tokio::try_join!(
            self.count_one(&attempt.pair),
            self.count_one(&attempt.source),
            self.count_one(&attempt.user)
        )?;
        Ok(())
    }

    /// Counts an attempt as failed before it is verified, so that of any number of concurrent attempts, on any
    /// replicas, at most the limit are verified. The caller must call `forget` for an attempt that succeeds.
    pub(crate) async fn claim(&self, attempt: &Attempt) -> Result<(), AuthError> {
        self.admit(attempt).await?;
        let (pair, source, user) = tokio::try_join!(
            self.count_one(&attempt.pair),
            self.count_one(&attempt.source),
            self.count_one(&attempt.user)
        )?;
        // The counts without this attempt.
        let before = |count: Option<u32>| count.map_or(u32::MAX, |count| count.saturating_sub(1));
        if before(pair) < limit(self.settings, before(source), before(user)) {
            return Ok(());
        }
        counter!("vmwatch_logins_throttled_total").increment(1);
        Err(AuthError::Throttled(self.settings.window))
    }

    /// Forgets the failures of a user from this source after a successful login.
    pub(crate) async fn forget(&self, attempt: &Attempt) {
        if self
            .failures(&attempt.pair)
            .await
            .is_ok_and(|failures| failures.count == 0)
        {
            return;
        }
        if let Err(error) = self.bucket.delete(&attempt.pair).await {
            warn!(%error, "resetting a failed-login counter failed; it will expire");
        }
    }

    async fn failures(&self, key: &str) -> Result<Failures, AuthError> {
        let entry = self.bucket.entry(key).await?;
        Ok(self.decode(entry.as_ref()).known)
    }

    /// A record that cannot be decoded counts as throttled until it expires.
    fn decode(&self, entry: Option<&Entry>) -> Kept<Failures> {
        match self.bucket.decode(entry) {
            Value::Nothing => Kept::default(),
            Value::Whole(failures) => failures,
            Value::Broken => Kept::new(Failures {
                count: u32::MAX,
                last_ms: entry.map_or(0, written_ms),
            }),
        }
    }

    /// Counts a failure. Returns the new count; `None` if every attempt conflicted.
    async fn count_one(&self, key: &str) -> Result<Option<u32>, AuthError> {
        for _ in 0..COUNT_TRIES {
            let entry = self.bucket.entry(key).await?;
            let mut failures = self.decode(entry.as_ref());
            failures.known = Failures {
                count: failures.known.count.saturating_add(1),
                last_ms: unix_millis(),
            };
            let value = serde_json::to_vec(&failures)?;
            if self.bucket.write_over(key, value, entry.as_ref()).await? {
                return Ok(Some(failures.known.count));
            }
        }
        Ok(None)
    }
}

/// When the entry was written, Unix milliseconds by the server's clock.
fn written_ms(entry: &Entry) -> u64 {
    u64::try_from(entry.created.unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
}

/// The key of a source. IPv6 addresses are reduced to their 64-bit network, because a host can take any address in it
/// (RFC 4291, section 2.5.1) and would otherwise be a new source each time.
pub(crate) fn network(source: &str) -> String {
    let Ok(address) = source.parse::<Ipv6Addr>() else {
        return source.to_owned();
    };
    let [a, b, c, d, ..] = address.segments();
    Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).to_string()
}

/// The number of failures at which a pair of user and source must wait.
const fn limit(settings: ThrottleSettings, source: u32, user: u32) -> u32 {
    if source >= settings.by_source || user >= settings.by_user {
        1
    } else {
        settings.by_pair
    }
}

/// How long the attempt must wait; `None` if it may proceed.
fn wait(
    settings: ThrottleSettings,
    pair: Failures,
    source: Failures,
    user: Failures,
    now_ms: u64,
) -> Option<Duration> {
    if pair.count < limit(settings, source.count, user.count) {
        return None;
    }
    let since = Duration::from_millis(now_ms.saturating_sub(pair.last_ms));
    settings.window.checked_sub(since).filter(|left| !left.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket;

    const SETTINGS: ThrottleSettings = ThrottleSettings {
        by_pair: 5,
        by_source: 100,
        by_user: 100,
        window: Duration::from_mins(15),
    };
    const NOW: u64 = 10_000_000;

    fn failed(count: u32) -> Failures {
        Failures {
            count,
            last_ms: NOW - 1000,
        }
    }

    fn waits(pair: u32, source: u32, user: u32) -> Option<u64> {
        wait(SETTINGS, failed(pair), failed(source), failed(user), NOW).map(|wait| wait.as_secs())
    }

    #[test]
    fn locks_out_pair_after_fifth_failure() {
        assert_eq!(waits(4, 4, 4), None);
        assert_eq!(waits(5, 5, 5), Some(899));
        let long_ago = Failures {
            count: 5,
            last_ms: NOW - 900_000,
        };
        assert_eq!(wait(SETTINGS, long_ago, failed(5), failed(5), NOW), None);
    }

    #[test]
    fn record_matches_golden_file() {
        bucket::assert_matches_golden::<Failures>(include_str!(
            "../../tests/golden/forms/login-failures.json"
        ));
    }

    #[test]
    fn attackers_cannot_lock_out_other_pairs() {
        // An administrator under attack from everywhere logs in from a new source.
        assert_eq!(waits(0, 0, 100_000), None);
        // A user shares the address of an attacker.
        assert_eq!(waits(0, 100_000, 0), None);
        // The user has only one try.
        assert_eq!(waits(1, 100_000, 0), Some(899));
        assert_eq!(waits(1, 0, 100_000), Some(899));
    }

    #[test]
    fn counts_ipv6_network_as_one_source() {
        let pair = |source| Attempt::new(&UserKey::from_name("a"), source).pair;
        assert_eq!(pair("2001:db8:1:2:3:4:5:6"), pair("2001:db8:1:2::1"));
        assert_ne!(pair("2001:db8:1:3::1"), pair("2001:db8:1:2::1"));
        assert_ne!(pair("192.0.2.1"), pair("192.0.2.2"));
    }

    #[test]
    fn distinguishes_attempts_by_user_and_source() {
        let attempt = |user: &str, source| Attempt::new(&UserKey::from_name(user), source);
        let (one, other) = (attempt("ab", "c"), attempt("a", "bc"));
        assert_ne!(one.pair, other.pair);
        assert_eq!(attempt("ab", "c").pair, one.pair);
        assert_eq!(attempt("AB", "c").pair, one.pair, "one user in any spelling");
        assert!(
            one.pair
                .strip_prefix("pair.")
                .unwrap()
                .bytes()
                .all(|byte| byte.is_ascii_hexdigit())
        );
    }
}
