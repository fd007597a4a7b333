//! The documented API of 2017 (docs/api): a single path, a method code in the request body, and an envelope around
//! every answer.

mod answer;
pub mod python_repr;
mod request;
mod rows;
mod table;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    body::Body as HttpBody,
    extract::{ConnectInfo, Request, State},
    http::{Method as Verb, Response, StatusCode},
};
use metrics::{counter, histogram};
use serde_json::value::RawValue;
use tokio::time::Instant;
use tracing::{Instrument, debug, field::Empty, info_span};
use vmwatch_api::{
    Access, Kind, Principal,
    auth::{Session, Token},
    wire::{Envelope, Fault, FaultKind},
};
use vmwatch_bus::Context;

pub use self::table::{Documented, Shape, TABLE};
use self::{
    answer::{EMPTY_ECHO, Echo, respond},
    python_repr::rows_to_python,
    request::{Body, Format, Parameters},
    table::Status,
};
use crate::{Gateway, body};

/// The only path of the documented API.
pub const PATH: &str = "/wsgi_app.py";

/// Handles every request to the path of the documented API.
pub(crate) async fn serve(
    State(gateway): State<Arc<Gateway>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response<HttpBody> {
    let started = Instant::now();
    let span = info_span!(
        "POST /wsgi_app.py",
        otel.kind = "server",
        http.request.method = %request.method(),
        http.route = PATH,
        http.response.status_code = Empty,
        rpc.method = Empty,
        request_id = Empty,
    );
    let source = gateway.proxies.client(peer, request.headers());
    let response = gateway.legacy(source, request).instrument(span.clone()).await;
    span.record("http.response.status_code", response.status().as_u16());
    counter!("vmwatch_http_requests_total", "status" => response.status().as_str().to_owned()).increment(1);
    histogram!("vmwatch_http_request_seconds").record(started.elapsed().as_secs_f64());
    response
}

/// For fuzz tests: decodes a request body into the parameters that a service would receive, or the fault that the
/// client would receive; `None` if the body is not a single JSON object.
pub fn read_request(body: &[u8]) -> Option<Result<Vec<u8>, Fault>> {
    let body = Body::parse(body)?;
    Some(body.method(TABLE).and_then(|_| Ok(body.parameters()?.params)))
}

impl Gateway {
    async fn legacy(&self, source: IpAddr, request: Request) -> Response<HttpBody> {
        if request.method() != Verb::POST {
            let text = "this path supports only POST";
            return EMPTY_ECHO.refusal(StatusCode::METHOD_NOT_ALLOWED, Status::Failure, text);
        }
        let bytes = match body::read(request, self.http.body_timeout).await {
            Ok(bytes) => bytes,
            Err((status, text)) => return EMPTY_ECHO.refusal(status, Status::Failure, text),
        };
        let Some(body) = Body::parse(&bytes) else {
            let text = "the body must be one JSON object";
            return EMPTY_ECHO.refusal(StatusCode::BAD_REQUEST, Status::Failure, text);
        };
        // The nesting depth is checked after parsing, which is safe because this parser does not recurse.
        if body::is_deep(&bytes) {
            return EMPTY_ECHO.refusal(StatusCode::BAD_REQUEST, Status::Failure, body::TOO_DEEP);
        }
        let method = body.method(self.documented);
        let (echo_method, session_id, message_id) =
            (body.method_echo(), body.session_id(), body.message_id_echo());
        let echo = Echo {
            shape: method.as_ref().map_or(Shape::Rows, |row| row.shape),
            method: &echo_method,
            session_id: &session_id,
            message_id: &message_id,
        };
        let answered = match method {
            Ok(row) => self.answer(source, &body, &echo, row).await,
            Err(fault) => Err(fault),
        };
        answered.map_or_else(
            |fault| {
                debug!(kind = %fault.kind, cause = fault.cause_chain(), "{}", fault.logged());
                echo.fault(&fault)
            },
            |json| respond(StatusCode::OK, json),
        )
    }

    async fn answer(
        &self,
        source: IpAddr,
        body: &Body<'_>,
        echo: &Echo<'_>,
        row: &Documented,
    ) -> Result<String, Fault> {
        let info = &row.method;
        // Check the session first: before any other parameter is validated and before a permit is taken.
        let principal = self.authorize(info.access, echo.session_id).await?;
        let Parameters { format, params, .. } = body.parameters()?;
        let mut context = Context::new(self.deadlines.for_kind(info.kind));
        context.principal = principal;
        context.source = Some(source.to_string());
        if info.kind == Kind::Command {
            context = context.with_fresh_key();
        }
        tracing::Span::current()
            .record("rpc.method", info.subject)
            .record("request_id", context.request_id.as_str());
        let _permit = self.admission.enter(info, &context).await?;
        if row.shape == Shape::Rows {
            let mut rows = rows::read_all(self, info, &context, params).await?;
            if format == Format::Python {
                rows = rows_to_python(&rows).map_err(unreadable)?;
            }
            return Ok(echo.answer(Status::Created, row.success, &rows));
        }
        let reply = self.bus.forward(info, &context, params.into()).await?;
        render(echo, row, &reply)
    }

    /// Checks the session and returns its principal; `None` if the method needs no session.
    async fn authorize(&self, access: Access, session_id: &str) -> Result<Option<Principal>, Fault> {
        if access == Access::Public {
            return Ok(None);
        }
        let invalid = || Fault::new(FaultKind::Unauthenticated, "invalid or expired session");
        let token: Token = session_id.parse().map_err(|_| invalid())?;
        let session = self.sessions.check(&token).await?.ok_or_else(invalid)?;
        Ok(Some(session.principal().clone()))
    }
}

/// Writes the answer for a service's successful reply that has no rows.
fn render(echo: &Echo<'_>, row: &Documented, reply: &[u8]) -> Result<String, Fault> {
    let envelope: Envelope<&RawValue> = serde_json::from_slice(reply).map_err(unreadable)?;
    let data = envelope.into_result()?;
    if row.shape != Shape::Session {
        return Ok(echo.answer(Status::Created, row.success, "null"));
    }
    let session: Session = serde_json::from_str(data.get()).map_err(unreadable)?;
    let session_id = session.session_id.to_string();
    let echo = Echo {
        session_id: &session_id,
        ..*echo
    };
    Ok(echo.answer(Status::Created, row.success, "null"))
}

fn unreadable(error: serde_json::Error) -> Fault {
    Fault::new(FaultKind::Internal, "the service's reply could not be decoded").caused_by(error)
}
