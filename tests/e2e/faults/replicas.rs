//! Tests requests while replicas of a service are killed or frozen.

use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;
use testkit::{ADMIN, MACHINES, PATIENCE, Program, Stack, codes, eventually, failure, figure};
use vmwatch_api::lifecycle::MachineState;

use super::{
    AT_ONCE, answers, assert_unavailable,
    load::{Client, Load},
    session, start_request, vm_request,
};
use crate::ingest_support::{metric, outage};

const DEADLINE: Duration = Duration::from_secs(1);
/// This deadline is far above the duration of a request on a busy machine.
const KILL_DEADLINE: Duration = Duration::from_secs(4);
const CLIENTS: usize = 8;
const LATE: &str = "'the deadline passed before the service answered'";

/// Only requests in flight on a killed replica time out; all others succeed. After the last replica of the service is
/// killed, requests fail at once.
#[tokio::test]
async fn killed_replica_fails_only_requests_in_flight() {
    let stack = Stack::builder()
        .replicas(Program::Metrics, 2)
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "4s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    let clients = (0..CLIENTS).map(|_| (Client::of(&[gateway], 0), vm_request(&session)));
    let (seen, (killed, gone)) = Load::default()
        .during(clients.collect(), async |load| {
            load.goes_on(200).await;
            let killed = Instant::now();
            stack.replica(Program::Metrics, 0).process.kill9();
            let gone = Instant::now();
            load.goes_on(500).await;
            // Wait long enough for a request in flight on the killed replica to time out.
            eventually("requests to the killed replica time out", PATIENCE, async || {
                (gone.elapsed() > KILL_DEADLINE + AT_ONCE)
                    .then_some(())
                    .ok_or_else(String::new)
            })
            .await;
            (killed, gone)
        })
        .await;
    let failed: Vec<_> = seen.iter().filter(|seen| !seen.is_good()).collect();
    figure("faults_kill9_requests", seen.len() as f64);
    figure("faults_kill9_failed_requests", failed.len() as f64);
    // Each client has one request in flight, and about half of these requests are at the killed replica.
    assert!(failed.len() <= CLIENTS, "{failed:?}");
    for seen in failed {
        assert_eq!((seen.http, seen.status), (200, 4), "{seen:?}");
        // NATS soon detects the end of the connection and sends the killed replica no further requests.
        assert!(
            seen.sent < gone + AT_ONCE && seen.sent + seen.took > killed,
            "{seen:?}"
        );
    }

    stack.replica(Program::Metrics, 1).process.kill9();
    eventually("NATS detects the killed replica", PATIENCE, async || {
        let answer = gateway.post(&vm_request(&session)).await;
        if answer.http == 503 {
            Ok(())
        } else {
            Err(answer.body)
        }
    })
    .await;
    for method in [codes::VM, codes::PROCESSES, codes::PROCESSES_BY_NAME] {
        let answer = gateway
            .post(&json!({ "method": method, "session_id": session, "data": { "instance_id": "vm-1" } }))
            .await;
        assert_unavailable(&answer, method, &session);
        assert_eq!(
            answer.message(),
            "'no vmwatch-metrics answers at the moment; try again shortly'"
        );
    }
    gateway.login(ADMIN.0, ADMIN.1).await;
    assert_eq!(
        gateway.start_vm(&session, MACHINES[0].0).await.status(),
        1,
        "requests to other services still succeed"
    );
    stack.replica(Program::Metrics, 0).restart().await;
    answers(gateway, &session).await;
}

/// NATS sends half of the requests to a frozen replica, where they time out. The other replica answers the rest.
#[tokio::test]
async fn requests_to_a_frozen_replica_time_out_while_the_other_answers() {
    let stack = Stack::builder()
        .replicas(Program::Metrics, 2)
        .replicas(Program::Lifecycle, 2)
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "1s")
        .set(Program::Gateway, "VMWATCH_COMMAND_DEADLINE", "1s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    let frozen = [Program::Metrics, Program::Lifecycle].map(|program| stack.replica(program, 0));
    for replica in frozen {
        replica.process.pause();
    }

    let start = start_request(&session, MACHINES[2].0);
    let questions = [vec![vm_request(&session); 4], vec![start; 4]].concat();
    let clients = questions
        .into_iter()
        .map(|question| (Client::of(&[gateway], 0), question));
    let (seen, ()) = Load::default()
        .during(clients.collect(), async |_| {
            let end = Instant::now() + outage();
            eventually(
                "the outage has lasted long enough",
                PATIENCE + outage(),
                async || (Instant::now() > end).then_some(()).ok_or_else(String::new),
            )
            .await;
        })
        .await;
    let late: Vec<_> = seen.iter().filter(|seen| !seen.is_good()).collect();
    for seen in &late {
        assert_eq!((seen.http, seen.status), (200, 4), "{seen:?}");
        // Deadlines are sent as whole milliseconds, rounded down, so a request can time out up to a millisecond early.
        let early = Duration::from_millis(1);
        assert!(
            seen.took + early >= DEADLINE && seen.took < DEADLINE + AT_ONCE,
            "{seen:?}"
        );
    }
    figure("faults_frozen_replica_requests", seen.len() as f64);
    figure("faults_frozen_replica_timeouts", late.len() as f64);
    assert!(
        !late.is_empty() && late.len() < seen.len(),
        "{} of {} requests timed out",
        late.len(),
        seen.len()
    );

    for replica in frozen {
        replica.process.resume();
    }
    for (replica, clients) in [(frozen[0], 0..4), (frozen[1], 4..8)] {
        let sent = late.iter().filter(|seen| clients.contains(&seen.client)).count();
        eventually(
            "the resumed replica refuses every late request",
            PATIENCE,
            async || {
                let refused = metric(replica, "vmwatch_requests_late_total").await;
                let metrics = replica.metrics().await;
                let outcomes: Vec<_> = metrics
                    .lines()
                    .filter(|line| line.starts_with("vmwatch_requests_"))
                    .collect();
                (refused == sent as f64)
                    .then_some(())
                    .ok_or(format!("it refused {refused} of {sent} requests: {outcomes:#?}"))
            },
        )
        .await;
    }
}

/// A service whose only replica was frozen executes none of the commands that arrived while it was frozen.
#[tokio::test]
async fn frozen_service_never_executes_late_commands() {
    const ROUNDS: usize = 2;
    const PER_ROUND: usize = 3;
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_COMMAND_DEADLINE", "500ms")
        .set(Program::Lifecycle, "VMWATCH_MAX_COMMANDS", "4")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    let lifecycle = stack.replica(Program::Lifecycle, 0);
    lifecycle.process.pause();
    let machine = MACHINES[0].0;
    // All rounds together send more commands than one user may have in progress, but late commands do not count toward
    // that limit.
    for _ in 0..ROUNDS {
        for answer in join_all((0..PER_ROUND).map(|_| gateway.start_vm(&session, machine))).await {
            let late = failure(4, &json!(codes::START), &session, LATE);
            assert_eq!((answer.http, &answer.body), (200, &late));
        }
    }
    lifecycle.process.resume();
    eventually(
        "the resumed replica refuses the late commands",
        PATIENCE,
        async || {
            let refused = metric(lifecycle, "vmwatch_requests_late_total").await;
            (refused == (ROUNDS * PER_ROUND) as f64)
                .then_some(())
                .ok_or(refused.to_string())
        },
    )
    .await;
    assert_eq!(metric(lifecycle, "vmwatch_requests_shed_total").await, 0.0);
    assert_eq!(stack.machine_state(machine).await, MachineState::ShutOff);
    assert_eq!(gateway.start_vm(&session, machine).await.status(), 1);
    assert_eq!(stack.machine_state(machine).await, MachineState::Running);
}
