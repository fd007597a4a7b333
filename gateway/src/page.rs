//! Serves the web page (`gateway/web`), whose files `build.rs` embeds into the gateway. The web page uses only the REST
//! API.
//!
//! The web page's views have paths of their own, which the browser resolves. A browser that requests a path that is
//! neither a file nor part of the API therefore gets the web page itself.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header},
    response::IntoResponse,
};
use bytes::Bytes;

use crate::rest::no_such_path;

struct File {
    path: &'static str,
    plain: &'static [u8],
    gzip: &'static [u8],
}

const FILES: &[File] = include!(concat!(env!("OUT_DIR"), "/page_files.rs"));
const INDEX: &str = "/index.html";
/// Path prefix of files whose names contain a content hash (added by Vite). Their contents never change, so browsers
/// may cache them for ever.
const ASSETS: &str = "/assets/";
/// Content security policy of the web page: only files and API calls of its own origin, and no inline scripts or
/// styles.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
     font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
const NOT_BUILT: &str = "This gateway was built without its page. The REST API is available and documented at /api/docs.\n\
     To build the page, run `./dev up`, or run `npm ci && npm run build` in gateway/web and rebuild the gateway.\n";

/// Fallback route: answers with a file of the web page, the web page itself, or 404.
pub(crate) async fn serve(request: Request) -> Response<Body> {
    let path = request.uri().path();
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    let found = FILES.iter().find(|file| file.path == path && path != INDEX);
    match found {
        Some(file) if reads => answer(file, request.headers()),
        None if reads && is_view(path, request.headers()) => view(FILES, request.headers()),
        _ => no_such_path(),
    }
}

/// Whether the request may be a browser navigating to a view of the web page.
fn is_view(path: &str, headers: &HeaderMap) -> bool {
    let other = path == "/api" || path.starts_with("/api/") || path.starts_with(ASSETS);
    path == "/" || (!other && lists(headers, header::ACCEPT, "text/html"))
}

fn view(files: &[File], headers: &HeaderMap) -> Response<Body> {
    match files.iter().find(|file| file.path == INDEX) {
        Some(index) => answer(index, headers),
        None => (StatusCode::NOT_FOUND, NOT_BUILT).into_response(),
    }
}

fn answer(file: &File, headers: &HeaderMap) -> Response<Body> {
    let gzipped = lists(headers, header::ACCEPT_ENCODING, "gzip");
    let body = if gzipped { file.gzip } else { file.plain };
    let mut response = Response::new(Body::from(Bytes::from_static(body)));
    let cached = (header::CACHE_CONTROL, "public, max-age=31536000, immutable");
    let sent = [
        (header::CONTENT_TYPE, content_type(file.path)),
        (header::VARY, "Accept-Encoding"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
    ];
    let sent = sent
        .into_iter()
        .chain(file.path.starts_with(ASSETS).then_some(cached));
    let headers = response.headers_mut();
    headers.extend(sent.map(|(name, value)| (name, HeaderValue::from_static(value))));
    if gzipped {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

/// Whether an `Accept` or `Accept-Encoding` header lists this value with a weight other than zero.
pub(crate) fn lists(headers: &HeaderMap, name: header::HeaderName, wanted: &str) -> bool {
    let values = headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| {
        let mut parts = item.split(';').map(str::trim);
        parts.next().is_some_and(|item| item.eq_ignore_ascii_case(wanted))
            && !parts.any(|weight| matches!(weight, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
    })
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &'static str) -> HeaderMap {
        [(name, HeaderValue::from_static(value))].into_iter().collect()
    }

    #[test]
    fn web_page_is_served_only_to_browsers_and_outside_api_paths() {
        let browser = headers(header::ACCEPT, "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8");
        let program = headers(header::ACCEPT, "*/*");
        for (path, to_browser, to_program) in [
            ("/", true, true),
            ("/vms/vm-1", true, false),
            ("/anything", true, false),
            ("/api", false, false),
            ("/api/v1/nothing", false, false),
            ("/assets/old.js", false, false),
        ] {
            assert_eq!(is_view(path, &browser), to_browser, "{path}");
            assert_eq!(is_view(path, &program), to_program, "{path}");
        }
    }

    #[tokio::test]
    async fn gateway_without_web_page_explains_how_to_build_it() {
        let response = view(&[], &HeaderMap::new());
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        let text = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
        let text = std::str::from_utf8(&text).unwrap();
        assert!(
            text.contains("built without its page") && text.contains("./dev up"),
            "{text}"
        );
        let page = File {
            path: INDEX,
            plain: b"<!doctype html>",
            gzip: b"compressed",
        };
        assert_eq!(view(&[page], &HeaderMap::new()).status(), StatusCode::OK);
    }

    #[test]
    fn gzip_is_sent_only_to_clients_that_accept_it() {
        for (accept, accepted) in [
            ("gzip", true),
            ("br, GZIP;q=0.5", true),
            ("gzip;q=0", false),
            ("gzip; q=0.0, br", false),
            ("identity", false),
            ("xgzip", false),
        ] {
            let headers = headers(header::ACCEPT_ENCODING, accept);
            assert_eq!(
                lists(&headers, header::ACCEPT_ENCODING, "gzip"),
                accepted,
                "{accept}"
            );
        }
    }
}
