//! What a reply on the bus looks like: one JSON object, success or fault, whatever the method.
//!
//! ```json
//! {"status_code":1,"message":"success query vm information","data":[…]}
//! {"status_code":3,"message":"no such VM","fault":"not_found"}
//! ```

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

/// The documented `status_code` (docs/api/wire-contract.md, "Answer").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u8", from = "u8")]
pub enum Status {
    /// 1: what every success of the documented methods carries.
    Created = 1,
    /// 2: documented, used by none of its samples.
    Success = 2,
    /// 3: every failure.
    Failure = 3,
    /// 4: the deadline passed before the service answered.
    Timeout = 4,
}

impl From<Status> for u8 {
    fn from(status: Status) -> Self {
        status as Self
    }
}

/// A code that only a newer version knows is a failure.
impl From<u8> for Status {
    fn from(code: u8) -> Self {
        match code {
            1 => Self::Created,
            2 => Self::Success,
            4 => Self::Timeout,
            _ => Self::Failure,
        }
    }
}

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

    /// The documented status code of this fault.
    pub const fn status(&self) -> Status {
        match self.kind {
            FaultKind::Timeout => Status::Timeout,
            _ => Status::Failure,
        }
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
    /// The documented status code.
    pub status_code: Status,
    /// The public text of a fault, or the method's success text.
    pub message: String,
    /// The kind of a fault; absent on success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<FaultKind>,
    /// Milliseconds to wait before another try, where a fault says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The method's reply; absent on a fault.
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub data: Option<T>,
}

impl<T> Envelope<T> {
    /// The envelope of a success.
    pub fn success(message: &str, data: T) -> Self {
        Self {
            status_code: Status::Created,
            message: message.to_owned(),
            fault: None,
            retry_after_ms: None,
            data: Some(data),
        }
    }

    /// The envelope of a fault; its cause stays behind.
    pub fn fault(fault: &Fault) -> Self {
        Self {
            status_code: fault.status(),
            message: fault.message.clone(),
            fault: Some(fault.kind),
            retry_after_ms: fault
                .retry_after
                .map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
            data: None,
        }
    }

    /// Splits the envelope into the success text and data, or the fault.
    pub fn into_result(self) -> Result<(String, T), Fault> {
        match (self.fault, self.data) {
            (None, Some(data)) => Ok((self.message, data)),
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
            r#"{"status_code":3,"message":"the store does not answer","fault":"backend"}"#
        );
        assert_eq!(fault.cause_chain().unwrap(), "password=hunter2");
    }

    #[test]
    fn an_envelope_comes_back_as_it_was_sent() {
        let sent = serde_json::to_string(&Envelope::success("done", vec![1, 2])).unwrap();
        assert_eq!(sent, r#"{"status_code":1,"message":"done","data":[1,2]}"#);
        let back: Envelope<Vec<i32>> = serde_json::from_str(&sent).unwrap();
        assert_eq!(back.into_result().unwrap(), ("done".to_owned(), vec![1, 2]));

        let fault = Fault::new(FaultKind::Throttled, "slow down").retry_after(Duration::from_secs(7));
        let sent = serde_json::to_string(&Envelope::<()>::fault(&fault)).unwrap();
        let back: Envelope<()> = serde_json::from_str(&sent).unwrap();
        let back = back.into_result().unwrap_err();
        assert_eq!(
            (back.kind, back.retry_after),
            (FaultKind::Throttled, Some(Duration::from_secs(7)))
        );
    }

    #[test]
    fn a_timeout_is_status_4_and_all_other_faults_3() {
        assert_eq!(Fault::new(FaultKind::Timeout, "").status(), Status::Timeout);
        assert_eq!(Fault::new(FaultKind::Internal, "").status(), Status::Failure);
    }
}
