//! Adds security headers to every response of this gateway. Only the error responses that hyper sends itself, for
//! invalid HTTP or oversized headers, do not have them.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    body::Body,
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Response, header},
    middleware::Next,
};

use crate::Gateway;

/// Security headers that are set on every response.
const ALWAYS: [(HeaderName, &str); 5] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "same-origin"),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("permissions-policy"),
        "accelerometer=(), camera=(), display-capture=(), geolocation=(), gyroscope=(), magnetometer=(), \
         microphone=(), payment=(), usb=()",
    ),
];
/// Security headers that are set only if the route has not set them. Files whose name contains a content hash are the
/// only cacheable responses, and HTML pages are the only responses that may load anything.
const UNLESS_SET: [(HeaderName, &str); 2] = [
    (header::CACHE_CONTROL, "no-store"),
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; frame-ancestors 'none'",
    ),
];
/// Value of `Strict-Transport-Security`: one year. Browsers honour the header only over TLS.
const TRANSPORT_SECURITY: &str = "max-age=31536000";

/// Middleware around all routes that adds the security headers.
pub(crate) async fn secure(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
    next: Next,
) -> Response<Body> {
    let encrypted = gateway.tls || is_forwarded_over_tls(&gateway, &request);
    let mut response = next.run(request).await;
    add(response.headers_mut(), encrypted);
    response
}

/// Whether a trusted proxy reports that the client connected to the proxy over TLS.
fn is_forwarded_over_tls(gateway: &Gateway, request: &Request) -> bool {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    peer.is_some_and(|peer| gateway.proxies.reports_https(peer.0, request.headers()))
}

fn add(headers: &mut HeaderMap, encrypted: bool) {
    for (name, value) in ALWAYS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    for (name, value) in UNLESS_SET {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    if encrypted {
        headers.insert(
            header::STRICT_TRANSPORT_SECURITY,
            HeaderValue::from_static(TRANSPORT_SECURITY),
        );
    }
}
