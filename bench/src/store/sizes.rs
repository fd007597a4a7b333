//! Measures the bytes of rows in blocks of level 1: those of generated VMs, and those that agents recorded.

use std::time::{Duration, SystemTime};

use testkit::Database;
use vmwatch_api::{metrics::Sample, time::UtcOffset};
use vmwatch_blocks::Encoder;
use vmwatch_service::config::UTC_OFFSET;

use super::{
    Scale,
    activity::{ACTIVITIES, PROCESSES, Vm},
    files,
    recorded::Recording,
};
use crate::{
    blocks::{BlockWriter, Hour},
    fleet::{VM_INTERVAL, VM_SAMPLES_PER_MINUTE},
    report::{Bound, Report, number},
    samples::{self, Message},
};

/// Minutes of an hour.
const MINUTES: u32 = 60;

/// Bytes and rows of some samples.
#[derive(Default)]
struct Sizes {
    /// Bytes of the documents of blocks, by kind: rows of the VM, rows of processes.
    documents: [f64; 2],
    rows: [f64; 2],
    /// Bytes of the messages that have process rows.
    messages: f64,
}

/// `names` is the size of the process names in bytes per process row, if it was measured.
pub(super) async fn run(scale: &Scale, report: &mut Report, names: Option<f64>) -> anyhow::Result<()> {
    report.section("Bytes per row");
    let offset = UTC_OFFSET.default.parse()?;
    let mut encoder = Encoder::new()?;
    let recording = Recording::start().await?;
    let mut fleets = Vec::new();
    for activity in ACTIVITIES {
        let mut sizes = Sizes::default();
        for vm in 0..scale.size_vms {
            let mut vm = Vm::new(vm, activity, offset)?;
            for hour in 0..scale.size_hours {
                let start = SystemTime::UNIX_EPOCH + Duration::from_hours(490_000 + u64::from(hour));
                sizes.add(&hour_of(&mut vm, start), &mut encoder, offset)?;
            }
        }
        fleets.push((
            format!("generated, {} % of processes active", number(activity * 100.0, 0)),
            sizes,
        ));
    }
    let bytes = bytes_in_files(scale, offset).await?;
    let mut recorded = Vec::new();
    for (name, messages) in recording.finish(scale.recorded_samples).await? {
        let mut sizes = Sizes::default();
        let samples: Vec<_> = messages.into_iter().map(|(sample, _)| sample).collect();
        sizes.add(&samples, &mut encoder, offset)?;
        recorded.push((name.to_owned(), sizes));
    }
    tell(report, scale, &fleets, &recorded, names);
    let text = "growth of the development database's table files per process row, bytes";
    report.target("process_row_file_bytes", text, bytes, 2, Bound::AtMost(3.0));
    Ok(())
}

/// An hour of samples with the default intervals: of the VM every ten seconds, and of its processes every minute.
fn hour_of(vm: &mut Vm, start: SystemTime) -> Vec<Sample> {
    let steps = (0..MINUTES * VM_SAMPLES_PER_MINUTE).map(|step| {
        let processes = step.is_multiple_of(VM_SAMPLES_PER_MINUTE);
        vm.sample(start + VM_INTERVAL * step, processes)
    });
    steps.collect()
}

impl Sizes {
    /// Adds the samples of an hour of a VM.
    fn add(&mut self, samples: &[Sample], encoder: &mut Encoder, offset: UtcOffset) -> anyhow::Result<()> {
        let Some(hour) = Hour::of(samples, offset)? else {
            return Ok(());
        };
        for document in hour.documents(encoder) {
            let kind = usize::from(document.get_str("kind")? == "process");
            if let (Some(bytes), Some(rows)) = (self.documents.get_mut(kind), self.rows.get_mut(kind)) {
                *bytes += count(document.as_bytes().len());
                *rows += f64::from(document.get_i32("rows")?);
            }
        }
        for sample in samples.iter().filter(|sample| !sample.processes.is_empty()) {
            self.messages += count(Message::encode(sample, encoder)?.body.len());
        }
        Ok(())
    }
}

fn tell(
    report: &mut Report,
    scale: &Scale,
    fleets: &[(String, Sizes)],
    recorded: &[(String, Sizes)],
    names: Option<f64>,
) {
    report.paragraph(&format!(
        "Documents of blocks of level 1, each with an hour of a VM: rows of {PROCESSES} processes every minute, and of the \
         VM every ten seconds. {} VMs, {} hours. Recorded are {} samples of the processes in twenty times shorter intervals, \
         while this benchmark ran. Messages are samples with rows of all processes.",
        scale.size_vms, scale.size_hours, scale.recorded_samples
    ));
    if recorded.len() < 2 {
        report.paragraph("No QEMU guest was recorded, because its image is not installed.");
    }
    let heading = [
        "bytes per row",
        "process rows",
        "VM rows",
        "process rows in messages",
    ];
    let mut rows = vec![heading.map(str::to_owned)];
    for (name, sizes) in fleets.iter().chain(recorded) {
        let [vm, process] = sizes.per_row();
        let message = sizes.messages / sizes.rows[1];
        rows.push([
            name.clone(),
            number(process, 2),
            number(vm, 1),
            number(message, 1),
        ]);
    }
    report.table(&rows);
    for (name, sizes) in fleets.iter().chain(recorded) {
        let name = name
            .replace(", ", " ")
            .replace(" % of processes", "")
            .replace(' ', "_")
            .to_lowercase();
        let [vm, process] = sizes.per_row();
        report.figure(format!("process_row_block_bytes_{name}"), process);
        report.figure(format!("vm_row_block_bytes_{name}"), vm);
    }
    let greatest = |of: fn(&Sizes) -> f64| fleets.iter().map(|(_, sizes)| of(sizes)).fold(f64::NAN, f64::max);
    let text = "bytes of blocks of level 1 and of names per process row, as BSON";
    let process = greatest(|sizes| sizes.per_row()[1]);
    if names.is_none() {
        report
            .paragraph("The process names were not measured; the bytes per process row do not include them.");
    }
    let process = process + names.unwrap_or(0.0);
    report.target("process_row_block_bytes", text, process, 2, Bound::AtMost(2.0));
    let text = "bytes of blocks of level 1 per VM row, as BSON";
    let vm = greatest(|sizes| sizes.per_row()[0]);
    report.target("vm_row_block_bytes", text, vm, 1, Bound::AtMost(20.0));
}

impl Sizes {
    /// Bytes of documents per row of the VM and per process row.
    fn per_row(&self) -> [f64; 2] {
        let ([vm, process], [vms, processes]) = (self.documents, self.rows);
        [vm / vms, process / processes]
    }
}

/// Writes blocks of level 1 into an empty database, and returns the growth of its table files per process row.
async fn bytes_in_files(scale: &Scale, offset: UtcOffset) -> anyhow::Result<f64> {
    let folder = tempfile::Builder::new().prefix("vmwatch-bench-").tempdir()?;
    let database = Database::start(folder.path()).await;
    let rows = samples::open(database.uri()).await?;
    rows.prepare(&samples::RETENTION).await?;
    let before = files::table_bytes(&database, folder.path()).await?;
    let mut writer = BlockWriter::new(&database.handle(), offset)?;
    for vm in 0..scale.file_vms {
        let mut vm = Vm::new(vm, ACTIVITIES[1], offset)?;
        for minute in 0..MINUTES * scale.file_hours {
            let at = SystemTime::UNIX_EPOCH + Duration::from_hours(490_000) + Duration::from_mins(1) * minute;
            writer.add(vm.next(at)).await?;
        }
    }
    writer.finish().await?;
    let after = files::table_bytes(&database, folder.path()).await?;
    Ok(count(usize::try_from(after - before)?) / count(usize::try_from(writer.process_rows)?))
}

fn count(number: usize) -> f64 {
    u32::try_from(number).map_or(f64::INFINITY, f64::from)
}
