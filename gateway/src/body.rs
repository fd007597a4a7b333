//! Reading a request's body within bounds of size and time.

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
