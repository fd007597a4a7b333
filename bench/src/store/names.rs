//! Measures the question which VMs ran a process, and the bytes of the process names.

use std::time::{Duration, SystemTime};

use bson::{RawDocumentBuf, doc};
use futures::TryStreamExt;
use testkit::{Program, Stack};
use vmwatch_api::{Role, Scope};
use vmwatch_blocks::Encoder;
use vmwatch_service::config::UTC_OFFSET;

use super::{
    Scale,
    activity::{ACTIVITIES, PROCESSES, Vm, name},
    reads::timestamp,
    requests::timed,
};
use crate::{
    load,
    report::{Bound, Report, number},
    samples::{self, Message},
    usage,
};

/// Number of VMs, and number of days on which each of them ran its processes.
const VMS: u32 = 1000;
const DAYS: u32 = 7;
/// The name of a process that one in [`ONE_OF`] VMs ran.
const RARE: &str = "rare-daemon";
const ONE_OF: u32 = 100;
/// The collection of names.
const NAMES: &str = "vm_samples_process_names";
/// Time limit for the names of all stored rows.
const COMPLETE: Duration = Duration::from_mins(5);
/// Minutes of a day.
const MINUTES: u32 = 24 * 60;

/// The results that other parts need.
pub(super) struct Measured {
    pub(super) resident_mb: f64,
    /// Bytes of the names of a VM and day for each of its process rows.
    pub(super) bytes_per_row: f64,
}

pub(super) async fn run(scale: &Scale, report: &mut Report) -> anyhow::Result<Measured> {
    let stack = samples::stack_for_reads().start().await;
    report.describe(&stack)?;
    report.section("Process names");
    let end = SystemTime::now();
    fill(&stack, end).await?;
    let bytes_per_row = bytes_per_row(&stack).await?;
    report.paragraph(&format!(
        "{VMS} VMs with {PROCESSES} processes each on {DAYS} days. The names of a VM and day take {} bytes per process row, \
         with a sample per minute.",
        number(bytes_per_row, 3)
    ));
    report.figure("process_names_bytes_per_row", bytes_per_row);
    let session = stack.session(Role::Viewer, Scope::All).await;
    let from = end - Duration::from_hours(24) * DAYS;
    let common = name(1);
    let few = format!(
        "which of {VMS} VMs ran X in {DAYS} days: {} did, median, ms",
        VMS / ONE_OF
    );
    let all = format!("which of {VMS} VMs ran X in {DAYS} days: all did, first page, median, ms");
    for (figure, text, name, limit) in [
        ("process_search_few_ms", few, RARE, 200.0),
        ("process_search_all_ms", all, common.as_str(), 500.0),
    ] {
        let (from, to) = (timestamp(from), timestamp(end));
        let path = format!("/api/v1/processes?name={name}&from={from}&to={to}");
        let requests = vec![load::get(&path, &session); scale.searches];
        let took = timed(&stack, &requests, br#""vms":[{"#).await?;
        report.figure(format!("{figure}_max"), took.max());
        report.target(figure, &text, took.median(), 1, Bound::AtMost(limit));
    }
    Ok(Measured {
        resident_mb: usage::peak_resident_mb(stack.replica(Program::Metrics, 0).process.id())?,
        bytes_per_row,
    })
}

/// Stores a sample of each VM and day, and waits until its names are stored.
async fn fill(stack: &Stack, end: SystemTime) -> anyhow::Result<()> {
    println!("storing the names of {VMS} VMs on {DAYS} days");
    let offset = UTC_OFFSET.default.parse()?;
    let mut encoder = Encoder::new()?;
    for number in 0..VMS {
        let mut vm = Vm::new(number, ACTIVITIES[0], offset)?;
        if number.is_multiple_of(ONE_OF) {
            vm.rename_last(RARE);
        }
        let messages = (0..DAYS).rev().map(|day| {
            let at = end - Duration::from_hours(24) * day - Duration::from_secs(1);
            Message::encode(vm.next(at), &mut encoder)
        });
        samples::publish(
            stack.bus.jetstream_for_tests(),
            messages.collect::<Result<_, _>>()?,
        )
        .await?;
    }
    samples::drained(stack.bus.jetstream_for_tests()).await?;
    samples::summarized(stack, COMPLETE).await;
    Ok(())
}

/// Average bytes of the names of a VM and day, for each process row of a day with a sample per minute.
async fn bytes_per_row(stack: &Stack) -> anyhow::Result<f64> {
    let names = stack.database.handle().collection::<RawDocumentBuf>(NAMES);
    let (mut bytes, mut documents) = (0, 0);
    let mut found = names.find(doc! {}).await?;
    while let Some(document) = found.try_next().await? {
        bytes += u32::try_from(document.as_bytes().len())?;
        documents += 1;
    }
    anyhow::ensure!(
        documents >= VMS * DAYS,
        "names of {documents} VMs and days are stored"
    );
    Ok(f64::from(bytes) / f64::from(documents) / f64::from(PROCESSES * MINUTES))
}
