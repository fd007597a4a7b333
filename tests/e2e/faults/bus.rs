//! Tests requests while the NATS server is killed or frozen.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use testkit::{ADMIN, Gateway, MACHINES, PATIENCE, Program, Stack, codes, eventually, figure};
use vmwatch_api::lifecycle::MachineState;

use super::{AT_ONCE, answers, assert_unavailable, load::quantile, login_request, session, vm_request};
use crate::ingest_support::metric;

/// The outage is long enough that NATS clients reach their longest retry interval.
const OUTAGE: Duration = Duration::from_secs(5);
const UNKNOWN: &str = "00000000-0000-0000-0000-000000000000";

/// Sends one request of each kind while NATS is unreachable, and asserts that the gateway refuses each without waiting.
/// Returns the duration of each request.
async fn refused(gateway: &Gateway, session: &str) -> Vec<Duration> {
    let rows = gateway.post(&vm_request(session)).await;
    assert_unavailable(&rows, codes::VM, session);
    let unknown = gateway.post(&vm_request(UNKNOWN)).await;
    assert_unavailable(&unknown, codes::VM, UNKNOWN);
    let login = gateway.post(&login_request()).await;
    let what = (login.http, login.status(), login.retry_after.as_deref());
    assert_eq!(what, (503, 3, Some("1")), "{login:?}");
    let start = gateway.start_vm(session, MACHINES[0].0).await;
    assert_unavailable(&start, codes::START, session);
    [rows, unknown, login, start].map(|answer| answer.took).to_vec()
}

/// Asserts that lifecycle-svc received none of the refused start commands.
async fn nothing_was_started(stack: &Stack) {
    let machine = MACHINES[0].0;
    assert_eq!(stack.machine_state(machine).await, MachineState::ShutOff);
    // Reading the VM's state is the only request that lifecycle-svc may have received. Its metrics must show no start,
    // whether executed or refused.
    let metrics = stack.replica(Program::Lifecycle, 0).metrics().await;
    let starts = metrics
        .lines()
        .filter(|line| line.contains(r#"method="lifecycle.start""#));
    assert_eq!(starts.collect::<Vec<_>>(), Vec::<&str>::new());
}

async fn notices(gateway: &Gateway) {
    eventually(
        "the gateway detects the NATS outage",
        PATIENCE,
        async || match gateway.replica.readiness().await {
            Ok(()) => Err("the program still reports ready".to_owned()),
            Err(_) => Ok(()),
        },
    )
    .await;
}

#[tokio::test]
async fn gateway_refuses_at_once_while_nats_is_down_and_reconnects() {
    let stack = Stack::builder().without_login_limit().start().await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;

    stack.nats.server.kill9();
    notices(gateway).await;
    let (killed_at, mut took) = (Instant::now(), Vec::new());
    while killed_at.elapsed() < OUTAGE {
        took.extend(refused(gateway, &session).await);
    }
    let (median, p99) = (quantile(&took, 0.5), quantile(&took, 0.99));
    figure("faults_nats_killed_refusals", took.len() as f64);
    figure("faults_nats_killed_refusal_p50_ms", median);
    figure("faults_nats_killed_refusal_p99_ms", p99);
    // `refused` has asserted that even the slowest request was refused before its deadline. The slowest one depends on
    // the load of the machine, so only the median is compared with a tighter limit.
    assert!(median < 50.0, "the median refusal took {median} ms");

    let back = Cell::new(None);
    let returns = async {
        stack.nats.restart().await;
        back.set(Some(Instant::now()));
    };
    let first_success = async {
        answers(gateway, &session).await;
        Instant::now()
    };
    let ((), first) = tokio::join!(returns, first_success);
    let after = first.saturating_duration_since(back.get().unwrap());
    figure("faults_nats_killed_first_success_ms", after.as_secs_f64() * 1e3);
    assert!(after < Duration::from_secs(2) + AT_ONCE, "{after:?}");
    stack.ready().await;
    nothing_was_started(&stack).await;
    gateway.login(ADMIN.0, ADMIN.1).await;
}

/// A frozen NATS server keeps its connections open. Requests time out until the gateway notices that the server is
/// silent; later requests are refused at once.
#[tokio::test]
async fn gateway_detects_frozen_nats_within_three_pings() {
    let ping = Duration::from_secs(1);
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_NATS_PING_INTERVAL", "1s")
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "300ms")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;

    stack.nats.server.pause();
    let frozen = Instant::now();
    let mut late = 0;
    loop {
        let answer = gateway.post(&vm_request(&session)).await;
        if answer.http == 503 {
            break;
        }
        assert_eq!((answer.http, answer.status()), (200, 4), "{answer:?}");
        late += 1;
        assert!(
            frozen.elapsed() < PATIENCE,
            "the frozen server is not detected yet"
        );
    }
    let noticed = frozen.elapsed();
    figure(
        "faults_nats_frozen_noticed_in_pings",
        noticed.as_secs_f64() / ping.as_secs_f64(),
    );
    figure("faults_nats_frozen_timeouts_before", f64::from(late));
    assert!(
        late > 0,
        "requests fail at their deadline until the gateway detects the frozen server"
    );
    assert!(noticed < 3 * ping + AT_ONCE, "{noticed:?}");
    for _ in 0..10 {
        refused(gateway, &session).await;
    }

    stack.nats.server.resume();
    answers(gateway, &session).await;
    stack.ready().await;
    nothing_was_started(&stack).await;
    // Requests that timed out at the gateway were not executed later: metrics-svc refused them as late or never
    // received them.
    let metrics = stack.replica(Program::Metrics, 0);
    let seen = metric(metrics, "vmwatch_requests_late_total").await;
    assert!(
        seen <= f64::from(late),
        "metrics-svc refused {seen} late requests, but only {late} timed out"
    );
    gateway.login(ADMIN.0, ADMIN.1).await;
}

/// A gateway with a silent NATS connection does not learn which sessions have ended. It must refuse all sessions once
/// its copy of the sessions is stale.
#[tokio::test]
async fn gateway_refuses_sessions_while_their_kv_bucket_is_unreadable() {
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_NATS_PING_INTERVAL", "2m")
        .set(Program::Gateway, "VMWATCH_SESSIONS_STALE_AFTER", "3s")
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "300ms")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    stack.nats.server.pause();
    eventually("the session is refused", PATIENCE, async || {
        let answer = gateway.post(&vm_request(&session)).await;
        (answer.http == 503).then_some(()).ok_or(answer.body)
    })
    .await;
    assert!(!gateway.replica.process.log().contains("disconnected"));
    stack.nats.server.resume();
    answers(gateway, &session).await;
}
