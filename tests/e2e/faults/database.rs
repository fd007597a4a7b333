//! Tests requests while the database is killed or frozen.

use std::time::{Duration, Instant};

use testkit::{ADMIN, MACHINES, PATIENCE, Program, Stack, eventually, figure};

use super::{
    AT_ONCE, answers,
    load::{Client, Load, Seen},
    login_request, session, start_request, vm_request,
};
use crate::ingest_support::{outage, resident};

const DEADLINE: Duration = Duration::from_secs(1);
/// Maximum growth of a service's memory in KiB during the outage. It allows for 512 requests in flight with their
/// buffers.
const MOST_KIB: u64 = 32 << 10;

/// Requests that need the database fail by their deadline. Existing sessions and lifecycle-svc are not affected, no
/// service's memory grows above the limit, and everything recovers without a restart.
#[tokio::test]
async fn unreachable_database_fails_only_requests_that_need_it() {
    let stack = Stack::builder()
        .without_login_limit()
        .set(Program::Gateway, "VMWATCH_QUERY_DEADLINE", "1s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    let services =
        [Program::Gateway, Program::Auth, Program::Metrics].map(|program| stack.replica(program, 0));

    for fault in ["killed", "frozen"] {
        let start = start_request(&session, MACHINES[2].0);
        let questions = [vec![vm_request(&session); 8], vec![login_request(), start]].concat();
        let clients = questions
            .iter()
            .map(|question| (Client::of(&[gateway], 0), question.clone()));
        let story = async |load: &Load| {
            load.goes_on(100).await;
            let began = Instant::now();
            match fault {
                "killed" => stack.database.server.kill9(),
                _ => stack.database.server.pause(),
            }
            let before = services.map(|service| resident(&service.process));
            let mut most = before;
            while began.elapsed() < outage() {
                load.goes_on(1).await;
                for (most, service) in most.iter_mut().zip(services) {
                    *most = resident(&service.process).max(*most);
                }
            }
            for (service, (before, most)) in services.iter().zip(before.into_iter().zip(most)) {
                let name = service.process.name();
                assert!(
                    most < before + MOST_KIB,
                    "{name}: {before} KiB grew to {most} KiB"
                );
            }
            let ended = Instant::now();
            match fault {
                "killed" => stack.database.restart().await,
                _ => stack.database.server.resume(),
            }
            answers(gateway, &session).await;
            (began, ended)
        };
        let (seen, (began, ended)) = Load::default().during(clients.collect(), story).await;

        let during_outage = |seen: &&Seen| seen.sent > began && seen.sent + seen.took < ended;
        let mut slowest = Duration::ZERO;
        for seen in seen.iter().filter(during_outage) {
            if seen.client == questions.len() - 1 {
                assert!(seen.is_good(), "starting a VM needs no database: {seen:?}");
                continue;
            }
            slowest = slowest.max(seen.took);
            assert!(seen.took < DEADLINE + AT_ONCE, "{seen:?}");
            if !seen.is_good() {
                assert_eq!(seen.http, 200, "{seen:?}");
                assert!(seen.status == 3 || seen.status == 4, "{seen:?}");
                assert!(
                    !seen.said.contains("27017") && !seen.said.contains("mongodb"),
                    "the error must not reveal its cause: {seen:?}"
                );
                assert!(
                    !seen.said.contains("session'"),
                    "the session is still valid: {seen:?}"
                );
            }
        }
        let of = |client: usize| {
            seen.iter()
                .filter(during_outage)
                .filter(move |seen| seen.client == client)
        };
        let logins = of(questions.len() - 2).filter(|seen| !seen.is_good()).count();
        let starts = of(questions.len() - 1).count();
        figure(
            &format!("faults_database_{fault}_slowest_answer_ms"),
            slowest.as_secs_f64() * 1e3,
        );
        figure(&format!("faults_database_{fault}_failed_logins"), logins as f64);
        figure(&format!("faults_database_{fault}_starts"), starts as f64);
        assert!(
            logins > 0 && starts > 0,
            "{logins} logins failed and {starts} starts were answered; both must be above 0"
        );
        eventually("a login succeeds", PATIENCE, async || {
            let answer = gateway.post(&login_request()).await;
            if answer.status() == 1 {
                Ok(())
            } else {
                Err(answer.body)
            }
        })
        .await;
        gateway.login(ADMIN.0, ADMIN.1).await;
    }
}
