//! Checks, for a request with the session cookie, that the web page of this server sent it.
//!
//! A browser sends the cookie with every request to this server, whichever site caused the request. A request that
//! changes something is therefore accepted with a cookie only if the browser reports that the server's own page sent
//! it: by `Sec-Fetch-Site: same-origin` or, if the browser does not send that header (none does over plain HTTP), by an
//! `Origin` equal to the address of the request. This is the algorithm of Go's `net/http.CrossOriginProtection`, except
//! that a request with neither header is refused, since programs can use the bearer token. `SameSite=Strict` is a
//! second line of defence.
//!
//! The address of the request is in `Host`. A reverse proxy may replace `Host` by the gateway's own address, as nginx
//! does by default; a trusted proxy reports the original in `X-Forwarded-Host`.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use axum::{
    extract::{ConnectInfo, FromRequestParts},
    http::{HeaderMap, HeaderName, header, request::Parts, uri::Authority},
};
use vmwatch_api::wire::{Fault, FaultKind};

use crate::{Gateway, proxies::Proxies};

/// Header of W3C Fetch Metadata: how the requesting page relates to this server.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// Maximum length of a header value that a refusal quotes.
const MAX_QUOTED_LEN: usize = 200;

/// The result of [`check_same_origin`], for handlers that need it only for some requests.
pub(super) struct SameOrigin(pub(super) Result<(), Fault>);

impl FromRequestParts<Arc<Gateway>> for SameOrigin {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, Infallible> {
        Ok(Self(check_same_origin(&gateway.proxies, parts)))
    }
}

/// Checks that, according to the browser, a page of this server's own origin sent the request.
pub(super) fn check_same_origin(proxies: &Proxies, parts: &Parts) -> Result<(), Fault> {
    let headers = &parts.headers;
    let reason = match (text(headers, &SEC_FETCH_SITE), text(headers, &header::ORIGIN)) {
        (Some("same-origin" | "none"), _) => return Ok(()),
        (Some(site), _) => format!(
            "Sec-Fetch-Site is {}; programs must use a bearer token",
            quoted(site)
        ),
        (None, None) => {
            "the request has neither Sec-Fetch-Site nor Origin; use a bearer token instead".to_owned()
        }
        (None, Some(origin)) => {
            let address = Address::of(proxies, parts);
            if address.has_origin(origin) {
                return Ok(());
            }
            format!("Origin is {} and {}", quoted(origin), address.mismatch())
        }
    };
    let detail = format!("a session cookie is accepted only from this server's own web page, but {reason}");
    Err(Fault::new(FaultKind::Forbidden, detail))
}

/// The host and port to which the browser sent the request.
struct Address<'a> {
    host: Option<&'a str>,
    /// The header that contains the host.
    header: &'static str,
    /// Whether the gateway received the request from a trusted proxy.
    by_trusted_proxy: bool,
}

impl<'a> Address<'a> {
    fn of(proxies: &Proxies, parts: &'a Parts) -> Self {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        let by_trusted_proxy = peer.is_some_and(|peer| proxies.is_trusted(peer.0));
        let forwarded = peer.and_then(|peer| proxies.forwarded_host(peer.0, &parts.headers));
        let received = || {
            let host = text(&parts.headers, &header::HOST);
            host.or_else(|| parts.uri.authority().map(Authority::as_str))
        };
        Self {
            host: forwarded.or_else(received),
            header: forwarded.map_or("Host", |_| "X-Forwarded-Host"),
            by_trusted_proxy,
        }
    }

    /// Whether the origin has the host and port to which the request was sent. The default port of the origin's scheme
    /// may be omitted in both.
    fn has_origin(&self, origin: &'a str) -> bool {
        let (Some(host), Some((scheme, from))) = (self.host, origin.split_once("://")) else {
            return false;
        };
        let default_port = match scheme {
            "http" => ":80",
            "https" => ":443",
            _ => return false,
        };
        let without_default = |host: &'a str| host.strip_suffix(default_port).unwrap_or(host);
        without_default(host).eq_ignore_ascii_case(without_default(from))
    }

    /// Describes the address of the request, and which proxy settings would correct a wrong address.
    fn mismatch(&self) -> String {
        let host = self.host.map_or_else(|| "missing".to_owned(), quoted);
        let header = self.header;
        let settings = if self.by_trusted_proxy {
            "let the reverse proxy send the browser's Host in X-Forwarded-Host"
        } else {
            "behind a reverse proxy, let it send the browser's Host in X-Forwarded-Host, and add its address to \
             VMWATCH_TRUSTED_PROXIES"
        };
        format!("{header} is {host}; {settings}")
    }
}

/// Quotes the value of a header in a message, shortened if it is long.
fn quoted(value: &str) -> String {
    let start: String = value.chars().take(MAX_QUOTED_LEN).collect();
    let dots = if start.len() < value.len() { "…" } else { "" };
    format!("'{start}{dots}'")
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    const PROXY: &str = "10.0.0.1:1";
    const CLIENT: &str = "198.51.100.7:1";

    /// Checks a request from this peer with these headers. The networks in 10.0.0.0/8 are trusted proxies.
    fn check(peer: &str, sent: &[(&str, &str)]) -> Result<(), String> {
        let mut request = Request::post("/api/v1/me");
        for (name, value) in sent {
            request = request.header(*name, *value);
        }
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        let peer: SocketAddr = peer.parse().unwrap();
        parts.extensions.insert(ConnectInfo(peer));
        check_same_origin(&"10.0.0.0/8".parse().unwrap(), &parts).map_err(|fault| fault.message)
    }

    #[test]
    fn cookie_is_accepted_only_in_requests_from_same_origin() {
        for (sent, believed) in [
            (&[("sec-fetch-site", "same-origin")][..], true),
            (&[("sec-fetch-site", "none")], true),
            (&[("sec-fetch-site", "same-site")], false),
            (
                &[
                    ("sec-fetch-site", "cross-site"),
                    ("origin", "http://here:1"),
                    ("host", "here:1"),
                ],
                false,
            ),
            (&[("origin", "http://here:1"), ("host", "here:1")], true),
            (&[("origin", "http://here:1"), ("host", "HERE:1")], true),
            (&[("origin", "https://here"), ("host", "here")], true),
            (&[("origin", "https://here"), ("host", "here:443")], true),
            (&[("origin", "http://here"), ("host", "here:80")], true),
            (&[("origin", "http://[::1]:8086"), ("host", "[::1]:8086")], true),
            (&[("origin", "http://here"), ("host", "here:443")], false),
            (&[("origin", "http://here:2"), ("host", "here:1")], false),
            (&[("origin", "http://here:8080"), ("host", "here")], false),
            (&[("origin", "http://here.evil.example"), ("host", "here")], false),
            (&[("origin", "null"), ("host", "null")], false),
            (&[("origin", "file://"), ("host", "")], false),
            (&[("origin", "http://here:1")], false),
            (&[("host", "here:1")], false),
        ] {
            assert_eq!(check(CLIENT, sent).is_ok(), believed, "{sent:?}");
        }
    }

    #[test]
    fn forwarded_host_replaces_host_only_if_trusted_proxy_sends_it() {
        let origin = "http://vmwatch.example:8080";
        for (peer, forwarded, believed) in [
            (PROXY, &["vmwatch.example:8080"][..], true),
            (PROXY, &["evil.example, vmwatch.example:8080"], true),
            (PROXY, &["evil.example", "vmwatch.example:8080"], true),
            (PROXY, &["vmwatch.example:8080, evil.example"], false),
            (PROXY, &["vmwatch.example:8080", "evil.example"], false),
            // Hosts with different ports are different origins.
            (PROXY, &["vmwatch.example"], false),
            (PROXY, &[], false),
            (PROXY, &[""], false),
            (CLIENT, &["vmwatch.example:8080"], false),
        ] {
            let mut sent = vec![("origin", origin), ("host", "127.0.0.1:8086")];
            sent.extend(forwarded.iter().map(|host| ("x-forwarded-host", *host)));
            assert_eq!(check(peer, &sent).is_ok(), believed, "{peer} {forwarded:?}");
        }
        // The address at which the proxy reaches the gateway is not the one that the browser used, so it is another
        // origin.
        let sent = [
            ("origin", "http://127.0.0.1:8086"),
            ("host", "127.0.0.1:8086"),
            ("x-forwarded-host", "vmwatch.example"),
        ];
        assert!(check(PROXY, &sent).is_err());
        // `Host` is compared if `X-Forwarded-Host` is missing, because some proxies do not change `Host`, or if it does
        // not come from a trusted proxy.
        assert!(check(PROXY, &sent[..2]).is_ok());
        assert!(check(CLIENT, &sent).is_ok());
    }

    #[test]
    fn refusal_message_names_headers_and_settings() {
        let sent = [
            ("origin", "http://vmwatch.example"),
            ("host", "127.0.0.1:8086"),
            ("x-forwarded-host", "inner.example"),
        ];
        let untrusted = check(CLIENT, &sent).unwrap_err();
        for part in [
            "Origin is 'http://vmwatch.example' and Host is '127.0.0.1:8086'",
            "VMWATCH_TRUSTED_PROXIES",
            "X-Forwarded-Host",
        ] {
            assert!(untrusted.contains(part), "{untrusted}");
        }
        let trusted = check(PROXY, &sent).unwrap_err();
        assert!(
            trusted.contains("X-Forwarded-Host is 'inner.example'; let the reverse proxy"),
            "{trusted}"
        );
        assert!(!trusted.contains("VMWATCH_TRUSTED_PROXIES"), "{trusted}");
        let trusted = check(PROXY, &sent[..2]).unwrap_err();
        assert!(
            trusted.contains("Host is '127.0.0.1:8086'; let the reverse proxy"),
            "{trusted}"
        );
        let browser = check(CLIENT, &[("sec-fetch-site", "cross-site")]).unwrap_err();
        assert!(browser.contains("Sec-Fetch-Site is 'cross-site'"), "{browser}");
        let long = "x".repeat(5_000);
        let detail = check(CLIENT, &[("origin", &long), ("host", &long)]).unwrap_err();
        assert!(detail.len() < 1_000, "{detail}");
    }
}
