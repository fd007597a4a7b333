//! Reading a request's body within bounds of size, time and depth.

use std::time::Duration;

use axum::{
    body::{Body, HttpBody as _},
    extract::Request,
    http::{StatusCode, header},
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

/// The largest body (docs/api/wire-contract.md, "Endpoint").
const BODY_BYTES: u64 = 64 * 1024;
/// Of a body that is too large so much is read before it is refused.
const DISCARDED_BYTES: u64 = 16 << 20;

/// How deep brackets may be nested: ten times what any request of either API needs.
const DEPTH: usize = 32;

/// The refusal of what is nested deeper.
pub(crate) const TOO_DEEP: &str = "the body must be nested at most 32 deep";

/// Reads the body within the limits of size and time, or gives the HTTP status and the text of its refusal.
pub(crate) async fn read(request: Request, limit: Duration) -> Result<Bytes, (StatusCode, &'static str)> {
    let too_large = (StatusCode::PAYLOAD_TOO_LARGE, "the body must be at most 64 KiB");
    let announced = request.body().size_hint().lower();
    // Such a client sends the body only when asked for it, which reading does.
    let waits = request.headers().contains_key(header::EXPECT);
    if announced > DISCARDED_BYTES || (waits && announced > BODY_BYTES) {
        return Err(too_large);
    }
    match tokio::time::timeout(limit, collect(request.into_body())).await {
        Ok(Ok(Some(bytes))) => Ok(bytes),
        Ok(Ok(None)) => Err(too_large),
        Ok(Err(_)) => Err((StatusCode::BAD_REQUEST, "the body could not be read to its end")),
        Err(_) => Err((StatusCode::REQUEST_TIMEOUT, "the body came too slowly")),
    }
}

/// The whole body; `None` where it is too large. That is still read, up to a bound, and thrown away: most clients look
/// for an answer only once they have sent all, and a connection closed before that loses it.
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

/// Whether brackets outside of texts nest deeper than any request needs. Of what is no JSON it may say either.
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
    fn brackets_are_counted_where_they_nest_and_not_in_texts() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(!is_deep(nested(32).as_bytes()) && is_deep(nested(33).as_bytes()));
        assert!(is_deep("{\"a\":".repeat(33).as_bytes()));
        let flat = "[],{},".repeat(1000);
        let text = format!(r#"["{}","\"{}\\"]"#, "[".repeat(1000), "{".repeat(1000));
        assert!(!is_deep(flat.as_bytes()) && !is_deep(text.as_bytes()), "{text}");
        // Closing brackets save nothing up.
        assert!(is_deep(
            format!("{}{}", "]".repeat(50), "[".repeat(33)).as_bytes()
        ));
    }
}
