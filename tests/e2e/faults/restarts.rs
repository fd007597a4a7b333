//! Tests rolling restarts: under load, replicas stop on SIGTERM and start again one after the other.

use futures::StreamExt;
use testkit::{MACHINES, PATIENCE, Program, Stack, eventually, figure};
use tokio::time::timeout;
use vmwatch_api::{Method, metrics::VmLatest};

use super::{
    answers,
    http::{get, post},
    load::{Client, Load},
    login_request, session, size, start_request, vm_request,
};

/// No request of any kind fails while the replicas of any service restart one after the other, nor while two gateways
/// do so, if their clients honour `Connection: close`.
#[tokio::test]
async fn rolling_restarts_of_every_service_lose_no_request() {
    let restarts = size(2, 30);
    let requests = size(2_000, 100_000);
    let services = [
        Program::Metrics,
        Program::Lifecycle,
        Program::Auth,
        Program::Alert,
        Program::Gateway,
    ];
    let stack = services
        .iter()
        .fold(Stack::builder().without_login_limit(), |builder, &program| {
            builder.replicas(program, 2)
        })
        // The long deadline prevents timeouts on a busy machine.
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "30s")
        .start()
        .await;
    let session = session(&stack).await;
    let gateways = [stack.gateway(0), stack.gateway(1)];
    for gateway in gateways {
        answers(gateway, &session).await;
    }
    let running = start_request(&session, MACHINES[2].0);
    let questions = [vec![vm_request(&session); 6], vec![running, login_request()]].concat();
    let clients = questions.into_iter().enumerate();
    let clients = clients.map(|(index, question)| {
        let request = post(&question.to_string());
        (Client::of(&gateways, index), request)
    });
    let of_alerts = (0..2).map(|index| (Client::of_rest(&gateways, index), get("/alerts", &session)));

    let (seen, ()) = Load::default()
        .during_requests(clients.chain(of_alerts).collect(), async |load| {
            for program in services {
                for round in 0..restarts {
                    let replica = stack.replica(program, round % 2);
                    let status = replica.process.terminate(PATIENCE).await;
                    assert!(status.success(), "{} ended with {status}", replica.process.name());
                    replica.restart().await;
                    load.goes_on(50).await;
                }
            }
            while load.answered() < requests {
                load.goes_on(100).await;
            }
        })
        .await;
    let failed: Vec<_> = seen.iter().filter(|seen| !seen.is_good()).collect();
    figure("faults_restarts", (restarts * services.len()) as f64);
    figure("faults_restarts_requests", seen.len() as f64);
    figure("faults_restarts_failed_requests", failed.len() as f64);
    assert!(
        failed.is_empty(),
        "{} requests failed: {:?}",
        failed.len(),
        &failed[..failed.len().min(3)]
    );
}
/// A stopping gateway answers the requests that it has accepted.
#[tokio::test]
async fn stopping_gateway_completes_running_requests() {
    let stack = Stack::builder().start().await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    // This additional subscriber shows the test that the request is in transit.
    let mut watched = stack
        .bus
        .client_for_tests()
        .subscribe(VmLatest::INFO.full_subject())
        .await
        .unwrap();
    stack.bus.settled().await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.pause();
    let request = vm_request(&session);
    let ending = async {
        timeout(PATIENCE, watched.next()).await.unwrap().unwrap();
        let end = gateway.replica.process.terminate(PATIENCE);
        let resume = async {
            eventually("the gateway stops", PATIENCE, async || {
                match gateway.replica.readiness().await {
                    Ok(()) => Err("the gateway still reports ready".to_owned()),
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
