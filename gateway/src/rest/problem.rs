//! Failures as RFC 9457 problem documents, and the one place that gives each kind of fault its HTTP status.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use serde::Serialize;
use shared::wire::{Fault, FaultKind};
use utoipa::ToSchema;

/// Carries the id of the request on every answer.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// RFC 9457, section 3.
pub(super) const PROBLEM_JSON: &str = "application/problem+json";
/// Where a fault does not say how long to wait.
const WAIT: Duration = Duration::from_secs(1);

/// A failure, on its way to the client. It becomes a document in [`super::edge`], which knows the request's id.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
    retry_after: Option<Duration>,
}

/// A problem document as RFC 9457 describes it. `type` is always `about:blank`: programs tell problems apart by
/// `code`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct ProblemDocument<'a> {
    /// Always `about:blank`: the title is that of the HTTP status.
    #[serde(rename = "type")]
    #[schema(example = "about:blank")]
    kind: &'static str,
    /// The HTTP status in words.
    #[schema(example = "Not Found")]
    title: &'a str,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What is wrong and how to put it right.
    detail: &'a str,
    /// The kind of the problem, for programs.
    #[schema(example = "not_found")]
    code: &'a str,
    /// What the logs name the request; also in the header `X-Request-Id`.
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

    /// The request itself is wrong.
    pub(super) fn invalid(detail: impl Into<String>) -> Self {
        Fault::new(FaultKind::Invalid, detail).into()
    }

    /// Each part of the request is right, but not beside the others: what no schema can say.
    pub(super) fn contradictory(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "contradictory", detail)
    }

    /// The session is missing or over.
    pub(super) fn unauthenticated() -> Self {
        let detail = "a session is needed: POST /api/v1/sessions makes one";
        Fault::new(FaultKind::Unauthenticated, detail).into()
    }

    /// The body: a document with the request's id.
    pub(super) fn document(&self, request_id: &str) -> Response<Body> {
        let document = ProblemDocument {
            kind: "about:blank",
            title: self.status.canonical_reason().unwrap_or_default(),
            status: self.status.as_u16(),
            detail: &self.detail,
            code: self.code,
            request_id,
        };
        // A flat record of texts and numbers always encodes.
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
            // Whole seconds, at least one: Retry-After knows no fractions.
            let wait = self.retry_after.unwrap_or(WAIT).as_millis().div_ceil(1000).max(1);
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
            // What a service depends on is away: to a client no different from the service being away.
            FaultKind::Overloaded | FaultKind::Unavailable | FaultKind::Backend => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            FaultKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
            FaultKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let cause = fault.cause_chain();
        tracing::debug!(kind = %fault.kind, cause, "{}", fault.message);
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
    fn who_is_told_to_wait_is_told_how_long() {
        let of = |kind, wait: Option<u64>| {
            let mut fault = Fault::new(kind, "x");
            fault.retry_after = wait.map(Duration::from_millis);
            let response = Problem::from(fault).document("r");
            let header = response.headers().get(header::RETRY_AFTER);
            (
                response.status().as_u16(),
                header.map(|value| value.to_str().unwrap().to_owned()),
            )
        };
        assert_eq!(of(FaultKind::Throttled, Some(1500)), (429, Some("2".to_owned())));
        assert_eq!(of(FaultKind::Unavailable, None), (503, Some("1".to_owned())));
        assert_eq!(of(FaultKind::Backend, None), (503, Some("1".to_owned())));
        assert_eq!(of(FaultKind::Overloaded, Some(0)), (503, Some("1".to_owned())));
        assert_eq!(of(FaultKind::Timeout, Some(1)), (504, None));
        assert_eq!(of(FaultKind::NotFound, None), (404, None));
    }
}
