//! Limits password guessing in such a way that an attacker cannot lock out other users.
//!
//! Recent login failures are counted by (user, client address), by client address and by user, in a KV bucket that all
//! replicas share:
//!
//! | counted by | at the limit |
//! |---|---|
//! | (user, client address) | further logins of that user from that address are refused until the failures expire |
//! | client address | each further user has one attempt from that address instead of the usual number |
//! | user | each further client address has one attempt for that user instead of the usual number |
//!
//! Therefore an administrator under attack can still log in from another address at the first attempt, and so can other
//! users that share an attacker's address. An attacker gets at most the limit of attempts for one user name or one
//! address, plus one attempt for each combination with another address or user. Unknown user names are counted like
//! known ones, so the throttle does not reveal which users exist.
//!
//! Enrolments with a wrong secret are counted in the same way, with the id of the join token in place of the user; all ids
//! of tokens that do not exist count as one. So agents that share an address with an attacker, or with an agent whose token is wrong, can still enrol.

use std::{net::Ipv6Addr, time::Duration};

use async_nats::jetstream::kv::Entry;
use metrics::counter;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::warn;
use vmwatch_api::{UserKey, enrollment::JoinTokenId, time::unix_millis};
use vmwatch_bus::Bus;

use crate::{
    AuthError,
    bucket::{Bucket, Kept, Spec, Value},
    config::ThrottleSettings,
};

const BUCKET: &str = "vmwatch_login_failures";
/// Size limit of the KV bucket: sufficient for about 400,000 counters. At the rate that password hashing allows, the
/// counters of logins expire long before there are that many. Enrolments hash no passwords, so their counters are limited by
/// what is counted: the client addresses, and for each of them the tokens that exist and one counter for all others.
const BUCKET_BYTES: i64 = 64 << 20;
/// Maximum number of attempts to count a failure while other replicas change the same counter.
const COUNT_TRIES: usize = 8;

/// The recent login failures that share a key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Failures {
    count: u32,
    last_ms: u64,
}

pub(crate) struct Throttle {
    bucket: Bucket,
    settings: ThrottleSettings,
}

/// The three keys under which the failures of a login attempt are counted.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pair: String,
    source: String,
    user: String,
    kind: AttemptKind,
}

#[derive(Debug, Clone, Copy)]
enum AttemptKind {
    Login,
    Enrollment,
}

impl Attempt {
    /// Creates the keys for an attempt to log in as this user from this client address. The keys are hashes, because
    /// user names can contain any character, and so that the KV bucket does not reveal them.
    pub(crate) fn new(user: &UserKey, source: &str) -> Self {
        let source = &network(source);
        Self {
            pair: key("pair", &[user.as_str(), source]),
            source: key("source", &[source]),
            user: key("user", &[user.as_str()]),
            kind: AttemptKind::Login,
        }
    }

    /// Creates the keys for an attempt to enrol from this client address. All malformed and unknown tokens share one key;
    /// otherwise a client could fill the KV bucket with counters of random ids, and logins would fail. The keys differ from
    /// those of logins, so that failed enrolments do not affect logins from the same address.
    pub(crate) fn of_join_token(token: Option<&JoinTokenId>, source: &str) -> Self {
        let source = &network(source);
        let token = token.map_or("", JoinTokenId::as_str);
        Self {
            pair: key("pair", &["join token", token, source]),
            source: key("source", &["join token", source]),
            user: key("user", &["join token", token]),
            kind: AttemptKind::Enrollment,
        }
    }

    fn count_throttled(&self) {
        match self.kind {
            AttemptKind::Login => counter!("vmwatch_logins_throttled_total").increment(1),
            AttemptKind::Enrollment => counter!("vmwatch_enrollments_throttled_total").increment(1),
        }
    }

    /// The key shared by all attempts of this user from this client address.
    pub(crate) fn id(&self) -> &str {
        &self.pair
    }
}

fn key(kind: &str, parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    let digest: [u8; 32] = hash.finalize().into();
    format!("{kind}.{}", hex::encode(digest))
}

impl Throttle {
    /// The configuration of the KV bucket of login failures.
    pub(crate) const fn bucket(settings: ThrottleSettings, replicas: usize) -> Spec {
        Spec {
            name: BUCKET,
            description: "recent failed logins",
            max_age: settings.window,
            max_bytes: BUCKET_BYTES,
            replicas,
        }
    }

    /// Opens the KV bucket of login failures, and creates it if it is missing.
    pub(crate) async fn open(
        bus: &Bus,
        settings: ThrottleSettings,
        replicas: usize,
    ) -> Result<Self, AuthError> {
        let bucket = Bucket::open(bus, Self::bucket(settings, replicas)).await?;
        Ok(Self { bucket, settings })
    }

    /// Checks whether the login attempt is allowed; if not, the error contains the time to wait.
    pub(crate) async fn admit(&self, attempt: &Attempt) -> Result<(), AuthError> {
        let (pair, source, user) = tokio::try_join!(
            self.failures(&attempt.pair),
            self.failures(&attempt.source),
            self.failures(&attempt.user)
        )?;
        match wait(self.settings, pair, source, user, unix_millis()) {
            None => Ok(()),
            Some(wait) => {
                attempt.count_throttled();
                Err(AuthError::Throttled(wait))
            }
        }
    }

    /// Counts a failed login. The failure is counted before the caller gets an answer, so no answer reveals the
    /// result of an attempt that was not counted.
    pub(crate) async fn count_failure(&self, attempt: &Attempt) -> Result<(), AuthError> {
        // If every attempt to count conflicts with another replica, this failure is not counted: the conflicts
        // themselves mean that enough other failures are being counted.
        tokio::try_join!(
            self.count_one(&attempt.pair),
            self.count_one(&attempt.source),
            self.count_one(&attempt.user)
        )?;
        Ok(())
    }

    /// Counts an attempt as failed before its password is verified. Therefore the number of passwords verified never
    /// exceeds the limit, however many attempts run concurrently on however many replicas. The caller must call
    /// `forget` if the attempt succeeds.
    pub(crate) async fn claim(&self, attempt: &Attempt) -> Result<(), AuthError> {
        self.admit(attempt).await?;
        let (pair, source, user) = tokio::try_join!(
            self.count_one(&attempt.pair),
            self.count_one(&attempt.source),
            self.count_one(&attempt.user)
        )?;
        // The number of earlier failures: this attempt is already included in the count.
        let before = |count: Option<u32>| count.map_or(u32::MAX, |count| count.saturating_sub(1));
        if before(pair) < limit(self.settings, before(source), before(user)) {
            return Ok(());
        }
        attempt.count_throttled();
        Err(AuthError::Throttled(self.settings.window))
    }

    /// Deletes the counted failures of a user from this client address after a successful login.
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

    /// A counter that cannot be decoded blocks logins until it expires.
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

    /// Increments a failure counter. Returns the new count; `None` if every attempt conflicted with another replica.
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

/// Time at which the entry was written, in Unix milliseconds by the clock of the NATS server.
fn written_ms(entry: &Entry) -> u64 {
    u64::try_from(entry.created.unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
}

/// The counter key of a client address. For IPv6, the key is the 64-bit network: a host can use any address in its
/// network (RFC 4291, section 2.5.1) and would otherwise get a new counter with each address.
pub(crate) fn network(source: &str) -> String {
    let Ok(address) = source.parse::<Ipv6Addr>() else {
        return source.to_owned();
    };
    let [a, b, c, d, ..] = address.segments();
    Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).to_string()
}

/// The number of failures after which logins of a user from a client address are refused.
const fn limit(settings: ThrottleSettings, source: u32, user: u32) -> u32 {
    if source >= settings.by_source || user >= settings.by_user {
        1
    } else {
        settings.by_pair
    }
}

/// How long the login attempt must wait; `None` if it may proceed.
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
    fn logins_of_user_from_address_are_refused_after_fifth_failure() {
        assert_eq!(waits(4, 4, 4), None);
        assert_eq!(waits(5, 5, 5), Some(899));
        let long_ago = Failures {
            count: 5,
            last_ms: NOW - 900_000,
        };
        assert_eq!(wait(SETTINGS, long_ago, failed(5), failed(5), NOW), None);
    }

    #[test]
    fn login_failure_counter_matches_golden_file() {
        bucket::assert_matches_golden::<Failures>(include_str!(
            "../../tests/golden/forms/login-failures.json"
        ));
    }

    #[test]
    fn attackers_cannot_lock_out_users_at_other_addresses() {
        // An administrator that is under attack from many addresses logs in from a new address.
        assert_eq!(waits(0, 0, 100_000), None);
        // A user shares a client address with an attacker.
        assert_eq!(waits(0, 100_000, 0), None);
        // After one failure under these conditions, the user must wait.
        assert_eq!(waits(1, 100_000, 0), Some(899));
        assert_eq!(waits(1, 0, 100_000), Some(899));
    }

    #[test]
    fn failed_logins_are_counted_per_ipv6_network() {
        let pair = |source| Attempt::new(&UserKey::from_name("a"), source).pair;
        assert_eq!(pair("2001:db8:1:2:3:4:5:6"), pair("2001:db8:1:2::1"));
        assert_ne!(pair("2001:db8:1:3::1"), pair("2001:db8:1:2::1"));
        assert_ne!(pair("192.0.2.1"), pair("192.0.2.2"));
    }

    #[test]
    fn enrolments_and_logins_have_separate_counters() {
        let id: JoinTokenId = "00112233445566ff".parse().unwrap();
        let login = Attempt::new(&UserKey::from_name(id.as_str()), "192.0.2.1");
        let enrolment = Attempt::of_join_token(Some(&id), "192.0.2.1");
        let malformed = Attempt::of_join_token(None, "192.0.2.1");
        assert_ne!(login.pair, enrolment.pair);
        assert_ne!(login.source, enrolment.source);
        assert_ne!(login.user, enrolment.user);
        assert_ne!(malformed.pair, enrolment.pair);
        assert_eq!(malformed.source, enrolment.source);
    }

    #[test]
    fn login_attempts_are_counted_per_user_and_address() {
        let attempt = |user: &str, source| Attempt::new(&UserKey::from_name(user), source);
        let (one, other) = (attempt("ab", "c"), attempt("a", "bc"));
        assert_ne!(one.pair, other.pair);
        assert_eq!(attempt("ab", "c").pair, one.pair);
        assert_eq!(
            attempt("AB", "c").pair,
            one.pair,
            "all spellings of a user name must have the same key"
        );
        assert!(
            one.pair
                .strip_prefix("pair.")
                .unwrap()
                .bytes()
                .all(|byte| byte.is_ascii_hexdigit())
        );
    }
}
