//! The reply envelope on the bus: one JSON object with the data or the fault, the same for all methods.
//!
//! ```json
//! {"data":[…]}
//! {"fault":"not_found","message":"no such VM"}
//! ```

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

/// The kind of a failure, as far as a caller can react to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum FaultKind {
    /// The request is invalid; the message says how to correct it.
    Invalid,
    /// The user name or password is wrong.
    Unauthenticated,
    /// The principal's role does not allow the method.
    Forbidden,
    /// The thing does not exist, or the principal may not see it.
    NotFound,
    /// The thing exists, but its state does not allow the request.
    Conflict,
    /// Too many attempts; retry after [`Fault::retry_after`].
    Throttled,
    /// The service is at its concurrency limit and did not start the request.
    Overloaded,
    /// The bus is unreachable, or no service subscribes to the subject.
    Unavailable,
    /// The service answered, but a component it depends on (database, hypervisor) did not.
    Backend,
    /// The deadline passed before the reply.
    Timeout,
    /// A defect in vmwatch, or a kind of fault that only a newer version knows.
    #[serde(other)]
    Internal,
}

impl FaultKind {
    /// The name used on the wire and as a metric label.
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
    /// The public message: what is wrong and how to correct it. It never reveals a cause or what exists.
    pub message: String,
    /// How long to wait before a retry, if a retry can help.
    pub retry_after: Option<Duration>,
    /// The internal cause. It is logged with the request id where the fault is answered, and never sent.
    #[source]
    cause: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Fault {
    /// A fault without an internal cause.
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

    /// Adds the cause for the log.
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

    /// The cause and its sources in one line, for the log.
    pub fn cause_chain(&self) -> Option<String> {
        let mut next: Option<&dyn std::error::Error> = self.cause.as_deref().map(|cause| cause as _);
        let mut chain = Vec::new();
        while let Some(error) = next {
            chain.push(error.to_string());
            next = error.source();
        }
        (!chain.is_empty()).then(|| chain.join(": "))
    }
}

/// A reply on the wire. `T` is the method's reply, or raw JSON in programs that only forward it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
pub struct Envelope<T> {
    /// The kind of the fault; absent on success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<FaultKind>,
    /// The public message of the fault; empty on success.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Milliseconds to wait before a retry, if the fault has a wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The method's reply; absent on a fault.
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub data: Option<T>,
}

impl<T> Envelope<T> {
    /// The envelope of a success.
    pub const fn success(data: T) -> Self {
        Self {
            fault: None,
            message: String::new(),
            retry_after_ms: None,
            data: Some(data),
        }
    }

    /// The envelope of a fault, without its cause.
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
    fn fault_does_not_send_its_cause() {
        let fault = Fault::new(FaultKind::Backend, "the store does not answer")
            .caused_by(std::io::Error::other("password=hunter2"));
        let sent = serde_json::to_string(&Envelope::<()>::fault(&fault)).unwrap();
        assert_eq!(
            sent,
            r#"{"fault":"backend","message":"the store does not answer"}"#
        );
        assert_eq!(fault.cause_chain().unwrap(), "password=hunter2");
    }

    #[test]
    fn envelope_round_trips() {
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
