//! What travels beside a request's parameters, in NATS headers.

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
    time::unix_millis,
    wire::{Fault, FaultKind},
};

/// The names of the headers; `traceparent` and `tracestate` are W3C's own.
pub mod headers {
    /// Echoed in every log line of the request.
    pub const REQUEST_ID: &str = "Vmwatch-Request-Id";
    /// Unix milliseconds after which nobody waits for the answer.
    pub const DEADLINE: &str = "Vmwatch-Deadline";
    /// The [`Principal`](vmwatch_api::Principal) as JSON; absent where there is no session.
    pub const PRINCIPAL: &str = "Vmwatch-Principal";
    /// The caller's key of a command; the same key never acts twice.
    pub const IDEMPOTENCY_KEY: &str = "Vmwatch-Idempotency-Key";
    /// The address that the request came from, as the gateway saw it.
    pub const SOURCE: &str = "Vmwatch-Source";
}

/// What travels beside a request's parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// Of one request from the edge to the last service.
    pub request_id: String,
    /// Unix milliseconds after which nobody waits: services refuse what is past it. Clocks are expected to agree
    /// within a fraction of the deadline, as NTP keeps them.
    pub deadline_ms: u64,
    /// The user behind the request.
    pub principal: Option<Principal>,
    /// The key of a command.
    pub idempotency_key: Option<String>,
    /// Where the request came from.
    pub source: Option<String>,
}

/// 16 random bytes in hex, for request ids and idempotency keys. Of the thread's generator, which is a cipher (`ChaCha12`)
/// keyed by the system's randomness: not to be guessed, and without a system call for each.
pub fn random_id() -> String {
    hex::encode(rand::random::<[u8; 16]>())
}

impl Context {
    /// The context of a new request that may take `limit`.
    pub fn new(limit: Duration) -> Self {
        Self {
            request_id: random_id(),
            deadline_ms: unix_millis().saturating_add(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            principal: None,
            idempotency_key: None,
            source: None,
        }
    }

    /// The same context with the user behind it.
    #[must_use]
    pub fn as_principal(mut self, principal: Principal) -> Self {
        self.principal = Some(principal);
        self
    }

    /// The same context with a fresh idempotency key.
    #[must_use]
    pub fn with_fresh_key(mut self) -> Self {
        self.idempotency_key = Some(random_id());
        self
    }

    /// Who asks; empty for nobody.
    pub fn user(&self) -> &str {
        self.principal.as_ref().map_or("", |who| who.user.as_str())
    }

    /// The time that is left; zero when the deadline has passed.
    pub fn remaining(&self) -> Duration {
        Duration::from_millis(self.deadline_ms.saturating_sub(unix_millis()))
    }

    /// As NATS headers, with the trace context of the span.
    pub(super) fn to_headers(&self, span: &Span) -> HeaderMap {
        let mut map = HeaderMap::new();
        map.insert(headers::REQUEST_ID, self.request_id.as_str());
        map.insert(headers::DEADLINE, self.deadline_ms.to_string());
        if let Some(principal) = &self.principal {
            // A principal is a flat record of texts: it always encodes.
            map.insert(
                headers::PRINCIPAL,
                serde_json::to_string(principal).unwrap_or_default(),
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

    /// From NATS headers; a request without a deadline or with a broken principal is refused.
    pub(super) fn from_headers(map: Option<&HeaderMap>) -> Result<Self, Fault> {
        let text = |name: &str| {
            map.and_then(|map| map.get(name))
                .map(|value| value.as_str().to_owned())
        };
        let refuse = |what: &str| {
            Fault::new(
                FaultKind::Invalid,
                format!("the header {what} is missing or wrong"),
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
        Ok(Self {
            request_id: text(headers::REQUEST_ID).unwrap_or_else(random_id),
            deadline_ms,
            principal,
            idempotency_key: text(headers::IDEMPOTENCY_KEY),
            source: text(headers::SOURCE),
        })
    }
}

fn add_trace(map: &mut HeaderMap, span: &Span) {
    let trace = span.context();
    get_text_map_propagator(|propagator| propagator.inject_context(&trace, &mut HeaderInjector(map)));
}

/// The headers by which whoever takes a message links to the span that published it; none where nothing is traced.
pub fn trace_headers(span: &Span) -> HeaderMap {
    let mut map = HeaderMap::new();
    add_trace(&mut map, span);
    map
}

/// Links a span to the one that published a message with these headers, if that was traced.
pub fn link_to_publisher(span: &Span, map: Option<&HeaderMap>) {
    // From nothing: where there is no header, the span that is current now is not who published.
    let nothing = opentelemetry::Context::new();
    let context = get_text_map_propagator(|propagator| {
        propagator.extract_with_context(&nothing, &HeaderExtractor(map))
    });
    // One that is not valid is left out.
    span.add_link(context.span().span_context().clone());
}

struct HeaderInjector<'a>(&'a mut HeaderMap);

impl Injector for HeaderInjector<'_> {
    fn set(&mut self, key: &str, value: String) {
        self.0.insert(key, value);
    }
}

/// Reads the trace context from NATS headers.
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
    fn a_context_comes_back_from_its_headers() {
        let principal = Principal {
            user: "管理".into(),
            role: Role::Admin,
            scope: Scope::All,
        };
        let mut context = Context::new(Duration::from_secs(5))
            .as_principal(principal)
            .with_fresh_key();
        context.source = Some("192.0.2.1".into());
        assert_eq!(
            Context::from_headers(Some(&context.to_headers(&Span::none()))).unwrap(),
            context
        );
    }

    #[test]
    fn headers_are_their_golden_file_and_are_read_with_more() {
        const GOLDEN: &str = include_str!("../../../tests/golden/forms/context-headers.json");
        let golden: BTreeMap<String, String> = serde_json::from_str(GOLDEN).unwrap();
        let mut map = HeaderMap::new();
        for (name, value) in &golden {
            map.insert(name.as_str(), value.as_str());
        }
        let context = Context::from_headers(Some(&map)).unwrap();
        assert_eq!(context.to_headers(&Span::none()), map);
        map.insert("Vmwatch-Of-A-Newer-Version", "1");
        assert_eq!(Context::from_headers(Some(&map)).unwrap(), context);
    }

    #[test]
    fn a_request_without_a_deadline_or_with_a_broken_principal_is_refused() {
        assert!(Context::from_headers(None).is_err());
        let mut map = Context::new(Duration::from_secs(5)).to_headers(&Span::none());
        map.insert(headers::PRINCIPAL, "root");
        assert_eq!(
            Context::from_headers(Some(&map)).unwrap_err().kind,
            FaultKind::Invalid
        );
    }
}
