//! Tests traces as a collector receives them over OTLP: one request is one tree of spans, from HTTP over the bus and a
//! service to the database.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use axum::{Router, body::Bytes, extract::State, routing::post};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind},
};
use prost::Message;
use serde_json::json;
use testkit::{PATIENCE, Program, Stack, StackBuilder, THIS_MACHINE, codes, eventually};
use tokio::net::TcpListener;
use vmwatch_api::{Role, Scope};

use crate::rest::client::Api;

/// A received span and the name of the program that sent it.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    program: String,
    pub(crate) span: Span,
}

pub(crate) type Spans = Arc<Mutex<Vec<Received>>>;

/// Starts an OTLP/HTTP collector that keeps all spans.
pub(crate) async fn collector() -> (SocketAddr, Spans) {
    let spans = Spans::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new()
        .route("/v1/traces", post(receive))
        .with_state(Arc::clone(&spans));
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, spans)
}

async fn receive(State(spans): State<Spans>, body: Bytes) {
    let request = ExportTraceServiceRequest::decode(body).expect("the body is OTLP in protobuf");
    let mut kept = spans.lock().unwrap();
    for resource in request.resource_spans {
        let attributes = resource
            .resource
            .map(|resource| resource.attributes)
            .unwrap_or_default();
        let program = text(&attributes, "service.name").expect("every program sends its service name");
        for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            kept.push(Received {
                program: program.clone(),
                span,
            });
        }
    }
}

pub(crate) fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes
        .iter()
        .find(|attribute| attribute.key == key)?
        .value
        .clone()?
        .value?;
    match value {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}

/// Returns the spans from the root to the given span as (program, name, kind). Returns an error while a parent is
/// missing: each program sends its spans in batches, so a parent can arrive after its child.
fn chain(spans: &[Received], leaf: &Received) -> Result<Vec<(String, String, SpanKind)>, String> {
    let by_id: HashMap<&[u8], &Received> = spans
        .iter()
        .map(|received| (received.span.span_id.as_slice(), received))
        .collect();
    let mut chain = Vec::new();
    let mut next = Some(leaf);
    while let Some(received) = next {
        let span = &received.span;
        assert_eq!(
            span.trace_id, leaf.span.trace_id,
            "parent and child belong to the same trace"
        );
        chain.push((received.program.clone(), span.name.clone(), span.kind()));
        assert!(
            span.parent_span_id.is_empty() || chain.len() < 10,
            "the chain of parents has a cycle"
        );
        next = by_id.get(span.parent_span_id.as_slice()).copied();
        if next.is_none() && !span.parent_span_id.is_empty() {
            return Err(format!("a parent has not arrived: {chain:?}"));
        }
    }
    chain.reverse();
    Ok(chain)
}

/// Lets these programs send their spans to the collector.
fn traced(builder: StackBuilder, programs: &[Program], endpoint: &str) -> StackBuilder {
    programs.iter().fold(builder, |builder, &program| {
        builder
            .set(program, "VMWATCH_OTLP_ENDPOINT", endpoint)
            .set(program, "OTEL_BSP_SCHEDULE_DELAY", "100")
    })
}

/// Waits for a span of this program with this name, and for its parents. Returns all spans, this one, and the
/// chain from the root to it.
async fn complete(
    spans: &Spans,
    program: &str,
    name: &str,
) -> (Vec<Received>, Received, Vec<(String, String, SpanKind)>) {
    eventually("the complete trace arrives", PATIENCE, async || {
        let spans = spans.lock().unwrap().clone();
        let is_wanted = |received: &&Received| received.program == program && received.span.name == name;
        let leaf = spans.iter().find(is_wanted);
        let leaf = leaf
            .cloned()
            .ok_or_else(|| format!("{} spans received so far", spans.len()))?;
        let chain = chain(&spans, &leaf)?;
        Ok((spans, leaf, chain))
    })
    .await
}

fn step(program: &str, name: &str, kind: SpanKind) -> (String, String, SpanKind) {
    (program.to_owned(), name.to_owned(), kind)
}

#[tokio::test]
async fn request_is_one_trace_from_http_to_database() {
    let (address, spans) = collector().await;
    let endpoint = format!("http://{address}");
    let programs = [
        Program::Gateway,
        Program::Auth,
        Program::Metrics,
        Program::Lifecycle,
    ];
    let stack = traced(Stack::builder(), &programs, &endpoint).start().await;
    let session = stack.session(Role::Viewer, Scope::All).await;
    let gateway = stack.gateway(0);
    assert!(
        gateway
            .rows(&session, codes::VM, 1, json!({ "instance_id": "vm-1" }))
            .await
            .is_empty()
    );

    let (spans, leaf, chain) = complete(&spans, "vmwatch-metrics", "find blocks").await;
    assert_eq!(
        chain,
        [
            step("vmwatch-gateway", "POST /wsgi_app.py", SpanKind::Server),
            step("vmwatch-gateway", "metrics.vm.latest", SpanKind::Client),
            step("vmwatch-metrics", "metrics.vm.latest", SpanKind::Server),
            step("vmwatch-metrics", "find blocks", SpanKind::Client),
        ]
    );
    assert_eq!(
        text(&leaf.span.attributes, "db.system.name").as_deref(),
        Some("mongodb")
    );
    let secrets = spans
        .iter()
        .filter(|received| format!("{received:?}").contains(&session))
        .count();
    assert_eq!(secrets, 0, "a span contains the session's token");
}

#[tokio::test]
async fn request_for_alerts_is_one_trace_to_the_database_of_alert_svc() {
    let (address, spans) = collector().await;
    let programs = [Program::Gateway, Program::Alert];
    let builder = Stack::builder().replicas(Program::Alert, 1);
    let stack = traced(builder, &programs, &format!("http://{address}"))
        .start()
        .await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    api.read("/alerts").await;
    let (spans, leaf, chain) = complete(&spans, "vmwatch-alert", "find alerts").await;
    assert_eq!(
        chain,
        [
            step("vmwatch-gateway", "GET /api/v1/alerts", SpanKind::Server),
            step("vmwatch-gateway", "alert.alerts.list", SpanKind::Client),
            step("vmwatch-alert", "alert.alerts.list", SpanKind::Server),
            step("vmwatch-alert", "find alerts", SpanKind::Client),
        ]
    );
    assert_eq!(
        text(&leaf.span.attributes, "db.system.name").as_deref(),
        Some("mongodb")
    );
    let token = api.token.unwrap();
    let secrets = spans
        .iter()
        .filter(|received| format!("{received:?}").contains(&token));
    assert_eq!(secrets.count(), 0, "a span contains the session's token");
}

#[tokio::test]
async fn batch_span_links_to_the_publish_span_of_the_agent() {
    let (address, spans) = collector().await;
    let endpoint = format!("http://{address}");
    let builder = Stack::builder().replicas(Program::Agent, 1);
    let programs = [Program::Agent, Program::Metrics];
    let _stack = traced(builder, &programs, &endpoint).start().await;

    let found = eventually(
        "a linked insert, batch and publish arrive",
        PATIENCE,
        async || {
            let spans = spans.lock().unwrap().clone();
            linked(&spans).ok_or_else(|| format!("{} spans received so far", spans.len()))
        },
    );
    let (insert, batch, publish) = found.await;
    assert_eq!(
        (insert.program.as_str(), insert.span.kind()),
        ("vmwatch-metrics", SpanKind::Client)
    );
    assert_eq!(
        (
            batch.program.as_str(),
            batch.span.name.as_str(),
            batch.span.kind()
        ),
        ("vmwatch-metrics", "process VMWATCH_SAMPLES", SpanKind::Consumer)
    );
    assert_eq!(
        (
            publish.program.as_str(),
            publish.span.name.as_str(),
            publish.span.kind()
        ),
        (
            "vmwatch-agent",
            "publish vmwatch.v1.samples.*",
            SpanKind::Producer
        )
    );
    // A batch stores messages of many traces, so its span is a root span with links to the publishing spans.
    assert!(batch.span.parent_span_id.is_empty());
    assert_ne!(batch.span.trace_id, publish.span.trace_id);
    assert_eq!(
        text(&publish.span.attributes, "messaging.destination.name"),
        Some(format!("vmwatch.v1.samples.{THIS_MACHINE}"))
    );
}

/// Returns the span of an insert, its parent, and the span that the parent links to.
fn linked(spans: &[Received]) -> Option<(Received, Received, Received)> {
    let by_id = |id: &[u8]| spans.iter().find(|received| received.span.span_id == id);
    spans
        .iter()
        .filter(|received| received.span.name == "insert blocks")
        .find_map(|insert| {
            let batch = by_id(&insert.span.parent_span_id)?;
            let link = batch.span.links.first()?;
            let publish = by_id(&link.span_id).filter(|found| found.span.trace_id == link.trace_id)?;
            Some((insert.clone(), batch.clone(), publish.clone()))
        })
}
