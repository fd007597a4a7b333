//! The format of replies on the bus (NATS): one JSON object with either the data or a fault, the same for all methods.
//!
//! ```json
//! {"data":[…]}
//! {"fault":"not_found","message":"no such VM"}
//! ```

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

/// The kind of a failure, which callers use to decide how to react.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum FaultKind {
    /// The request is invalid; the message explains how to correct it.
    Invalid,
    /// The user name or password is wrong.
    Unauthenticated,
    /// The principal's role does not allow the method.
    Forbidden,
    /// The requested object does not exist, or the principal may not see it.
    NotFound,
    /// The requested object exists, but its state does not allow the request.
    Conflict,
    /// Too many attempts; retry after [`Fault::retry_after`].
    Throttled,
    /// The service has reached its concurrency limit and has not started the request.
    Overloaded,
    /// NATS is unreachable, or no service subscribes to the subject.
    Unavailable,
    /// The service replied, but a component that it depends on (database, hypervisor) did not answer.
    Backend,
    /// The deadline passed before a reply arrived.
    Timeout,
    /// A defect in vmwatch, or a kind of fault that only a newer version of vmwatch knows.
    #[serde(other)]
    Internal,
}

impl FaultKind {
    /// The fault kind's name as used on the wire and as a metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::Throttled => "throttled",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Backend => "backend",
            Self::Timeout => "timeout",
            Self::Internal => "internal",
        }
    }
}

/// A failure with its public message, and with its cause for the log.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub kind: FaultKind,
    /// The message shown to users: what is wrong and how to correct it. It never contains an internal cause and never
    /// reveals whether hidden objects exist.
    pub message: String,
    /// How long to wait before a retry; `None` if a retry does not help.
    pub retry_after: Option<Duration>,
    /// The internal cause. It is written to the log together with the request id, and is never sent to the caller.
    #[source]
    cause: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Fault {
    /// Creates a fault without an internal cause.
    pub fn new(kind: FaultKind, message: impl Into<String>) -> Self {
        let retry_after = match kind {
            FaultKind::Overloaded | FaultKind::Unavailable => Some(Duration::from_secs(1)),
            _ => None,
        };
        Self {
            kind,
            message: message.into(),
            retry_after,
            cause: None,
        }
    }

    /// Adds the internal cause, which is only logged.
    #[must_use]
    pub fn caused_by(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.cause = Some(Arc::new(cause));
        self
    }

    /// Sets how long the caller should wait before a retry.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// The message, for the log. That of an invalid request is left out: it may quote the request, and a request can
    /// contain a secret where none is expected.
    pub fn logged(&self) -> &str {
        match self.kind {
            FaultKind::Invalid => "the request is invalid",
            _ => &self.message,
        }
    }

    /// The internal cause and its sources in one line, for the log; left out like the message.
    pub fn cause_chain(&self) -> Option<String> {
        let cause = self.cause.as_deref().filter(|_| self.kind != FaultKind::Invalid);
        let mut next: Option<&dyn std::error::Error> = cause.map(|cause| cause as _);
        let mut chain = Vec::new();
        while let Some(error) = next {
            chain.push(error.to_string());
            next = error.source();
        }
        (!chain.is_empty()).then(|| chain.join(": "))
    }
}

/// A reply as sent on the bus. `T` is the method's reply type, or raw JSON in programs that only forward the reply.
#[derive(Debug, Serialize, Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
pub struct Envelope<T> {
    /// The kind of the fault; absent if the request succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<FaultKind>,
    /// The public message of the fault; empty if the request succeeded.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// How long to wait before a retry, milliseconds; absent if a retry does not help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The method's reply; absent if the request failed.
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub data: Option<T>,
}

impl<T> Envelope<T> {
    /// Creates the envelope of a successful reply.
    pub const fn success(data: T) -> Self {
        Self {
            fault: None,
            message: String::new(),
            retry_after_ms: None,
            data: Some(data),
        }
    }

    /// Creates the envelope of a fault, without its internal cause.
    pub fn fault(fault: &Fault) -> Self {
        Self {
            fault: Some(fault.kind),
            message: fault.message.clone(),
            retry_after_ms: fault
                .retry_after
                .map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
            data: None,
        }
    }

    /// Returns the data or the fault.
    pub fn into_result(self) -> Result<T, Fault> {
        match (self.fault, self.data) {
            (None, Some(data)) => Ok(data),
            (Some(kind), _) => {
                let mut fault = Fault::new(kind, self.message);
                fault.retry_after = self.retry_after_ms.map(Duration::from_millis);
                Err(fault)
            }
            (None, None) => Err(Fault::new(FaultKind::Internal, "the service sent an empty reply")),
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reply_omits_the_internal_cause_of_a_fault() {
        let fault = Fault::new(FaultKind::Backend, "the store does not answer")
            .caused_by(std::io::Error::other("password=hunter2"));
        let sent = serde_json::to_string(&Envelope::<()>::fault(&fault)).unwrap();
        assert_eq!(
            sent,
            r#"{"fault":"backend","message":"the store does not answer"}"#
        );
        assert_eq!(fault.cause_chain().unwrap(), "password=hunter2");
        assert_eq!(fault.logged(), "the store does not answer");
    }

    #[test]
    fn log_does_not_quote_an_invalid_request() {
        let fault = Fault::new(FaultKind::Invalid, "unknown field hunter2")
            .caused_by(std::io::Error::other("unknown field hunter2"));
        assert_eq!(
            (fault.logged(), fault.cause_chain()),
            ("the request is invalid", None)
        );
    }

    #[test]
    fn reply_envelope_round_trips() {
        let sent = serde_json::to_string(&Envelope::success(vec![1, 2])).unwrap();
        assert_eq!(sent, r#"{"data":[1,2]}"#);
        let back: Envelope<Vec<i32>> = serde_json::from_str(&sent).unwrap();
        assert_eq!(back.into_result().unwrap(), vec![1, 2]);

        let fault = Fault::new(FaultKind::Throttled, "slow down").retry_after(Duration::from_secs(7));
        let sent = serde_json::to_string(&Envelope::<()>::fault(&fault)).unwrap();
        let back: Envelope<()> = serde_json::from_str(&sent).unwrap();
        let back = back.into_result().unwrap_err();
        assert_eq!(
            (back.kind, back.retry_after),
            (FaultKind::Throttled, Some(Duration::from_secs(7)))
        );
    }
}
