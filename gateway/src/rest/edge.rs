//! What every request of the REST API gets: an id, a span, its body within a time limit, and a problem document where it
//! fails. Its permits it takes where it calls services ([`crate::admission`]).

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

/// The id of a request, for extractors.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

/// Wraps every route and the fallback.
pub(super) async fn edge(
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
        // First, so that a client that sends it slowly holds no permit.
        match whole(request, gateway.http.body_timeout).await {
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

/// The request with its body read.
async fn whole(request: Request, limit: Duration) -> Result<Request, Problem> {
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

/// Writes the problem document, where there is a problem, and the request's id.
fn finish(response: &mut Response<Body>, request_id: &str) {
    let problem = response.extensions_mut().remove::<Problem>().or_else(|| {
        // axum's own answer where a path exists and takes other methods; it names them in `Allow`.
        let wrong_method = response.status() == StatusCode::METHOD_NOT_ALLOWED;
        let detail = "this address does not take this method; the header Allow names those it takes";
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

/// Answers what no route takes.
pub(crate) fn no_such_path() -> Response<Body> {
    let detail = "there is nothing at this address; /api/docs describes the API";
    Problem::new(StatusCode::NOT_FOUND, "not_found", detail).into_response()
}
