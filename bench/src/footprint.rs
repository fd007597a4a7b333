//! Measures the memory and the start-up time of the programs.

use std::time::{Duration, Instant};

use anyhow::ensure;
use futures::{StreamExt, TryStreamExt, stream};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    UserKey,
    auth::Token,
    sessions::{SESSION_BUCKET, SessionRecord},
    time::unix_millis,
};

use crate::{
    report::{Bound, Report, number},
    statistics::Series,
    usage,
};

const SESSIONS: u32 = 100_000;
/// Number of concurrent writes to the KV bucket of sessions.
const PUTS: usize = 256;
/// Number of starts of each program.
const STARTS: u32 = 7;
/// Interval at which the readiness of a starting program is polled.
const POLL: Duration = Duration::from_millis(1);

/// Reports the memory of the programs after they have served reads.
pub(crate) fn after_reads(report: &mut Report, stack: &Stack) -> anyhow::Result<()> {
    report.section("Memory");
    report
        .paragraph("The table of results lists the peak resident memory of each program after these reads.");
    for (program, name) in [
        (Program::Gateway, "gateway"),
        (Program::Metrics, "metrics-svc"),
        (Program::Lifecycle, "lifecycle-svc"),
    ] {
        let resident = usage::peak_resident_mb(stack.replica(program, 0).process.id())?;
        let text = format!("peak resident memory of {name} under read load, MB");
        let figure = format!("{}_resident_peak_mb", name.replace('-', "_"));
        report.target(&figure, &text, resident, 1, Bound::AtMost(20.0));
    }
    Ok(())
}

/// Measures how soon each program is ready, and the memory of a gateway with many sessions.
pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    let stack = crate::gateway::stack().replicas(Program::Agent, 1).start().await;
    starts(report, &stack).await?;
    sessions(report, &stack).await
}

async fn sessions(report: &mut Report, stack: &Stack) -> anyhow::Result<()> {
    println!("storing {} sessions", number(f64::from(SESSIONS), 0));
    let bucket = stack
        .bus
        .jetstream_for_tests()
        .get_key_value(SESSION_BUCKET)
        .await?;
    let now = unix_millis();
    stream::iter(0..SESSIONS)
        .map(|session| {
            let record = SessionRecord {
                user: UserKey::from_name(&format!("user-{}", session % 1000)),
                began_at_ms: now,
                expires_at_ms: now + 3_600_000,
                last_used_at_ms: now,
                idle_ends_at_ms: now + 3_600_000,
                source: Some("192.0.2.1".to_owned()),
            };
            let token = Token::from_random(u128::from(session).to_be_bytes());
            let bucket = &bucket;
            async move {
                let record = serde_json::to_vec(&record)?;
                bucket.put(token.key(), record.into()).await?;
                anyhow::Ok(())
            }
        })
        .buffer_unordered(PUTS)
        .try_for_each(async |()| Ok(()))
        .await?;
    let gateway = stack.replica(Program::Gateway, 0);
    eventually("the gateway has loaded all sessions", PATIENCE, async || {
        let metrics = gateway.metrics().await;
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("vmwatch_sessions "));
        let count: f64 = line.and_then(|count| count.parse().ok()).unwrap_or_default();
        if count >= f64::from(SESSIONS) {
            return Ok(());
        }
        Err(format!("the gateway has loaded {count} sessions"))
    })
    .await;
    let resident = usage::resident_mb(gateway.process.id())?;
    let text = "resident memory of the gateway with 100,000 sessions, MB";
    report.target(
        "gateway_100000_sessions_resident_mb",
        text,
        resident,
        1,
        Bound::AtMost(60.0),
    );
    Ok(())
}

async fn starts(report: &mut Report, stack: &Stack) -> anyhow::Result<()> {
    report.section("Start-up time");
    report.paragraph(
        "Time from the start of the process until `/readyz` succeeds. NATS and the database run already.",
    );
    let mut rows = vec![["ms", "median", "min", "max"].map(str::to_owned)];
    for (program, name) in [
        (Program::Gateway, "gateway"),
        (Program::Auth, "auth-svc"),
        (Program::Metrics, "metrics-svc"),
        (Program::Lifecycle, "lifecycle-svc"),
        (Program::Agent, "agent"),
    ] {
        let replica = stack.replica(program, 0);
        let mut took = Series::default();
        for _ in 0..STARTS {
            replica.process.terminate(PATIENCE).await;
            let started = Instant::now();
            replica.process.start_again();
            while let Err(reason) = replica.readiness().await {
                ensure!(
                    started.elapsed() < PATIENCE,
                    "{name} did not become ready: {reason}"
                );
                tokio::time::sleep(POLL).await;
            }
            took.push(started.elapsed().as_secs_f64() * 1e3);
        }
        let figure = format!("{}_cold_start_ms", name.replace('-', "_"));
        let text = format!("time from start to readiness of {name}, ms");
        report.target(&figure, &text, took.median(), 0, Bound::AtMost(100.0));
        rows.push([
            name.to_owned(),
            number(took.median(), 0),
            number(took.min(), 0),
            number(took.max(), 0),
        ]);
    }
    report.table(&rows);
    Ok(())
}
