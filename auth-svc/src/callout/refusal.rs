//! Why a login is refused. The client never learns the reason; it is counted and logged.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use metrics::counter;
use tokio::time::Instant;
use tracing::warn;
use vmwatch_bus::follow::NotCurrent;

use super::jwt::JwtError;

/// At most one refusal of each reason is logged in this time, because every host that reaches NATS can cause refusals.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// The request of the NATS server cannot be read, or the answer cannot be made.
    #[error("the request could not be read or answered")]
    Malformed(#[from] JwtError),
    #[error("the client gave a user name, a password, a token or a JWT; agents log in with an nkey alone")]
    OtherCredential,
    #[error("the client gave no nkey or did not sign the server's nonce")]
    Unsigned,
    #[error("the signature does not belong to the key and the nonce of this connection")]
    Signature,
    #[error("no VM has this key, or the key was revoked")]
    Unknown,
    /// The KV bucket of agents could not be read within the deadline.
    #[error("the KV bucket of agents could not be read")]
    Stale(#[source] NotCurrent),
    #[error("too many logins are waiting")]
    Overloaded,
    #[error("the login waited too long")]
    Late,
    /// The connection over which the request arrived was lost, so it cannot be answered.
    #[error("the connection to NATS was lost before the login was answered")]
    Disconnected,
}

impl Refusal {
    /// The value of the label `reason`.
    pub(super) const fn reason(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::OtherCredential => "other_credential",
            Self::Unsigned => "unsigned",
            Self::Signature => "signature",
            Self::Unknown => "unknown",
            Self::Stale(_) => "stale",
            Self::Overloaded => "overloaded",
            Self::Late => "late",
            Self::Disconnected => "disconnected",
        }
    }
}

/// Counts all refusals and logs some of them.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    /// By reason: when the last refusal was logged, and how many were not logged since.
    logged: Mutex<HashMap<&'static str, (Instant, u64)>>,
}

impl Refusals {
    /// Counts a refusal. `key` and `host` are what is known of the client.
    pub(super) fn note(&self, refusal: &Refusal, key: &str, host: &str) {
        let reason = refusal.reason();
        counter!("vmwatch_callout_refused_total", "reason" => reason).increment(1);
        if let Some(not_logged) = self.due(reason, Instant::now()) {
            let cause = std::error::Error::source(refusal).map(ToString::to_string);
            warn!(%refusal, reason, cause, key, host, not_logged, "refused the login of an agent at NATS");
        }
    }

    /// Whether a refusal is logged now; if so, how many of the same reason were not logged since the last one.
    fn due(&self, reason: &'static str, now: Instant) -> Option<u64> {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, not_logged)) = logged.get_mut(reason)
            && now.duration_since(*last) < LOG_INTERVAL
        {
            *not_logged += 1;
            return None;
        }
        let before = logged.insert(reason, (now, 0));
        Some(before.map_or(0, |(_, not_logged)| not_logged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_refusal_of_each_reason_is_logged_per_interval() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        assert_eq!(refusals.due("unknown", start), Some(0));
        assert_eq!(refusals.due("unknown", start + LOG_INTERVAL / 2), None);
        assert_eq!(refusals.due("signature", start + LOG_INTERVAL / 2), Some(0));
        assert_eq!(refusals.due("unknown", start + LOG_INTERVAL), Some(1));
        assert_eq!(refusals.due("unknown", start + LOG_INTERVAL * 2), Some(0));
    }
}
