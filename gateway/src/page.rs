//! The page (`gateway/web`), as `build.rs` put it into the program. It stands on the REST API alone.
//!
//! Its views have addresses of their own, which the page itself understands: whatever a browser asks for that is neither
//! a file of the page nor of the API is answered with the page.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header},
    response::IntoResponse,
};
use bytes::Bytes;

use crate::rest::no_such_path;

/// A file of the page.
struct File {
    /// Its address.
    path: &'static str,
    plain: &'static [u8],
    gzip: &'static [u8],
}

const FILES: &[File] = include!(concat!(env!("OUT_DIR"), "/page_files.rs"));
const INDEX: &str = "/index.html";
/// Vite names these by their content, so that they never change.
const ASSETS: &str = "/assets/";
/// Nothing but the page's own files and its own API, and no script or style in the page's text.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
     font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
const NOT_BUILT: &str = "This gateway was built without its page: the REST API is here, and /api/docs describes it.\n\
     To have the page, run `./dev up`, or `npm ci && npm run build` in gateway/web and then build the gateway.\n";

/// Answers what no route takes: a file of the page, the page, or that there is nothing.
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

/// Whether a browser's address bar may have asked for it.
fn is_view(path: &str, headers: &HeaderMap) -> bool {
    let elsewhere = path == "/api" || path.starts_with("/api/") || path.starts_with(ASSETS);
    path == "/" || (!elsewhere && lists(headers, header::ACCEPT, "text/html"))
}

fn view(files: &[File], headers: &HeaderMap) -> Response<Body> {
    match files.iter().find(|file| file.path == INDEX) {
        Some(index) => answer(index, headers),
        None => (StatusCode::NOT_FOUND, NOT_BUILT).into_response(),
    }
}

fn answer(file: &File, headers: &HeaderMap) -> Response<Body> {
    let packed = lists(headers, header::ACCEPT_ENCODING, "gzip");
    let body = if packed { file.gzip } else { file.plain };
    let mut response = Response::new(Body::from(Bytes::from_static(body)));
    let kept = (header::CACHE_CONTROL, "public, max-age=31536000, immutable");
    let sent = [
        (header::CONTENT_TYPE, content_type(file.path)),
        (header::VARY, "Accept-Encoding"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
    ];
    let sent = sent
        .into_iter()
        .chain(file.path.starts_with(ASSETS).then_some(kept));
    let headers = response.headers_mut();
    headers.extend(sent.map(|(name, value)| (name, HeaderValue::from_static(value))));
    if packed {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

/// Whether a header that lists what is accepted has this, and does not refuse it.
fn lists(headers: &HeaderMap, name: header::HeaderName, wanted: &str) -> bool {
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
    fn a_view_is_what_a_browser_asks_for_and_nobody_else_has() {
        let browser = headers(header::ACCEPT, "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8");
        let program = headers(header::ACCEPT, "*/*");
        for (path, of_browser, of_program) in [
            ("/", true, true),
            ("/vms/vm-1", true, false),
            ("/anything", true, false),
            ("/api", false, false),
            ("/api/v1/nothing", false, false),
            ("/assets/old.js", false, false),
        ] {
            assert_eq!(is_view(path, &browser), of_browser, "{path}");
            assert_eq!(is_view(path, &program), of_program, "{path}");
        }
    }

    #[tokio::test]
    async fn a_gateway_without_the_page_says_so_and_what_to_do() {
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
            gzip: b"packed",
        };
        assert_eq!(view(&[page], &HeaderMap::new()).status(), StatusCode::OK);
    }

    #[test]
    fn gzip_is_sent_to_who_takes_it() {
        for (accept, takes) in [
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
                takes,
                "{accept}"
            );
        }
    }
}
