//! Reads HTTP request bodies within limits of size, time and nesting depth.

use std::time::Duration;

use axum::{
    body::{Body, HttpBody as _},
    extract::Request,
    http::{StatusCode, header},
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

/// Maximum size of a request body in bytes, as stated in docs/api/wire-contract.md, "Endpoint".
const BODY_BYTES: u64 = 64 * 1024;
/// Maximum number of bytes of an oversized request body that are read and discarded before the refusal is sent.
const DISCARDED_BYTES: u64 = 16 << 20;

/// Maximum nesting depth of JSON arrays and objects: ten times what any request of either API needs.
const DEPTH: usize = 32;

/// Error message for a request body that is nested more deeply than [`DEPTH`].
pub(crate) const TOO_DEEP: &str = "the body must be nested at most 32 deep";

/// Reads the request body within the limits. The inner error is the HTTP status and text of the refusal.
pub(crate) async fn read(request: Request, limit: Duration) -> Result<Bytes, (StatusCode, &'static str)> {
    let too_large = (StatusCode::PAYLOAD_TOO_LARGE, "the body must be at most 64 KiB");
    let announced = request.body().size_hint().lower();
    // A client that sends `Expect: 100-continue` waits for permission to send the body. hyper grants it when the
    // gateway starts to read the body, so a body that is too large can be refused before.
    let waits = request.headers().contains_key(header::EXPECT);
    if announced > DISCARDED_BYTES || (waits && announced > BODY_BYTES) {
        return Err(too_large);
    }
    match tokio::time::timeout(limit, collect(request.into_body())).await {
        Ok(Ok(Some(bytes))) => Ok(bytes),
        Ok(Ok(None)) => Err(too_large),
        Ok(Err(_)) => Err((StatusCode::BAD_REQUEST, "the body could not be read completely")),
        Err(_) => Err((StatusCode::REQUEST_TIMEOUT, "the body was received too slowly")),
    }
}

/// Reads the whole body; `None` if it is too large. An oversized body is read and discarded up to [`DISCARDED_BYTES`],
/// because most clients read the response only after sending the whole body, and would lose it if the connection were
/// closed earlier.
async fn collect(mut body: Body) -> Result<Option<Bytes>, axum::Error> {
    let mut kept = BytesMut::new();
    let mut size = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        size += data.len() as u64;
        if size > DISCARDED_BYTES {
            break;
        }
        if size <= BODY_BYTES {
            kept.extend_from_slice(&data);
        }
    }
    Ok((size <= BODY_BYTES).then(|| kept.freeze()))
}

/// Whether the JSON text nests arrays and objects too deeply. If the input is not JSON, the result is meaningless.
pub(crate) fn is_deep(json: &[u8]) -> bool {
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => depth += 1,
            b']' | b'}' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEPTH {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_depth_ignores_brackets_inside_strings() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(!is_deep(nested(32).as_bytes()) && is_deep(nested(33).as_bytes()));
        assert!(is_deep("{\"a\":".repeat(33).as_bytes()));
        let flat = "[],{},".repeat(1000);
        let text = format!(r#"["{}","\"{}\\"]"#, "[".repeat(1000), "{".repeat(1000));
        assert!(!is_deep(flat.as_bytes()) && !is_deep(text.as_bytes()), "{text}");
        // Surplus closing brackets must not offset opening brackets that follow.
        assert!(is_deep(
            format!("{}{}", "]".repeat(50), "[".repeat(33)).as_bytes()
        ));
    }
}
