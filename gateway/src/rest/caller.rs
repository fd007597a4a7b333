//! Authenticates REST requests, by bearer token or by the web page's session cookie. A request that changes something
//! is accepted by cookie only from the web page itself; see [`super::same_origin`].

use std::{net::SocketAddr, sync::Arc};

use axum::{
    extract::{ConnectInfo, FromRequestParts},
    http::{HeaderMap, header, request::Parts},
};
use vmwatch_api::{Access, Kind, Method, Principal, Role, auth::Token, wire::Fault};
use vmwatch_bus::{Context, serve::check_role};

use super::{middleware::RequestId, problem::Problem, same_origin::check_same_origin};
use crate::{Gateway, sessions::Session};

/// Name of the session cookie over TLS. The prefix `__Host-` prevents other hosts of the domain from setting the
/// cookie.
const SECURE_COOKIE: &str = "__Host-vmwatch_session";
/// Name of the session cookie without TLS.
pub(super) const PLAIN_COOKIE: &str = "vmwatch_session";

/// The client of a request that needs no authentication.
#[derive(Debug)]
pub(super) struct Visitor {
    pub(super) request_id: String,
    /// Address of the client; behind trusted proxies, the address that they report.
    pub(super) source: Option<String>,
}

/// The authenticated user of a request.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) visitor: Visitor,
    pub(super) token: Token,
    pub(super) session: Session,
}

impl Visitor {
    /// Creates the context of a call to a service, without a session.
    pub(super) fn context(&self, gateway: &Gateway, kind: Kind) -> Context {
        let mut context = Context::new(gateway.deadlines.for_kind(kind));
        context.request_id.clone_from(&self.request_id);
        context.source.clone_from(&self.source);
        context
    }
}

impl Caller {
    pub(super) fn principal(&self) -> &Principal {
        self.session.principal()
    }

    /// Creates the context of a call to a service in the name of the user. A command gets a random idempotency key.
    pub(super) fn context(&self, gateway: &Gateway, kind: Kind) -> Context {
        let context = self
            .visitor
            .context(gateway, kind)
            .as_principal(self.principal().clone());
        match kind {
            Kind::Query => context,
            Kind::Command => context.with_fresh_key(),
        }
    }

    /// Calls a method of a service in the name of the user.
    pub(super) async fn ask<M: Method>(
        &self,
        gateway: &Gateway,
        params: &M::Params,
    ) -> Result<M::Reply, Fault> {
        gateway
            .call::<M>(&self.context(gateway, M::INFO.kind), params)
            .await
    }
}

impl FromRequestParts<Arc<Gateway>> for Visitor {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, Problem> {
        Ok(Self {
            request_id: parts
                .extensions
                .get::<RequestId>()
                .map(|id| id.0.clone())
                .unwrap_or_default(),
            source: parts
                .extensions
                .get::<ConnectInfo<SocketAddr>>()
                .map(|peer| gateway.proxies.client(peer.0, &parts.headers).to_string()),
        })
    }
}

impl FromRequestParts<Arc<Gateway>> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, Problem> {
        let token = if let Some(value) = parts.headers.get(header::AUTHORIZATION) {
            value.to_str().ok().and_then(bearer)
        } else {
            let token = cookie(&parts.headers);
            if token.is_some() && !parts.method.is_safe() {
                check_same_origin(&gateway.proxies, parts)?;
            }
            token
        };
        let token = token.ok_or_else(Problem::unauthenticated)?;
        let session = gateway.sessions.check(&token).await?;
        let session = session.ok_or_else(Problem::unauthenticated)?;
        // A session whose role only a newer version knows stays valid, but permits nothing on this gateway.
        check_role(Access::Role(Role::Viewer), Some(session.principal()))?;
        Ok(Self {
            session,
            visitor: Visitor::from_request_parts(parts, gateway).await?,
            token,
        })
    }
}

fn bearer(value: &str) -> Option<Token> {
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| token.trim().parse().ok())
        .flatten()
}

fn cookie(headers: &HeaderMap) -> Option<Token> {
    let of = |name: &str| {
        let values = headers
            .get_all(header::COOKIE)
            .into_iter()
            .filter_map(|value| value.to_str().ok());
        let mut pairs = values
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().split_once('='));
        pairs.find(|(given, _)| *given == name)?.1.parse().ok()
    };
    of(SECURE_COOKIE).or_else(|| of(PLAIN_COOKIE))
}

/// Value of the `Set-Cookie` header for a session, with `Secure` over TLS. An age of 0 deletes the cookie.
pub(super) fn set_cookie(headers: &HeaderMap, token: &str, seconds: u64) -> String {
    let over_tls = headers
        .get(header::ORIGIN)
        .is_some_and(|origin| origin.as_bytes().starts_with(b"https://"));
    let (name, secure) = if over_tls {
        (SECURE_COOKIE, "; Secure")
    } else {
        (PLAIN_COOKIE, "")
    };
    format!("{name}={token}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}")
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        pairs.collect()
    }

    #[test]
    fn session_cookie_is_found_and_is_secure_over_tls() {
        const TOKEN: &str = "9afdb1ec-d396-4ba3-af7a-1e38fd8751ca";
        for (sent, found) in [
            ("vmwatch_session=9afdb1ec-d396-4ba3-af7a-1e38fd8751ca", true),
            (
                "a=b; __Host-vmwatch_session=9afdb1ec-d396-4ba3-af7a-1e38fd8751ca; c",
                true,
            ),
            ("xvmwatch_session=9afdb1ec-d396-4ba3-af7a-1e38fd8751ca", false),
            ("vmwatch_session=9AFDB1EC-d396-4ba3-af7a-1e38fd8751ca", false),
            ("vmwatch_session=", false),
        ] {
            let token = cookie(&headers(&[("cookie", sent)]));
            assert_eq!(
                token.map(|token| token.to_string()).as_deref(),
                found.then_some(TOKEN),
                "{sent}"
            );
        }
        let set = |origin| set_cookie(&headers(&[("origin", origin)]), TOKEN, 60);
        assert_eq!(
            set("http://here"),
            format!("vmwatch_session={TOKEN}; Path=/; Max-Age=60; HttpOnly; SameSite=Strict")
        );
        assert_eq!(
            set("https://here"),
            format!("__Host-vmwatch_session={TOKEN}; Path=/; Max-Age=60; HttpOnly; SameSite=Strict; Secure")
        );
    }

    #[test]
    fn bearer_token_is_read_from_authorization_header() {
        assert!(bearer("Bearer 9afdb1ec-d396-4ba3-af7a-1e38fd8751ca").is_some());
        assert!(bearer("bearer 9afdb1ec-d396-4ba3-af7a-1e38fd8751ca").is_some());
        for bad in [
            "9afdb1ec-d396-4ba3-af7a-1e38fd8751ca",
            "Basic YTpi",
            "Bearer x",
            "Bearer",
            "",
        ] {
            assert!(bearer(bad).is_none(), "{bad}");
        }
    }
}
