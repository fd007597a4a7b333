//! Parts that die, freeze and leave: what a client sees of it, and that all is well again by itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use e2e::{ADMIN, Answer, Gateway, MACHINES, PATIENCE, Program, Stack, codes, eventually, failure};
use futures::{StreamExt, future::join_all};
use serde_json::{Value, json};
use shared::api::{Method, Role, Scope, lifecycle::MachineState, metrics::VmLatest};

use crate::rows::{store_vms, vm_row};

/// Well before any deadline of the gateway.
const AT_ONCE: Duration = Duration::from_secs(1);

fn vm_request(session: &str) -> Value {
    json!({ "method": codes::VM, "session_id": session, "data": { "instance_id": "vm-1" } })
}

async fn session(stack: &Stack) -> String {
    store_vms(stack, [vm_row("vm-1", "2017-01-01T21:37:59.001065", 1)]).await;
    stack.session(Role::Operator, Scope::All).await
}

async fn answers(gateway: &Gateway, session: &str) {
    eventually("rows are answered", PATIENCE, async || {
        let answer = gateway.post(&vm_request(session)).await;
        if answer.status() == 1 {
            Ok(())
        } else {
            Err(answer.body)
        }
    })
    .await;
}

/// 503 with `Retry-After` and the envelope of the method, and no wait.
fn assert_unavailable(answer: &Answer, method: u32, session: &str) {
    assert_eq!(answer.http, 503, "{answer:?}");
    assert_eq!(answer.retry_after.as_deref(), Some("1"));
    assert_eq!(
        answer.body,
        failure(3, &json!(method), session, &answer.message())
    );
    assert!(answer.message().contains("try again shortly"), "{answer:?}");
    assert!(answer.took < AT_ONCE, "{answer:?}");
}

#[tokio::test]
async fn a_killed_replica_is_replaced_by_the_others_and_none_is_told_at_once() {
    let stack = Stack::builder().replicas(Program::Metrics, 2).start().await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;

    stack.replica(Program::Metrics, 0).process.kill9();
    answers(gateway, &session).await;
    for answer in join_all((0..50).map(|_| async { gateway.post(&vm_request(&session)).await })).await {
        assert_eq!((answer.http, answer.status()), (200, 1), "{answer:?}");
    }

    stack.replica(Program::Metrics, 1).process.kill9();
    eventually("NATS notices", PATIENCE, async || {
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
        "other services go on"
    );

    stack.replica(Program::Metrics, 0).restart().await;
    answers(gateway, &session).await;
}

#[tokio::test]
async fn a_bus_that_is_away_is_told_at_once_and_comes_back_by_itself() {
    let stack = Stack::builder().start().await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;

    for outage in ["killed", "frozen"] {
        match outage {
            "killed" => stack.nats.process.kill9(),
            _ => stack.nats.process.pause(),
        }
        eventually("the gateway notices", PATIENCE, async || {
            match gateway.replica.readiness().await {
                Ok(()) => Err("it still calls itself ready".to_owned()),
                Err(_) => Ok(()),
            }
        })
        .await;
        let answer = gateway.post(&vm_request(&session)).await;
        assert_unavailable(&answer, codes::VM, &session);
        let unknown = "00000000-0000-0000-0000-000000000000";
        let answer = gateway.post(&vm_request(unknown)).await;
        assert_unavailable(&answer, codes::VM, unknown);
        let login = json!({ "method": codes::LOGIN, "data": { "user_name": ADMIN.0, "password": ADMIN.1 } });
        let answer = gateway.post(&login).await;
        assert_eq!(
            (answer.http, answer.status(), answer.retry_after.as_deref()),
            (503, 3, Some("1"))
        );
        assert!(answer.took < AT_ONCE, "{answer:?}");
        let answer = gateway.start_vm(&session, MACHINES[0].0).await;
        assert_unavailable(&answer, codes::START, &session);

        match outage {
            "killed" => stack.nats.restart().await,
            _ => stack.nats.process.resume(),
        }
        stack.ready().await;
        answers(gateway, &session).await;
        assert_eq!(
            stack.machine_state(MACHINES[0].0).await,
            MachineState::ShutOff,
            "what was refused is not executed later"
        );
    }
    gateway.login(ADMIN.0, ADMIN.1).await;
}

/// Status 4 within the deadline; and what is past its deadline is never executed, however late it arrives.
#[tokio::test]
async fn a_frozen_service_is_a_timeout_and_never_acts_late() {
    let deadline = Duration::from_millis(500);
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "500ms")
        .set(Program::Gateway, "VMWATCH_COMMAND_DEADLINE", "500ms")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    let (metrics, lifecycle) = (
        stack.replica(Program::Metrics, 0),
        stack.replica(Program::Lifecycle, 0),
    );
    metrics.process.pause();
    lifecycle.process.pause();

    let machine = MACHINES[0].0;
    let request = vm_request(&session);
    let starts = (0..3).map(|_| gateway.start_vm(&session, machine));
    let (rows, started) = tokio::join!(gateway.post(&request), join_all(starts));
    for (answer, method) in started
        .iter()
        .map(|answer| (answer, codes::START))
        .chain([(&rows, codes::VM)])
    {
        let late = "'the deadline passed before the service answered'";
        assert_eq!(
            (answer.http, &answer.body),
            (200, &failure(4, &json!(method), &session, late))
        );
        assert!(
            answer.took >= deadline && answer.took < deadline + AT_ONCE,
            "{answer:?}"
        );
    }

    metrics.process.resume();
    lifecycle.process.resume();
    answers(gateway, &session).await;
    eventually("the late commands are refused", PATIENCE, async || {
        let metrics = lifecycle.metrics().await;
        if metrics.contains(r#"vmwatch_requests_late_total{method="startmonitor"} 3"#) {
            Ok(())
        } else {
            Err(metrics)
        }
    })
    .await;
    assert_eq!(stack.machine_state(machine).await, MachineState::ShutOff);
    assert_eq!(gateway.start_vm(&session, machine).await.status(), 1);
    assert_eq!(stack.machine_state(machine).await, MachineState::Running);
}

/// A database that is away is a failure in the envelope, soon, and comes back by itself.
#[tokio::test]
async fn a_database_that_is_away_is_told_and_comes_back_by_itself() {
    // Far above what the services give the database.
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "20s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;

    stack.database.process.kill9();
    let login = json!({ "method": codes::LOGIN, "data": { "user_name": ADMIN.0, "password": ADMIN.1 } });
    let request = vm_request(&session);
    let (rows, login) = tokio::join!(gateway.post(&request), gateway.post(&login));
    for answer in [&rows, &login] {
        assert_eq!((answer.http, answer.status()), (200, 3), "{answer:?}");
        assert!(
            !answer.body.contains("27017") && !answer.body.contains("mongodb"),
            "no cause: {answer:?}"
        );
        assert!(answer.took < Duration::from_secs(10), "{answer:?}");
    }
    assert_eq!(
        rows.body,
        failure(3, &json!(codes::VM), &session, &rows.message())
    );
    assert_eq!(
        gateway.start_vm(&session, MACHINES[0].0).await.status(),
        1,
        "starting a VM needs no database"
    );

    stack.database.restart().await;
    answers(gateway, &session).await;
    gateway.login(ADMIN.0, ADMIN.1).await;
}

/// Replicas that are asked to end and start again, one after the other and under load, lose no request.
#[tokio::test]
async fn a_rolling_restart_loses_no_request() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 2)
        .replicas(Program::Metrics, 2)
        .start()
        .await;
    let session = session(&stack).await;
    for index in [0, 1] {
        answers(stack.gateway(index), &session).await;
    }
    let (over, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let callers = (0..8).map(|worker| {
        let (gateway, request) = (stack.gateway(worker % 2), vm_request(&session));
        let (over, asked) = (Arc::clone(&over), Arc::clone(&asked));
        async move {
            while !over.load(Ordering::Relaxed) {
                let answer = gateway.post(&request).await;
                assert_eq!((answer.http, answer.status()), (200, 1), "{answer:?}");
                asked.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let restarts = async {
        for round in 0..4 {
            let replica = stack.replica(Program::Metrics, round % 2);
            let status = replica.process.terminate(PATIENCE).await;
            assert!(status.success(), "{} ended with {status}", replica.process.name());
            replica.restart().await;
            let before = asked.load(Ordering::Relaxed);
            eventually("load goes on", PATIENCE, async || {
                let done = asked.load(Ordering::Relaxed) - before;
                if done > 100 {
                    Ok(())
                } else {
                    Err(format!("{done} requests"))
                }
            })
            .await;
        }
        over.store(true, Ordering::Relaxed);
    };
    tokio::join!(restarts, join_all(callers));
}

/// A gateway that is asked to end still answers what it has taken on.
#[tokio::test]
async fn a_gateway_finishes_what_it_has_begun() {
    let stack = Stack::builder().start().await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    // Whoever listens beside the service sees when the request is on its way.
    let mut watched = stack
        .bus
        .client()
        .subscribe(VmLatest::INFO.full_subject())
        .await
        .unwrap();
    stack.bus.flush(PATIENCE).await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.pause();
    let request = vm_request(&session);
    let ending = async {
        watched.next().await.unwrap();
        let end = gateway.replica.process.terminate(PATIENCE);
        let resume = async {
            eventually("the gateway stops", PATIENCE, async || {
                match gateway.replica.readiness().await {
                    Ok(()) => Err("it still calls itself ready".to_owned()),
                    Err(_) => Ok(()),
                }
            })
            .await;
            metrics.process.resume();
        };
        tokio::join!(end, resume).0
    };
    let (answer, status) = tokio::join!(gateway.post(&request), ending);
    assert_eq!((answer.http, answer.status()), (200, 1), "{answer:?}");
    assert!(status.success(), "{status}");
}
