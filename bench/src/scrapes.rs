//! Measures scrapes of the metrics of a large fleet: their duration and size, and the memory that they add to the
//! gateway.

use std::time::{Duration, Instant};

use anyhow::ensure;
use testkit::{Program, Stack};

use crate::{
    report::{Bound, Report, number},
    usage,
};

/// Number of scrapes that compute an answer.
const SCRAPES: u32 = 4;
/// Longer than the gateway reuses an answer.
const PAUSE: Duration = Duration::from_secs(16);
/// Name of the metric of which each VM that reports has a series.
const SERIES: &str = "vmwatch_vm_cpu_usage_ratio{";

/// Scrapes the gateway as Prometheus does, with `vms` VMs that report.
pub(crate) async fn run(stack: &Stack, session: &str, vms: u32, report: &mut Report) -> anyhow::Result<()> {
    report.section("Metrics for Prometheus");
    let gateway = stack.replica(Program::Gateway, 0).process.id();
    let before = usage::resident_mb(gateway)?;
    let mut slowest = Duration::ZERO;
    let mut compressed = 0;
    for _ in 0..SCRAPES {
        // The pause between scrapes: each computes its answer.
        tokio::time::sleep(PAUSE).await;
        let started = Instant::now();
        compressed = get(stack, session, "gzip").await?.len();
        slowest = slowest.max(started.elapsed());
    }
    let memory = usage::peak_resident_mb(gateway)? - before;
    let text = get(stack, session, "identity").await?;
    let text = std::str::from_utf8(&text)?;
    let series = text.lines().filter(|line| line.starts_with(SERIES)).count();
    ensure!(
        series == usize::try_from(vms)?,
        "the answer has {series} VMs of {vms}"
    );
    let name = format!("scrape of {vms} VMs, slowest of {SCRAPES}, s");
    report.target(
        "scrape_seconds",
        &name,
        slowest.as_secs_f64(),
        2,
        Bound::AtMost(1.0),
    );
    let name = format!("memory that scrapes of {vms} VMs add to the gateway at most, MB");
    report.target("scrape_memory_mb", &name, memory, 1, Bound::AtMost(20.0));
    let megabytes = |bytes: usize| anyhow::Ok(f64::from(u32::try_from(bytes)?) / 1e6);
    report.figure("scrape_compressed_mb", megabytes(compressed)?);
    report.paragraph(&format!(
        "An answer has {} MB, and {} MB compressed.",
        number(megabytes(text.len())?, 1),
        number(megabytes(compressed)?, 1)
    ));
    Ok(())
}

async fn get(stack: &Stack, session: &str, encoding: &str) -> anyhow::Result<Vec<u8>> {
    let client = reqwest::Client::builder().no_gzip().build()?;
    let request = client.get(stack.gateway(0).url("/api/v1/metrics"));
    let request = request.header("accept-encoding", encoding).bearer_auth(session);
    let answer = request.send().await?.error_for_status()?;
    Ok(answer.bytes().await?.to_vec())
}
