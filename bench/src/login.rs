//! Compares logins with password hashing alone, and measures reads while logins use a CPU core.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use argon2::{Argon2, PasswordHasher, PasswordVerifier, password_hash::phc::PasswordHash};
use clap::Args;
use futures::future::try_join_all;
use serde_json::json;
use testkit::{ADMIN, Program, Stack, codes};
use vmwatch_api::{Role, Scope};

use crate::{
    gateway::{self, address},
    load::{self, Load, Outcome},
    report::{Bound, Report, number},
    sides::ratios,
    statistics::Series,
    usage,
};

/// Command-line options of `bench login`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of measured pairs of rounds
    #[arg(long, default_value_t = 5)]
    pairs: u32,
    /// Duration of a round in seconds
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

/// The default of `VMWATCH_LOGIN_PERMITS`.
const PERMITS: usize = 2;
/// Number of connections that log in: for each login that is being hashed, another one waits.
const CALLERS: usize = 2 * PERMITS;
/// Reads per second during logins: 20 % of what the development database can answer on two cores.
const RATE: f64 = 250.0;
const READERS: usize = 32;
const VMS: u32 = 200;
/// Memory target of auth-svc in MB: a base, and an addition for each login permit.
const RESIDENT: (f64, f64) = (20.0, 19.0 * 1.048_576);

pub(crate) async fn run(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let stack = gateway::stack().without_login_limit().start().await;
    report.describe(&stack)?;
    let time = Duration::from_secs(options.seconds);
    let body = json!({
        "method": codes::LOGIN, "data": { "user_name": ADMIN.0, "password": ADMIN.1 },
    });
    let login = Load::success(
        address(&stack)?,
        &Arc::new(vec![load::post(::gateway::legacy::PATH, &body.to_string())]),
    );
    logins(report, &login, options.pairs, time).await?;
    let auth = stack.replica(Program::Auth, 0).process.id();
    #[expect(clippy::cast_precision_loss, reason = "two")]
    let most = RESIDENT.0 + RESIDENT.1 * PERMITS as f64;
    let text = "peak resident memory of auth-svc under logins, MB";
    let resident = usage::peak_resident_mb(auth)?;
    report.target("auth_resident_peak_mb", text, resident, 1, Bound::AtMost(most));
    reads(report, &stack, &login, options.pairs, time).await
}

async fn logins(report: &mut Report, login: &Load, pairs: u32, time: Duration) -> anyhow::Result<()> {
    report.section("Logins");
    report.paragraph(&format!(
        "Complete logins over {CALLERS} connections, including the session bucket and the audit, compared with \
         {PERMITS} threads that only verify the same password hash."
    ));
    login.closed(CALLERS, time).await?;
    let (mut logins, mut hashes) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        if pair.is_multiple_of(2) {
            logins.push(login.closed(CALLERS, time).await?.per_second());
            hashes.push(hashes_per_second(time).await?);
        } else {
            hashes.push(hashes_per_second(time).await?);
            logins.push(login.closed(CALLERS, time).await?.per_second());
        }
        let last = |rates: &[f64]| number(rates.last().copied().unwrap_or(f64::NAN), 1);
        println!(
            "pair {} of {pairs}: {} logins/s, {} password hashes/s",
            pair + 1,
            last(&logins),
            last(&hashes)
        );
    }
    let mut rows = vec![["per second", "median", "min", "max"].map(str::to_owned)];
    for (name, rates) in [("logins", &logins), ("argon2id alone", &hashes)] {
        let series: Series = rates.iter().copied().collect();
        let [median, min, max] = [series.median(), series.min(), series.max()];
        report.figure(format!("{}_per_second", name.replace(' ', "_")), median);
        rows.push([name.to_owned(), number(median, 1), number(min, 1), number(max, 1)]);
    }
    report.table(&rows);
    let ratio = ratios(&logins, &hashes).median();
    let text = "logins per second ÷ argon2id verifications per second";
    report.target("logins_to_argon2id", text, ratio, 2, Bound::AtLeast(0.9));
    Ok(())
}

/// Counts the password verifications per second of one thread per login permit.
async fn hashes_per_second(time: Duration) -> anyhow::Result<f64> {
    let hash = Argon2::default().hash_password(ADMIN.1.as_bytes());
    let hash = Arc::new(hash.map_err(|error| anyhow::anyhow!("{error}"))?.to_string());
    let started = Instant::now();
    let verifying = (0..PERMITS).map(|_| {
        let hash = Arc::clone(&hash);
        tokio::task::spawn_blocking(move || {
            let mut count = 0_u32;
            while started.elapsed() < time {
                let parsed = PasswordHash::new(&hash).ok();
                let right = parsed.is_some_and(|hash| {
                    Argon2::default()
                        .verify_password(ADMIN.1.as_bytes(), &hash)
                        .is_ok()
                });
                count += u32::from(right);
            }
            count
        })
    });
    let counts = try_join_all(verifying).await?;
    let count: u32 = counts.into_iter().sum();
    Ok(f64::from(count) / started.elapsed().as_secs_f64())
}

/// Compares reads at a fixed rate with and without concurrent logins.
async fn reads(
    report: &mut Report,
    stack: &Stack,
    login: &Load,
    pairs: u32,
    time: Duration,
) -> anyhow::Result<()> {
    report.section("Reads during logins");
    report.paragraph(&format!(
        "Uncached requests of method 611611 at {}/s in an open loop, with and without one connection that logs in \
         repeatedly.",
        number(RATE, 0)
    ));
    let instances = gateway::fill(stack, VMS).await?;
    let session = stack.session(Role::Viewer, Scope::All).await;
    let load = Load::success(
        address(stack)?,
        &gateway::requests(&session, codes::VM, &instances),
    );
    let during_logins = async || -> anyhow::Result<Outcome> {
        let (reads, logins) = tokio::join!(load.open(READERS, RATE, time), login.closed(1, time));
        logins?;
        reads
    };
    load.open(READERS, RATE, time).await?;
    let (mut busy, mut quiet) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        if pair.is_multiple_of(2) {
            busy.push(during_logins().await?);
            quiet.push(load.open(READERS, RATE, time).await?);
        } else {
            quiet.push(load.open(READERS, RATE, time).await?);
            busy.push(during_logins().await?);
        }
    }
    let mut rows = vec![["ms", "p50", "p90", "p99"].map(str::to_owned)];
    for (name, outcomes) in [("during logins", &busy), ("without logins", &quiet)] {
        let at = |share| {
            let series: Series = outcomes
                .iter()
                .map(|outcome| outcome.took.quantile(share))
                .collect();
            series.median()
        };
        let word = name.replace(' ', "_");
        report.figure(format!("reads_{word}_p50_ms"), at(0.5));
        report.figure(format!("reads_{word}_p99_ms"), at(0.99));
        rows.push([
            name.to_owned(),
            number(at(0.5), 2),
            number(at(0.9), 2),
            number(at(0.99), 2),
        ]);
    }
    report.table(&rows);
    let p99 = |outcomes: &[Outcome]| -> Vec<f64> {
        outcomes
            .iter()
            .map(|outcome| outcome.took.quantile(0.99))
            .collect()
    };
    let ratio = ratios(&p99(&busy), &p99(&quiet)).median();
    let text = "p99 latency of reads during logins ÷ without logins";
    report.target(
        "reads_p99_beside_logins_ratio",
        text,
        ratio,
        2,
        Bound::AtMost(2.0),
    );
    Ok(())
}
