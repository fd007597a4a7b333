//! Middleware around all routes of the REST API. It assigns the request ID, opens the tracing span, reads the body
//! within a time limit, and turns errors into problem documents. Permits are taken later, when a service is called
//! ([`crate::admission`]).

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, HttpBody as _},
    extract::{MatchedPath, Request, State},
    http::{HeaderValue, Response, StatusCode, header},
    middleware::Next,
    response::IntoResponse,
};
use metrics::{counter, histogram};
use tokio::time::Instant;
use tracing::{Instrument, field::Empty, info_span};
use vmwatch_bus::random_id;

use super::problem::{Problem, REQUEST_ID};
use crate::{Gateway, body};

/// Id of an HTTP request, which the middleware passes to extractors.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

/// Middleware around every REST route and the fallback.
pub(super) async fn middleware(
    State(gateway): State<Arc<Gateway>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    let started = Instant::now();
    let request_id = random_id();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("none", MatchedPath::as_str)
        .to_owned();
    let span = info_span!(
        "HTTP",
        otel.name = format!("{} {route}", request.method()),
        otel.kind = "server",
        http.request.method = %request.method(),
        http.route = route,
        http.response.status_code = Empty,
        request_id,
    );
    request.extensions_mut().insert(RequestId(request_id.clone()));
    let answered = async {
        // Read the body before the handler runs, so that a client that sends slowly holds no permit.
        match with_body(request, gateway.http.body_timeout).await {
            Ok(request) => next.run(request).await,
            Err(problem) => problem.into_response(),
        }
    };
    let mut response = answered.instrument(span.clone()).await;
    finish(&mut response, &request_id);
    span.record("http.response.status_code", response.status().as_u16());
    counter!("vmwatch_http_requests_total", "status" => response.status().as_str().to_owned()).increment(1);
    histogram!("vmwatch_http_request_seconds", "route" => route).record(started.elapsed().as_secs_f64());
    response
}

/// Reads the request body into memory.
async fn with_body(request: Request, limit: Duration) -> Result<Request, Problem> {
    if request.body().is_end_stream() {
        return Ok(request);
    }
    let (parts, body) = request.into_parts();
    let unread = Request::from_parts(parts.clone(), body);
    let bytes = body::read(unread, limit)
        .await
        .map_err(|(status, text)| Problem::new(status, "invalid", text))?;
    if body::is_deep(&bytes) {
        return Err(Problem::invalid(body::TOO_DEEP));
    }
    Ok(Request::from_parts(parts, Body::from(bytes)))
}

/// Adds the request ID to the response and turns an error response into a problem document.
fn finish(response: &mut Response<Body>, request_id: &str) {
    let problem = response.extensions_mut().remove::<Problem>().or_else(|| {
        // axum answers 405 if the path exists but not for this HTTP method; it has set `Allow` already.
        let wrong_method = response.status() == StatusCode::METHOD_NOT_ALLOWED;
        let detail =
            "this path does not support the HTTP method; the Allow header lists the supported methods";
        wrong_method.then(|| Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", detail))
    });
    if let Some(problem) = problem {
        let allowed = response.headers_mut().remove(header::ALLOW);
        *response = problem.document(request_id);
        response
            .headers_mut()
            .extend(allowed.map(|allowed| (header::ALLOW, allowed)));
    }
    let request_id = HeaderValue::from_str(request_id).map(|id| (REQUEST_ID, id));
    response.headers_mut().extend(request_id);
}

/// Response for a path that has no route.
pub(crate) fn no_such_path() -> Response<Body> {
    let detail = "no such path; /api/docs describes the API";
    Problem::new(StatusCode::NOT_FOUND, "not_found", detail).into_response()
}
