//! Authenticates REST requests, by the bearer token of a session, by an API token or by the web page's session cookie.
//! A request that changes something is accepted by cookie only from the web page itself; see [`super::same_origin`]. An
//! API token may not send all requests; see [`super::token_policy`].

use std::{net::SocketAddr, sync::Arc};

use axum::{
    extract::{ConnectInfo, FromRequestParts, MatchedPath},
    http::{HeaderMap, header, request::Parts},
};
use metrics::counter;
use tracing::debug;
use vmwatch_api::{
    Access, Kind, Method, Principal, Role,
    api_tokens::ApiToken,
    auth::Token,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Context, serve::check_role};

use super::{middleware::RequestId, problem::Problem, same_origin::check_same_origin, token_policy};
use crate::{Gateway, api_tokens::Grant, sessions::Session};

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
    credential: Credential,
}

/// The valid credential of a request.
#[derive(Debug)]
enum Credential {
    Session { token: Token, session: Session },
    ApiToken(Grant),
}

/// The outcome of checking a credential again while its request is in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recheck {
    Unchanged,
    /// The credential is valid, but permits something else than before.
    Changed,
    Ended,
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
        match &self.credential {
            Credential::Session { session, .. } => session.principal(),
            Credential::ApiToken(grant) => grant.principal(),
        }
    }

    /// Time at which the session or the API token of the request expires, in Unix milliseconds.
    pub(super) fn expires_at_ms(&self) -> u64 {
        match &self.credential {
            Credential::Session { session, .. } => session.record().expires_at_ms,
            Credential::ApiToken(grant) => grant.expires_at_ms(),
        }
    }

    /// The session token of the request. Requests with API tokens are refused.
    pub(super) fn session_token(&self) -> Result<Token, Fault> {
        match &self.credential {
            Credential::Session { token, .. } => Ok(*token),
            Credential::ApiToken(_) => Err(Fault::new(
                FaultKind::Forbidden,
                "this request requires a session; an API token does not suffice",
            )),
        }
    }

    /// Checks again whether the credential is valid and permits the same as before.
    pub(super) async fn check_again(&self, gateway: &Gateway) -> Result<Recheck, Fault> {
        let now = match &self.credential {
            // The sessions of a user end when its role or scope changes.
            Credential::Session { token, .. } => {
                let session = gateway.sessions.check(token).await?;
                return Ok(session.map_or(Recheck::Ended, |_| Recheck::Unchanged));
            }
            Credential::ApiToken(grant) => {
                let source = self.visitor.source.as_deref();
                gateway.api_tokens.check(grant.token(), source).await?
            }
        };
        Ok(match now {
            None => Recheck::Ended,
            Some(grant) if grant.principal() == self.principal() => Recheck::Unchanged,
            Some(_) => Recheck::Changed,
        })
    }

    /// Creates the context of a call to a service in the name of the user. A command gets a random idempotency key.
    pub(super) fn context(&self, gateway: &Gateway, kind: Kind) -> Context {
        let mut context = self
            .visitor
            .context(gateway, kind)
            .as_principal(self.principal().clone());
        if let Credential::ApiToken(grant) = &self.credential {
            context.api_token = Some(grant.label());
        }
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
        let visitor = Visitor::from_request_parts(parts, gateway).await?;
        let mut headers = parts.headers.get_all(header::AUTHORIZATION).iter();
        let credential = if let Some(value) = headers.next() {
            // Of several headers, a proxy could check another one than this gateway.
            let only = headers.next().is_none().then_some(value);
            match only.and_then(|value| value.to_str().ok()).and_then(bearer) {
                Some(Bearer::Session(token)) => session(gateway, token).await?,
                Some(Bearer::ApiToken(token)) => api_token(gateway, parts, &visitor, token).await?,
                None => return Err(Problem::unauthenticated()),
            }
        } else {
            let token = cookie(&parts.headers).ok_or_else(Problem::unauthenticated)?;
            if !parts.method.is_safe() {
                check_same_origin(&gateway.proxies, parts)?;
            }
            session(gateway, token).await?
        };
        let caller = Self { visitor, credential };
        // A credential with a role that only a newer version knows stays valid, but permits nothing on this gateway.
        check_role(Access::Role(Role::Viewer), Some(caller.principal()))?;
        Ok(caller)
    }
}

/// A token in the `Authorization` header.
#[derive(Debug)]
enum Bearer {
    Session(Token),
    ApiToken(Option<ApiToken>),
}

async fn session(gateway: &Gateway, token: Token) -> Result<Credential, Problem> {
    let session = gateway.sessions.check(&token).await?;
    let session = session.ok_or_else(Problem::unauthenticated)?;
    Ok(Credential::Session { token, session })
}

/// Checks an API token, and whether it may send the request. A malformed token is refused like an unknown one.
async fn api_token(
    gateway: &Gateway,
    parts: &Parts,
    visitor: &Visitor,
    token: Option<ApiToken>,
) -> Result<Credential, Problem> {
    let token = token.ok_or_else(Problem::invalid_api_token)?;
    let grant = gateway
        .api_tokens
        .check(&token, visitor.source.as_deref())
        .await?;
    let grant = grant.ok_or_else(Problem::invalid_api_token)?;
    let route = parts
        .extensions
        .get::<MatchedPath>()
        .map_or("", MatchedPath::as_str);
    if let Err(fault) = token_policy::check(grant.access(), &parts.method, route) {
        counter!("vmwatch_api_token_refusals_total").increment(1);
        debug!(token = %grant.id(), user = grant.principal().user, method = %parts.method, route, "{fault}");
        return Err(fault.into());
    }
    Ok(Credential::ApiToken(grant))
}

fn bearer(value: &str) -> Option<Bearer> {
    let (scheme, token) = value.split_once(' ')?;
    let token = scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())?;
    if token.starts_with(ApiToken::PREFIX) {
        Some(Bearer::ApiToken(token.parse().ok()))
    } else {
        token.parse().ok().map(Bearer::Session)
    }
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
            // An API token is never accepted as a cookie.
            (
                "vmwatch_session=vmt_0101010101010101_0202020202020202020202020202020202020202020202020202020202020202",
                false,
            ),
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
        for scheme in ["Bearer", "bearer"] {
            let session = bearer(&format!("{scheme} 9afdb1ec-d396-4ba3-af7a-1e38fd8751ca"));
            assert!(matches!(session, Some(Bearer::Session(_))), "{session:?}");
            let token = ApiToken::from_random([1; 8], [2; 32]);
            let found = bearer(&format!("{scheme} {token}"));
            assert!(matches!(found, Some(Bearer::ApiToken(Some(found))) if found == token));
            let malformed = bearer(&format!("{scheme} vmt_x"));
            assert!(matches!(malformed, Some(Bearer::ApiToken(None))), "{malformed:?}");
        }
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
