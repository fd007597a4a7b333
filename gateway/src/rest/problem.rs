//! REST errors as problem documents (RFC 9457), and the mapping from fault kinds to HTTP statuses.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use serde::Serialize;
use utoipa::ToSchema;
use vmwatch_api::{
    InvalidUserName,
    labels::InvalidLabels,
    wire::{Fault, FaultKind},
};

/// Name of the header with the request ID, which every response has.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Media type of problem documents (RFC 9457, section 3).
pub(super) const PROBLEM_JSON: &str = "application/problem+json";
/// Default value of `Retry-After`, for faults that do not state how long to wait.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);

/// An error to send to a REST client. [`super::middleware`] adds the request ID and turns it into a problem document.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
    retry_after: Option<Duration>,
}

/// An RFC 9457 problem document. `code` identifies the kind of problem, so `type` is always `about:blank`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct ProblemDocument<'a> {
    /// The member `type` of a problem document, which is always `about:blank` in this API.
    #[serde(rename = "type")]
    #[schema(example = "about:blank")]
    kind: &'static str,
    /// Reason phrase of the HTTP status.
    #[schema(example = "Not Found")]
    title: &'a str,
    /// HTTP status of the response.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What is wrong with the request, and how to fix it.
    detail: &'a str,
    /// Machine-readable kind of the problem.
    #[schema(example = "not_found")]
    code: &'a str,
    /// Request ID, as in the logs and in the header `X-Request-Id`.
    request_id: &'a str,
}

impl Problem {
    pub(super) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
            retry_after: None,
        }
    }

    /// The request is malformed or contains an invalid value.
    pub(super) fn invalid(detail: impl Into<String>) -> Self {
        Fault::new(FaultKind::Invalid, detail).into()
    }

    /// The parameters are valid individually but conflict with each other, which a schema cannot express.
    pub(super) fn contradictory(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "contradictory", detail)
    }

    /// The name of a new user breaks a rule that a schema cannot express.
    pub(super) fn user_name(rule: InvalidUserName) -> Self {
        let detail = format!("body: name: {rule}");
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "user_name", detail)
    }

    /// The key of an agent breaks a rule that a schema cannot express: it contains a checksum.
    pub(super) fn agent(rule: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "agent", rule)
    }

    /// A rule, silence or channel of alerts breaks a rule that a schema cannot express.
    pub(super) fn alert(rule: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "alert", rule)
    }

    /// Labels break a rule. A schema cannot express all of them, such as the length in bytes.
    pub(super) fn labels(rule: InvalidLabels) -> Self {
        let detail = format!("body: labels: {rule}");
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "labels", detail)
    }

    /// The request has no session, or its session has expired.
    pub(super) fn unauthenticated() -> Self {
        let detail = "the session is missing or has expired; log in with POST /api/v1/sessions";
        Fault::new(FaultKind::Unauthenticated, detail).into()
    }

    /// The API token of the request is malformed or unknown, or was revoked, has expired or has no owner. All of these
    /// get the same answer.
    pub(super) fn invalid_api_token() -> Self {
        let detail =
            "the API token is not valid: it is unknown, was revoked or has expired, or its owner was removed";
        Fault::new(FaultKind::Unauthenticated, detail).into()
    }

    /// Builds the response that carries the problem document.
    pub(super) fn document(&self, request_id: &str) -> Response<Body> {
        let document = ProblemDocument {
            kind: "about:blank",
            title: self.status.canonical_reason().unwrap_or_default(),
            status: self.status.as_u16(),
            detail: &self.detail,
            code: self.code,
            request_id,
        };
        // Encoding a flat struct of strings and numbers cannot fail.
        let mut response = Response::new(Body::from(serde_json::to_vec(&document).unwrap_or_default()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(
            self.status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        ) {
            // `Retry-After` is in whole seconds: round up, to at least one second.
            let wait = self
                .retry_after
                .unwrap_or(DEFAULT_RETRY_AFTER)
                .as_millis()
                .div_ceil(1000)
                .max(1);
            headers.extend(HeaderValue::from_str(&wait.to_string()).map(|wait| (header::RETRY_AFTER, wait)));
        }
        response
    }
}

impl From<Fault> for Problem {
    fn from(fault: Fault) -> Self {
        let status = match fault.kind {
            FaultKind::Invalid => StatusCode::BAD_REQUEST,
            FaultKind::Unauthenticated => StatusCode::UNAUTHORIZED,
            FaultKind::Forbidden => StatusCode::FORBIDDEN,
            FaultKind::NotFound => StatusCode::NOT_FOUND,
            FaultKind::Conflict => StatusCode::CONFLICT,
            FaultKind::Throttled => StatusCode::TOO_MANY_REQUESTS,
            // Clients need not distinguish an unreachable hypervisor or database from an unreachable service, so all of
            // these are 503.
            FaultKind::Overloaded | FaultKind::Unavailable | FaultKind::Backend => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            FaultKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
            FaultKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let cause = fault.cause_chain();
        tracing::debug!(kind = %fault.kind, cause, "{}", fault.logged());
        Self {
            status,
            code: fault.kind.as_str(),
            detail: fault.message,
            retry_after: fault.retry_after,
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status;
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_sent_only_with_status_429_and_503() {
        let answer = |kind, wait: Option<u64>| {
            let mut fault = Fault::new(kind, "x");
            fault.retry_after = wait.map(Duration::from_millis);
            let response = Problem::from(fault).document("r");
            let header = response.headers().get(header::RETRY_AFTER);
            (
                response.status().as_u16(),
                header.map(|value| value.to_str().unwrap().to_owned()),
            )
        };
        assert_eq!(
            answer(FaultKind::Throttled, Some(1500)),
            (429, Some("2".to_owned()))
        );
        assert_eq!(answer(FaultKind::Unavailable, None), (503, Some("1".to_owned())));
        assert_eq!(answer(FaultKind::Backend, None), (503, Some("1".to_owned())));
        assert_eq!(
            answer(FaultKind::Overloaded, Some(0)),
            (503, Some("1".to_owned()))
        );
        assert_eq!(answer(FaultKind::Timeout, Some(1)), (504, None));
        assert_eq!(answer(FaultKind::NotFound, None), (404, None));
    }
}
