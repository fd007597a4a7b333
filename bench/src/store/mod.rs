//! Measures the store of rows: bytes per row, the rate of ingestion, and reads of long histories.
//!
//! Each part starts its own NATS with the shipped configuration, its own database and the programs that it needs. VMs are
//! generated, with a stated share of active processes.

pub(crate) mod activity;
mod clock;
mod compaction;
mod files;
mod ingestion;
mod names;
mod newest;
pub(crate) mod raw;
mod reads;
mod recorded;
mod requests;
mod sizes;

use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::report::{Bound, Report};

/// Command-line options of `bench store`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Use less data and fewer rounds: about three minutes instead of twenty
    #[arg(long)]
    quick: bool,
    /// Measure only these parts, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "PARTS")]
    only: Vec<Part>,
    /// Minutes for which compaction is measured at ten times real time [default: 12, quick: 4]
    #[arg(long)]
    compaction_minutes: Option<u64>,
}

/// The parts of the benchmark, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Ingestion,
    Reads,
    Names,
    Compaction,
    Sizes,
}

/// How much is measured.
#[derive(Clone, Copy)]
struct Scale {
    /// Number of VMs and hours whose blocks are measured.
    size_vms: u32,
    size_hours: u32,
    /// Number of samples of processes that are recorded from real agents.
    recorded_samples: u32,
    /// Number of VMs and hours whose blocks are written to measure the database's files.
    file_vms: u32,
    file_hours: u32,
    /// Number of pairs of rounds, and duration of a round, of ingestion.
    pairs: u32,
    round: Duration,
    /// Number of days of the long history.
    days: u64,
    /// Number of times that each read of newest rows, each process table, each series and each search is requested.
    newest: usize,
    tables: usize,
    series: usize,
    searches: usize,
    /// Duration for which compaction is measured.
    compaction_minutes: u64,
}

const WHOLE: Scale = Scale {
    size_vms: 6,
    size_hours: 24,
    recorded_samples: 60,
    file_vms: 30,
    file_hours: 24,
    pairs: 5,
    round: Duration::from_secs(7),
    days: 365,
    newest: 500,
    tables: 1000,
    series: 50,
    searches: 100,
    compaction_minutes: 12,
};

const QUICK: Scale = Scale {
    size_vms: 2,
    size_hours: 3,
    recorded_samples: 10,
    file_vms: 20,
    file_hours: 12,
    pairs: 2,
    round: Duration::from_secs(3),
    days: 40,
    newest: 100,
    tables: 200,
    series: 10,
    searches: 20,
    compaction_minutes: 4,
};

pub(crate) async fn run(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let mut scale = if options.quick { QUICK } else { WHOLE };
    scale.compaction_minutes = options.compaction_minutes.unwrap_or(scale.compaction_minutes);
    let scale = &scale;
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    let mut resident: f64 = 0.0;
    if wanted(Part::Ingestion) {
        resident = resident.max(ingestion::run(scale, report).await?);
        report.save()?;
    }
    if wanted(Part::Reads) {
        resident = resident.max(reads::run(scale, report).await?);
        report.save()?;
    }
    let mut names = None;
    if wanted(Part::Names) {
        let measured = names::run(scale, report).await?;
        resident = resident.max(measured.resident_mb);
        names = Some(measured.bytes_per_row);
        report.save()?;
    }
    if wanted(Part::Compaction) {
        resident = resident.max(compaction::run(scale, report).await?);
        report.save()?;
    }
    if wanted(Part::Sizes) {
        sizes::run(scale, report, names).await?;
    }
    if resident > 0.0 {
        let text = "peak resident memory of metrics-svc in all parts, MB";
        report.target(
            "store_metrics_resident_peak_mb",
            text,
            resident,
            1,
            Bound::AtMost(80.0),
        );
    }
    report.print_targets();
    Ok(())
}
