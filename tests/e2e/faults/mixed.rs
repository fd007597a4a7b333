//! Tests that no program's memory grows under a mixed load.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::json;
use testkit::{MACHINES, Process, Program, Stack, THIS_MACHINE, codes, figure};

use super::{
    answers,
    load::{Client, Load},
    login_request, session, soak, start_request, vm_request,
};
use crate::ingest_support::resident;

const PROGRAMS: [Program; 6] = [
    Program::Gateway,
    Program::Auth,
    Program::Metrics,
    Program::Lifecycle,
    Program::Alert,
    Program::Agent,
];
/// Maximum growth of a program's memory in KiB after its warm-up, however long the test runs. This limit is larger than
/// the usual variation of the memory.
const MOST_KIB: f64 = 8.0 * 1024.0;
/// Maximum size of the gateway's log of live events in KiB. After the warm-up of a short test it is not yet full.
const LOG_KIB: f64 = 16.0 * 1024.0;

/// Returns how much a program's memory grew, in KiB, by linear regression over its measurements.
fn grown(samples: &[(f64, f64)]) -> f64 {
    let count = samples.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| samples.iter().map(of).sum::<f64>() / count;
    let (time, size) = (mean(|sample| sample.0), mean(|sample| sample.1));
    let both: f64 = samples
        .iter()
        .map(|sample| (sample.0 - time) * (sample.1 - size))
        .sum();
    let spread: f64 = samples.iter().map(|sample| (sample.0 - time).powi(2)).sum();
    both / spread * (samples[samples.len() - 1].0 - samples[0].0)
}

/// After a warm-up, the memory of every program stays flat under a mix of reads, commands, logins, refused requests and
/// an agent's samples.
#[tokio::test]
async fn memory_of_every_program_stays_flat_under_mixed_load() {
    let lasts = soak().unwrap_or(Duration::from_secs(20));
    let stack = Stack::builder()
        .without_login_limit()
        .replicas(Program::Alert, 1)
        .replicas(Program::Agent, 1)
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = session(&stack).await;
    answers(gateway, &session).await;
    let processes = json!({ "method": codes::PROCESSES, "session_id": session, "limit": 50,
        "data": { "instance_id": THIS_MACHINE } });
    let questions = [
        vm_request(&session),
        processes,
        start_request(&session, MACHINES[2].0),
        start_request(&session, "no-such-machine"),
        vm_request("00000000-0000-0000-0000-000000000000"),
        json!({ "method": "none" }),
        login_request(),
    ];
    let clients = questions.map(|question| (Client::of(&[gateway], 0), question));
    let each = |of: fn(&Process) -> u64| PROGRAMS.map(|program| of(&stack.replica(program, 0).process));

    let (seen, samples) = Load::default()
        .during(clients.into(), async |load| {
            let began = Instant::now();
            let mut samples = BTreeMap::<usize, Vec<(f64, f64)>>::new();
            while began.elapsed() < lasts {
                load.goes_on(20).await;
                let at = began.elapsed();
                let warm = at > lasts / 3;
                for (index, size) in each(resident).into_iter().enumerate().filter(|_| warm) {
                    samples
                        .entry(index)
                        .or_default()
                        .push((at.as_secs_f64(), size as f64));
                }
            }
            samples
        })
        .await;
    let expected = [
        (200, 1),
        (200, 1),
        (200, 1),
        (200, 3),
        (200, 3),
        (200, 3),
        (200, 1),
    ];
    let odd: Vec<_> = seen
        .iter()
        .filter(|seen| (seen.http, seen.status) != expected[seen.client])
        .collect();
    assert!(
        odd.is_empty(),
        "{} unexpected answers: {:?}",
        odd.len(),
        &odd[..odd.len().min(3)]
    );
    figure("faults_mixed_minutes", lasts.as_secs_f64() / 60.0);
    figure("faults_mixed_requests", seen.len() as f64);
    for (index, program) in PROGRAMS.into_iter().enumerate() {
        let name = format!("{program:?}").to_lowercase();
        let (samples, grown) = (&samples[&index], grown(&samples[&index]));
        figure(
            &format!("faults_mixed_{name}_resident_kib"),
            samples[samples.len() - 1].1,
        );
        figure(&format!("faults_mixed_{name}_grown_kib"), grown.round());
        let most = match program {
            Program::Gateway => MOST_KIB + LOG_KIB,
            _ => MOST_KIB,
        };
        assert!(grown < most, "the memory of {name} grew by {grown} KiB");
    }
}
