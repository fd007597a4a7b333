//! Sends messages to receivers.

pub(super) mod alertmanager;
pub(super) mod email;
mod http;
pub(super) mod tls;
pub(super) mod webhook;

use std::{sync::Arc, time::Duration};

use vmwatch_api::alerts::channels::MAX_ANSWER;

use self::tls::Trust;
use super::addresses::{AddressError, Addresses};

/// Time limit for an attempt to deliver a message.
pub(super) const LIMIT: Duration = Duration::from_secs(20);
/// Time limit for the connection to one of a receiver's addresses, so that an unreachable one leaves time for the others.
const CONNECT_LIMIT: Duration = Duration::from_secs(6);

/// Why a message was not delivered. The texts are shown to administrators and contain no secret.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("no connection to {address}: {reason}")]
    Connect { address: String, reason: String },
    #[error("no TLS connection to {host}: {reason}")]
    Tls { host: String, reason: String },
    #[error("the connection ended before the receiver answered: {0}")]
    Interrupted(String),
    #[error("the receiver did not answer within {} s", LIMIT.as_secs())]
    Timeout,
    /// The receiver's status and the beginning of its answer.
    #[error("{0}")]
    Refused(String),
    #[error("{0}; redirects are not followed")]
    Redirected(String),
    #[error("the message could not be built: {0}")]
    Invalid(String),
}

/// What sending needs, besides the message.
#[derive(Debug)]
pub(crate) struct Sender {
    pub(super) addresses: Arc<Addresses>,
    pub(super) trust: Trust,
}

/// Makes a receiver's text printable on one line, and cuts it to the length that is kept.
fn printable(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    let mut line: String = words
        .join(" ")
        .chars()
        .filter(|letter| !letter.is_control())
        .collect();
    while line.len() > MAX_ANSWER {
        line.pop();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_cut_and_made_printable() {
        assert_eq!(printable("a\r\n\x1b[31mb\tc"), "a [31mb c");
        let cut = printable(&"ü".repeat(300));
        assert_eq!((cut.len(), cut.chars().count()), (200, 100));
    }
}
