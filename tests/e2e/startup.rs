//! Tests the start and the end of programs: readiness and telemetry.

use testkit::{NatsProxy, PATIENCE, Program, Stack};
use tracing::info_span;
use vmwatch_api::{Method, alerts::AlertsList, auth::Login, lifecycle::State, metrics::VmLatest};
use vmwatch_bus::{NATS_PING_INTERVAL, NATS_URL};
use vmwatch_service::{
    config::{Environment, OTLP_ENDPOINT},
    program,
    telemetry::TelemetrySettings,
};

use crate::traces::collector;

/// A connected service whose subscriptions have not reached NATS gets no requests, so it must not report ready.
#[tokio::test]
async fn service_is_ready_only_once_nats_knows_its_subscriptions() {
    let stack = Stack::builder().replicas(Program::Alert, 1).start().await;
    let client = stack.bus.client_for_tests();
    for (program, method) in [
        (Program::Auth, Login::INFO),
        (Program::Metrics, VmLatest::INFO),
        (Program::Lifecycle, State::INFO),
        (Program::Alert, AlertsList::INFO),
    ] {
        let proxy = NatsProxy::start(stack.nats.url(), "SUB vmwatch.v1.").await;
        let replica = stack.replica(program, 0);
        replica.process.terminate(PATIENCE).await;
        replica.process.set(NATS_URL.name, proxy.url());
        // The proxy also holds back pings. The long interval prevents the program from treating the missing pings as a
        // lost connection.
        replica.process.set(NATS_PING_INTERVAL.name, "2m");
        replica.process.start_again();
        proxy.held().await;
        let readiness = replica.readiness().await;
        let reason = readiness.expect_err(&format!("{program:?} is ready without subscriptions"));
        assert!(reason.contains("waiting for"), "{program:?}: {reason}");

        proxy.release();
        replica.ready().await;
        let answer = client.request(method.full_subject(), "".into()).await;
        answer.unwrap_or_else(|error| panic!("{program:?} is ready but does not answer: {error}"));
    }
}

/// A program that fails exports its buffered spans before it ends. Spans are otherwise exported in batches every 5 s.
#[tokio::test(flavor = "multi_thread")]
async fn failing_program_exports_its_buffered_spans() {
    let (address, spans) = collector().await;
    let endpoint = format!("http://{address}");
    let env = Environment::from_variables([(OTLP_ENDPOINT.name, endpoint.as_str())]);
    let settings = TelemetrySettings::read(&env).unwrap();
    let outcome = program::run("vmwatch-test", &settings, async |_| {
        info_span!("last work").in_scope(|| ());
        Err(std::fmt::Error)
    })
    .await;
    assert!(
        matches!(outcome, Err(program::ProgramError::Failed(_))),
        "{outcome:?}"
    );
    let received = spans.lock().unwrap();
    let names: Vec<_> = received
        .iter()
        .map(|received| received.span.name.as_str())
        .collect();
    assert_eq!(names, ["last work"]);
}
