//! What a reply on the bus looks like: one JSON object, success or fault, whatever the method.
//!
//! ```json
//! {"data":[…]}
//! {"fault":"not_found","message":"no such VM"}
//! ```

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

/// Why a request failed, as far as a caller can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum FaultKind {
    /// The request itself is wrong; the text says how to put it right.
    Invalid,
    /// User name and password do not belong together.
    Unauthenticated,
    /// The principal's role does not allow the method.
    Forbidden,
    /// There is no such thing, or none the principal may know of.
    NotFound,
    /// The thing exists, in a state that does not allow this.
    Conflict,
    /// Too many tries; again after [`Fault::retry_after`].
    Throttled,
    /// The service is at its limit of requests in flight and did not start on this one.
    Overloaded,
    /// The bus is away, or no service answers the subject.
    Unavailable,
    /// The service answered, but what it depends on (database, hypervisor) did not.
    Backend,
    /// The deadline passed first.
    Timeout,
    /// A defect of ours, or a fault of a kind that only a newer version knows.
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

/// A failure as the caller may see it, with the cause that only the log sees.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// What a caller can act on.
    pub kind: FaultKind,
    /// Public text: what is wrong and how to put it right, never a cause or what exists.
    pub message: String,
    /// How long to wait before another try, where waiting helps.
    pub retry_after: Option<Duration>,
    /// The internal cause; logged with the request id where the fault is answered, never sent.
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

    /// The same fault, carrying what the log should say.
    #[must_use]
    pub fn caused_by(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.cause = Some(Arc::new(cause));
        self
    }

    /// The same fault, telling the caller when to try again.
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

/// A reply as it travels; `T` is the method's reply, or raw JSON for who only forwards it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
pub struct Envelope<T> {
    /// The kind of a fault; absent on success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<FaultKind>,
    /// The public text of a fault; empty on success.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Milliseconds to wait before another try, where a fault says so.
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

    /// The envelope of a fault; its cause stays behind.
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

    /// The reply, or the fault.
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
    fn a_fault_keeps_its_cause_to_itself() {
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
    fn an_envelope_comes_back_as_it_was_sent() {
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
