//! Writes an answer of the documented API. Keys appear in the order of the sample answers in the API document.

use std::fmt::Write as _;

use axum::{
    body::Body,
    http::{HeaderValue, Response, StatusCode, header},
};
use vmwatch_api::wire::{Fault, FaultKind};

use super::{
    python_repr::push_text,
    table::{Key, Shape, Status},
};

/// Values of the request that every answer of the documented API repeats.
#[derive(Debug)]
pub(super) struct Echo<'a> {
    /// Shape of the answer: which keys it has. An unknown method gets [`Shape::Rows`].
    pub(super) shape: Shape,
    /// Method code as sent by the client, in JSON; `null` if it was absent or invalid.
    pub(super) method: &'a str,
    /// Session id of the request; after a login, the id of the new session.
    pub(super) session_id: &'a str,
    pub(super) message_id: &'a str,
}

impl Echo<'_> {
    /// Writes the answer to a request; `data` is JSON.
    pub(super) fn answer(&self, status: Status, message: &str, data: &str) -> String {
        let mut out = String::with_capacity(256 + data.len());
        for key in self.shape.keys() {
            match key {
                Key::StatusCode => push_field(&mut out, "status_code", &(status as u8).to_string()),
                Key::SessionId => push_field(&mut out, "session_id", &json(self.session_id)),
                Key::MessageId => push_field(&mut out, "message_id", &json(self.message_id)),
                Key::Message => push_field(&mut out, "message", &message_json(message)),
                Key::Data => push_field(&mut out, "data", data),
                Key::Method => push_field(&mut out, "method", self.method),
            }
        }
        out.push('}');
        out
    }

    /// The answer for a failed request, with the HTTP status that the contract assigns to its kind of fault.
    pub(super) fn fault(&self, fault: &Fault) -> Response<Body> {
        let status = match fault.kind {
            FaultKind::Throttled => StatusCode::TOO_MANY_REQUESTS,
            FaultKind::Overloaded | FaultKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::OK,
        };
        let mut response = self.refusal(status, fault.kind.into(), &fault.message);
        if status != StatusCode::OK {
            // `Retry-After` is in whole seconds: round up, to at least one second.
            let wait = fault
                .retry_after
                .map_or(1, |wait| wait.as_millis().div_ceil(1000).max(1));
            if let Ok(value) = HeaderValue::from_str(&wait.to_string()) {
                response.headers_mut().insert(header::RETRY_AFTER, value);
            }
        }
        response
    }

    /// An error answer without data, sent with the given HTTP status.
    pub(super) fn refusal(&self, http: StatusCode, status: Status, message: &str) -> Response<Body> {
        respond(http, self.answer(status, message, "null"))
    }
}

/// What the answer to a request that could not be parsed contains in the fields that repeat values of the request.
pub(super) const EMPTY_ECHO: Echo<'static> = Echo {
    shape: Shape::Rows,
    method: "null",
    session_id: "",
    message_id: "",
};

pub(super) fn respond(status: StatusCode, json: String) -> Response<Body> {
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn push_field(out: &mut String, key: &str, value: &str) {
    let separator = if out.is_empty() { '{' } else { ',' };
    // Writing to a String cannot fail.
    let _ = write!(out, "{separator}\"{key}\":{value}");
}

/// Writes a message as the documented API does: its Python `repr`, as a JSON string.
fn message_json(message: &str) -> String {
    let mut python = String::with_capacity(message.len() + 2);
    push_text(&mut python, message);
    json(&python)
}

fn json(text: &str) -> String {
    // Encoding a string cannot fail.
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn documented_answer_has_keys_in_documented_order() {
        let echo = |shape| Echo {
            shape,
            method: "458753",
            session_id: "s",
            message_id: "",
        };
        assert_eq!(
            echo(Shape::Session).answer(Status::Created, "User authenticated sucessfully...", "null"),
            r#"{"status_code":1,"message":"'User authenticated sucessfully...'","method":458753,"session_id":"s","message_id":""}"#
        );
        assert_eq!(
            echo(Shape::Null).answer(Status::Created, "", "null"),
            r#"{"status_code":1,"session_id":"s","message_id":"","message":"''","data":null,"method":458753}"#
        );
    }

    #[test]
    fn documented_answer_to_a_fault_has_the_http_status_of_the_contract() {
        let http = |kind| {
            let fault = Fault::new(kind, "x").retry_after(Duration::from_millis(1500));
            let response = EMPTY_ECHO.fault(&fault);
            let after = response
                .headers()
                .get(header::RETRY_AFTER)
                .map(|value| value.to_str().unwrap().to_owned());
            (response.status().as_u16(), after)
        };
        assert_eq!(http(FaultKind::Timeout), (200, None));
        assert_eq!(http(FaultKind::Internal), (200, None));
        assert_eq!(http(FaultKind::Backend), (200, None));
        assert_eq!(http(FaultKind::Throttled), (429, Some("2".to_owned())));
        assert_eq!(http(FaultKind::Unavailable), (503, Some("2".to_owned())));
        assert_eq!(http(FaultKind::Overloaded), (503, Some("2".to_owned())));
    }
}
