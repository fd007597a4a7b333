//! The context of a request (id, deadline, principal and more), which is sent in NATS headers.

use std::time::Duration;

use async_nats::HeaderMap;
use opentelemetry::{
    global::get_text_map_propagator,
    propagation::{Extractor, Injector},
    trace::TraceContextExt,
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use vmwatch_api::{
    Principal,
    api_tokens::ApiTokenLabel,
    time::unix_millis,
    wire::{Fault, FaultKind},
};

/// The names of the NATS headers of a request. In addition, a request has the headers `traceparent` and `tracestate`, which
/// W3C Trace Context defines.
pub mod headers {
    /// Header with the request id, which appears in every log line about the request.
    pub const REQUEST_ID: &str = "Vmwatch-Request-Id";
    /// Header with the deadline, Unix milliseconds; after this time the caller no longer waits for a reply.
    pub const DEADLINE: &str = "Vmwatch-Deadline";
    /// Header with the [`Principal`](vmwatch_api::Principal) as JSON; absent in requests without a session.
    pub const PRINCIPAL: &str = "Vmwatch-Principal";
    /// Header with the [`ApiTokenLabel`](vmwatch_api::api_tokens::ApiTokenLabel) of the request's API token as JSON;
    /// absent in requests without an API token.
    pub const API_TOKEN: &str = "Vmwatch-Api-Token";
    /// Header with the idempotency key of a command. Two commands with the same key take effect only once.
    pub const IDEMPOTENCY_KEY: &str = "Vmwatch-Idempotency-Key";
    /// Header with the IP address of the client, as seen by the gateway.
    pub const SOURCE: &str = "Vmwatch-Source";
}

/// The context of a request: its id, deadline, principal, API token, idempotency key and source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// The id of the request, the same in all services.
    pub request_id: String,
    /// The deadline, Unix milliseconds. Services refuse requests whose deadline has passed. The machines' clocks must
    /// agree to within a small fraction of the shortest time limit, which NTP ensures.
    pub deadline_ms: u64,
    pub principal: Option<Principal>,
    /// The API token with which the principal sent the request. It is only recorded in the audit; the principal already
    /// has the rights of the token.
    pub api_token: Option<ApiTokenLabel>,
    /// The idempotency key; absent unless the request is a command.
    pub idempotency_key: Option<String>,
    /// The IP address of the client, as seen by the gateway.
    pub source: Option<String>,
}

/// Returns 16 random bytes in hex, for request ids and idempotency keys. They come from the thread-local generator
/// (`ChaCha12`, seeded by the operating system), so they are unpredictable and do not cost a system call each.
pub fn random_id() -> String {
    hex::encode(rand::random::<[u8; 16]>())
}

impl Context {
    /// Creates the context of a new request whose deadline is `limit` from now.
    pub fn new(limit: Duration) -> Self {
        Self {
            request_id: random_id(),
            deadline_ms: unix_millis().saturating_add(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            principal: None,
            api_token: None,
            idempotency_key: None,
            source: None,
        }
    }

    /// Sets the principal of the request.
    #[must_use]
    pub fn as_principal(mut self, principal: Principal) -> Self {
        self.principal = Some(principal);
        self
    }

    /// Adds a new random idempotency key to the request.
    #[must_use]
    pub fn with_fresh_key(mut self) -> Self {
        self.idempotency_key = Some(random_id());
        self
    }

    /// Name of the user; empty if the request has no principal.
    pub fn user(&self) -> &str {
        self.principal
            .as_ref()
            .map_or("", |principal| principal.user.as_str())
    }

    /// The time remaining until the deadline; zero if the deadline has passed.
    pub fn remaining(&self) -> Duration {
        Duration::from_millis(self.deadline_ms.saturating_sub(unix_millis()))
    }

    /// Encodes the request context and the span's trace context as NATS headers.
    pub(super) fn to_headers(&self, span: &Span) -> HeaderMap {
        let mut map = HeaderMap::new();
        map.insert(headers::REQUEST_ID, self.request_id.as_str());
        map.insert(headers::DEADLINE, self.deadline_ms.to_string());
        // Encoding cannot fail, because a principal and an API token consist only of texts.
        if let Some(principal) = &self.principal {
            map.insert(
                headers::PRINCIPAL,
                serde_json::to_string(principal).unwrap_or_default(),
            );
        }
        if let Some(token) = &self.api_token {
            map.insert(
                headers::API_TOKEN,
                serde_json::to_string(token).unwrap_or_default(),
            );
        }
        if let Some(key) = &self.idempotency_key {
            map.insert(headers::IDEMPOTENCY_KEY, key.as_str());
        }
        if let Some(source) = &self.source {
            map.insert(headers::SOURCE, source.as_str());
        }
        add_trace(&mut map, span);
        map
    }

    /// Decodes the request context from NATS headers. A request without a deadline or with an invalid principal or API
    /// token is refused.
    pub(super) fn from_headers(map: Option<&HeaderMap>) -> Result<Self, Fault> {
        let text = |name: &str| {
            map.and_then(|map| map.get(name))
                .map(|value| value.as_str().to_owned())
        };
        let refuse = |what: &str| {
            Fault::new(
                FaultKind::Invalid,
                format!("the NATS header {what} is missing or invalid"),
            )
        };
        let deadline_ms = text(headers::DEADLINE)
            .and_then(|value| value.parse().ok())
            .ok_or_else(|| refuse(headers::DEADLINE))?;
        let principal = text(headers::PRINCIPAL)
            .map(|value| {
                serde_json::from_str(&value).map_err(|error| refuse(headers::PRINCIPAL).caused_by(error))
            })
            .transpose()?;
        let api_token = text(headers::API_TOKEN)
            .map(|value| {
                serde_json::from_str(&value).map_err(|error| refuse(headers::API_TOKEN).caused_by(error))
            })
            .transpose()?;
        Ok(Self {
            request_id: text(headers::REQUEST_ID).unwrap_or_else(random_id),
            deadline_ms,
            principal,
            api_token,
            idempotency_key: text(headers::IDEMPOTENCY_KEY),
            source: text(headers::SOURCE),
        })
    }
}

fn add_trace(map: &mut HeaderMap, span: &Span) {
    let trace = span.context();
    get_text_map_propagator(|propagator| propagator.inject_context(&trace, &mut HeaderInjector(map)));
}

/// NATS headers that let a consumer of the message link its span to the span that published it; empty if tracing is
/// off.
pub fn trace_headers(span: &Span) -> HeaderMap {
    let mut map = HeaderMap::new();
    add_trace(&mut map, span);
    map
}

/// Links the span to the span that published the message, if the headers contain a trace context.
pub fn link_to_publisher(span: &Span, map: Option<&HeaderMap>) {
    // Extraction starts from an empty context; otherwise a message without trace headers would be linked to the current
    // span.
    let nothing = opentelemetry::Context::new();
    let context = get_text_map_propagator(|propagator| {
        propagator.extract_with_context(&nothing, &HeaderExtractor(map))
    });
    // The span context may be invalid here; OpenTelemetry ignores links to invalid contexts.
    span.add_link(context.span().span_context().clone());
}

struct HeaderInjector<'a>(&'a mut HeaderMap);

impl Injector for HeaderInjector<'_> {
    fn set(&mut self, key: &str, value: String) {
        self.0.insert(key, value);
    }
}

#[derive(Debug)]
pub struct HeaderExtractor<'a>(pub Option<&'a HeaderMap>);

impl Extractor for HeaderExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0
            .and_then(|map| map.get(key))
            .map(async_nats::HeaderValue::as_str)
    }

    fn keys(&self) -> Vec<&str> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use vmwatch_api::{Role, Scope};

    #[test]
    fn request_context_round_trips_through_nats_headers() {
        let principal = Principal {
            user: "管理".into(),
            role: Role::Admin,
            scope: Scope::All,
        };
        let mut context = Context::new(Duration::from_secs(5))
            .as_principal(principal)
            .with_fresh_key();
        context.source = Some("192.0.2.1".into());
        context.api_token = Some(ApiTokenLabel {
            id: "00112233aabbccdd".parse().unwrap(),
            name: "自动化 \"CI\"".parse().unwrap(),
        });
        assert_eq!(
            Context::from_headers(Some(&context.to_headers(&Span::none()))).unwrap(),
            context
        );
    }

    #[test]
    fn nats_headers_match_golden_files_and_unknown_headers_are_ignored() {
        for golden in [
            include_str!("../../../tests/golden/forms/context-headers-token.json"),
            include_str!("../../../tests/golden/forms/context-headers.json"),
        ] {
            let golden: BTreeMap<String, String> = serde_json::from_str(golden).unwrap();
            let mut map = HeaderMap::new();
            for (name, value) in &golden {
                map.insert(name.as_str(), value.as_str());
            }
            let context = Context::from_headers(Some(&map)).unwrap();
            assert_eq!(context.to_headers(&Span::none()), map);
            map.insert("Vmwatch-Of-A-Newer-Version", "1");
            assert_eq!(Context::from_headers(Some(&map)).unwrap(), context);
        }
    }

    #[test]
    fn request_without_deadline_or_with_invalid_principal_or_token_is_rejected() {
        assert!(Context::from_headers(None).is_err());
        for (header, value) in [
            (headers::PRINCIPAL, "root"),
            (headers::API_TOKEN, "00112233aabbccdd"),
        ] {
            let mut map = Context::new(Duration::from_secs(5)).to_headers(&Span::none());
            map.insert(header, value);
            let refused = Context::from_headers(Some(&map)).unwrap_err();
            assert_eq!(refused.kind, FaultKind::Invalid, "{header}");
        }
    }
}
