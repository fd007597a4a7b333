//! Samples a VM's processes.

use std::{
    collections::HashMap,
    path::Path,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use procfs::{FromRead, Uptime};
use tracing::{info, warn};
use vmwatch_api::metrics::{CpuSeconds, ProcessOwner, ProcessSample};

use super::{
    Roots, SampleError, float, kib_per_second,
    owner::Owners,
    percent,
    proc_files::{DiskBytes, ProcFiles, Stat, is_gone, process_ids},
    system::{CpuTicks, SystemStat},
};
use crate::select::Selection;

/// Samples a VM's processes.
///
/// A process is identified by its pid *and* its start time. If a pid was reused between two samples, the sample has the
/// last row of the old process and a row of the new one. A process that started and ended between two samples is not
/// observed. A process that was reported and has ended gets exactly one last row, with `shutdown_time`. The rates and
/// memory in that row are 0, because the final usage can no longer be read.
#[derive(Debug)]
pub struct ProcessSampler {
    selection: Selection,
    roots: Roots,
    files: ProcFiles,
    owners: Owners,
    clock: Clock,
    page_bytes: u64,
    tracked: HashMap<u32, Tracked>,
    /// Last rows of ended processes that have not been returned yet.
    ended: Vec<ProcessSample>,
    /// The beginning of the previous pass over `/proc`.
    previous: Option<Pass>,
    /// The number of passes over `/proc` so far.
    passes: u64,
}

/// The processes of a sample.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ProcessReading {
    /// Rows of the selected processes, followed by the last rows of ended processes.
    pub rows: Vec<ProcessSample>,
    /// CPU time of the VM since the previous sample; `None` if there is none.
    pub vm_cpu: Option<CpuSeconds>,
}

/// The beginning of a pass over `/proc`.
#[derive(Debug, Clone, Copy)]
struct Pass {
    at: Instant,
    /// Clock ticks since boot.
    ticks: u64,
    /// CPU time of the VM.
    cpu: CpuTicks,
}

/// What does not change in each sample of a process.
#[derive(Debug, Clone, Default)]
struct Description {
    /// The kernel's name of the process.
    comm: Vec<u8>,
    name: String,
    owner: ProcessOwner,
    /// Number of times that the description was read with this name, at most 2.
    readings: u8,
}

/// A process with its values in the previous pass over `/proc`.
#[derive(Debug)]
struct Tracked {
    description: Description,
    start_ticks: u64,
    cpu_ticks: u64,
    disk: Option<DiskBytes>,
    at: Instant,
    /// The number of the last pass over `/proc` that found the process.
    last_pass: u64,
    /// Whether a row of the process was returned; only then does it get a last row when it ends.
    reported: bool,
}

impl ProcessSampler {
    /// Creates a process sampler. The only value read is the boot time.
    pub fn new(selection: Selection, roots: Roots) -> Result<Self, SampleError> {
        let clock = Clock {
            ticks_per_second: rustix::param::clock_ticks_per_second().max(1),
            boot: SystemStat::read(&roots.proc)?
                .boot
                .ok_or(SampleError::NoBootTime)?,
        };
        Ok(Self {
            selection,
            files: ProcFiles::new(roots.proc.clone()).map_err(SampleError::List)?,
            owners: Owners::new(&roots.root, false),
            roots,
            clock,
            page_bytes: rustix::param::page_size() as u64,
            tracked: HashMap::new(),
            ended: Vec::new(),
            previous: None,
            passes: 0,
        })
    }

    /// Reports command lines as well, without secrets.
    pub fn report_command_lines(&mut self) {
        self.owners = Owners::new(&self.roots.root, true);
    }

    /// Reads the counters of all processes without returning rows, so the next call can compute rates.
    pub fn prime(&mut self) -> Result<(), SampleError> {
        self.running(0)?;
        self.forget_ended();
        // A process that ended during the pass does not count as unreadable.
        let unreadable =
            |(pid, process): &(&u32, &Tracked)| process.disk.is_none() && self.files.exist(**pid);
        let unreadable = self.tracked.iter().filter(unreadable).count();
        if unreadable > 0 {
            warn!(
                unreadable,
                processes = self.tracked.len(),
                "the disk counters of some processes cannot be read and are reported as 0; run the agent as root or with CAP_SYS_PTRACE"
            );
        }
        Ok(())
    }

    /// Samples the processes. Memory usage is a percentage of `memory_bytes`.
    pub fn read(&mut self, memory_bytes: u64) -> Result<ProcessReading, SampleError> {
        let ProcessReading { mut rows, vm_cpu } = self.running(memory_bytes)?;
        self.selection.keep(&mut rows);
        for row in &rows {
            if let Some(process) = self.tracked.get_mut(&row.pid) {
                process.reported = true;
            }
        }
        rows.extend(self.forget_ended());
        Ok(ProcessReading { rows, vm_cpu })
    }

    /// Returns the rows of all running processes. If the list of processes cannot be read completely, the state of the
    /// sampler does not change, because the missing processes would seem to have ended.
    fn running(&mut self, memory_bytes: u64) -> Result<ProcessReading, SampleError> {
        let stat = SystemStat::read(&self.roots.proc)?;
        let began = Pass {
            at: Instant::now(),
            ticks: self.clock.ticks_since_boot(&self.roots.proc)?,
            cpu: stat.ticks,
        };
        if let Some(boot) = stat.boot {
            self.clock.set_boot(boot);
        }
        let pids = process_ids(&self.roots.proc)?;
        self.owners.refresh();
        self.passes += 1;
        let rows = pids
            .into_iter()
            .filter_map(|pid| self.row(pid, memory_bytes))
            .collect();
        let previous = self.previous.replace(began);
        let vm_cpu = previous.map(|previous| self.clock.cpu_seconds(&began.cpu.since(&previous.cpu)));
        Ok(ProcessReading { rows, vm_cpu })
    }

    fn row(&mut self, pid: u32, memory_bytes: u64) -> Option<ProcessSample> {
        let (mut seen, parent_pid, rss_pages) = match self.files.stat(pid) {
            Ok(stat) if stat.has_ended() => return None,
            Ok(stat) => (Tracked::new(&stat, self.passes), stat.parent_pid, stat.rss_pages),
            Err(error) if is_gone(&error) => return None,
            Err(_) => {
                // The process exists but cannot be read at the moment, for example because the agent has no free file
                // descriptor. It has not ended.
                if let Some(process) = self.tracked.get_mut(&pid) {
                    process.last_pass = self.passes;
                }
                return None;
            }
        };
        seen.disk = self.files.disk_bytes(pid);
        let known = self.tracked.remove(&pid);
        let mut description = None;
        let baseline = match known {
            Some(known) if known.start_ticks == seen.start_ticks => {
                seen.reported = known.reported;
                let baseline = Baseline::from_tracked(&known);
                description = Some(known.description);
                Some(baseline)
            }
            other => {
                // This is a new process. If its pid was reused, the previous process with this pid has ended.
                self.ended.extend(other.and_then(|old| self.last_row(pid, old)));
                self.previous
                    .and_then(|pass| (seen.start_ticks >= pass.ticks).then_some(Baseline::zero(pass.at)))
            }
        };
        self.describe(pid, parent_pid, &mut seen.description, description);
        let usage = baseline
            .map(|baseline| seen.usage_since(&baseline, self.clock))
            .unwrap_or_default();
        let row = ProcessSample {
            cmd: seen.description.name.clone(),
            pid,
            cpu_util: usage.cpu_util,
            mem: percent(
                float(rss_pages.saturating_mul(self.page_bytes)),
                float(memory_bytes),
            ),
            disk_read: usage.disk_read,
            disk_write: usage.disk_write,
            running_time: self.clock.unix_seconds(seen.start_ticks),
            shutdown_time: None,
            cpu_seconds: usage.cpu_seconds,
            owner: seen.description.owner.clone(),
        };
        self.tracked.insert(pid, seen);
        Some(row)
    }

    /// Adds name and owner to the description of a process. They are read only in the first two samples of a process,
    /// because a service often gets its user and unit just after its start, and when its name or parent has changed.
    fn describe(&mut self, pid: u32, parent_pid: u32, seen: &mut Description, known: Option<Description>) {
        let mut readings = 0;
        if let Some(known) = known.filter(|known| known.comm == seen.comm) {
            if known.readings > 1 && known.owner.parent_pid == Some(parent_pid) {
                *seen = known;
                return;
            }
            readings = known.readings;
        }
        seen.name = self.files.name(pid, &seen.comm);
        seen.owner = self.owners.of(&mut self.files, pid, parent_pid);
        seen.readings = readings.saturating_add(1).min(2);
    }

    /// Removes the processes that the current pass over `/proc` did not find. Returns the last rows of those that were
    /// reported.
    fn forget_ended(&mut self) -> Vec<ProcessSample> {
        let passes = self.passes;
        let gone: Vec<_> = self
            .tracked
            .extract_if(|_, process| process.last_pass != passes)
            .collect();
        let mut ended = std::mem::take(&mut self.ended);
        ended.extend(
            gone.into_iter()
                .filter_map(|(pid, process)| self.last_row(pid, process)),
        );
        // The clock is read after all processes, so every missing process had really ended by this time.
        let now = unix_seconds(SystemTime::now());
        for row in &mut ended {
            row.shutdown_time = Some(now);
        }
        ended
    }

    /// The last row of an ended process; `None` if the process was never reported. The caller sets `shutdown_time`.
    fn last_row(&self, pid: u32, process: Tracked) -> Option<ProcessSample> {
        process.reported.then(|| ProcessSample {
            cmd: process.description.name,
            pid,
            cpu_util: 0.0,
            mem: 0.0,
            disk_read: 0.0,
            disk_write: 0.0,
            running_time: self.clock.unix_seconds(process.start_ticks),
            shutdown_time: None,
            cpu_seconds: None,
            owner: process.description.owner,
        })
    }
}

impl Tracked {
    fn new(stat: &Stat<'_>, last_pass: u64) -> Self {
        Self {
            description: Description {
                comm: stat.comm().into_owned(),
                ..Description::default()
            },
            start_ticks: stat.start_ticks,
            cpu_ticks: stat.cpu_ticks,
            disk: None,
            at: Instant::now(),
            last_pass,
            reported: false,
        }
    }

    fn usage_since(&self, baseline: &Baseline, clock: Clock) -> Usage {
        let elapsed = self.at - baseline.at;
        let cpu_ticks = self.cpu_ticks.saturating_sub(baseline.cpu_ticks);
        let cpu_seconds = clock.seconds(cpu_ticks);
        let (disk_read, disk_write) = match (self.disk, baseline.disk) {
            (Some(now), Some(then)) => (
                kib_per_second(now.read.saturating_sub(then.read), elapsed),
                kib_per_second(now.written.saturating_sub(then.written), elapsed),
            ),
            _ => (0.0, 0.0),
        };
        Usage {
            cpu_util: percent(cpu_seconds, elapsed.as_secs_f64()),
            cpu_seconds: Some(cpu_seconds),
            disk_read,
            disk_write,
        }
    }
}

/// The counters of a process at an earlier time, from which rates are computed.
struct Baseline {
    cpu_ticks: u64,
    disk: Option<DiskBytes>,
    at: Instant,
}

impl Baseline {
    fn from_tracked(process: &Tracked) -> Self {
        Self {
            cpu_ticks: process.cpu_ticks,
            disk: process.disk,
            at: process.at,
        }
    }

    /// The counters of a process that did not exist in the previous sample: zero.
    fn zero(at: Instant) -> Self {
        Self {
            cpu_ticks: 0,
            disk: Some(DiskBytes { read: 0, written: 0 }),
            at,
        }
    }
}

/// The rates of a process row. The default is that of a process whose earlier usage is unknown.
#[derive(Debug, Default)]
struct Usage {
    cpu_util: f64,
    cpu_seconds: Option<f64>,
    disk_read: f64,
    disk_write: f64,
}

/// Converts the kernel's clock ticks to seconds.
#[derive(Debug, Clone, Copy)]
struct Clock {
    ticks_per_second: u64,
    /// Boot time in Unix seconds.
    boot: u64,
}

impl Clock {
    /// Takes over the boot time, which the kernel computes from the current time. It changes when the clock is set. A
    /// difference of one second is ignored: it comes from rounding, and would make another start time, and therefore
    /// another process, of each process.
    fn set_boot(&mut self, boot: u64) {
        if boot.abs_diff(self.boot) > 1 {
            info!(
                seconds = i128::from(boot) - i128::from(self.boot),
                "the clock of the VM was set; start times of processes change"
            );
            self.boot = boot;
        }
    }

    fn seconds(self, ticks: u64) -> f64 {
        float(ticks) / float(self.ticks_per_second)
    }

    fn cpu_seconds(self, ticks: &CpuTicks) -> CpuSeconds {
        CpuSeconds {
            user: self.seconds(ticks.user),
            nice: self.seconds(ticks.nice),
            system: self.seconds(ticks.system),
        }
    }

    /// Converts clock ticks since boot to Unix seconds with two decimals, as in the examples of the documented API.
    fn unix_seconds(self, ticks: u64) -> f64 {
        let whole = self.boot.saturating_add(ticks / self.ticks_per_second);
        let hundredths = ticks % self.ticks_per_second * 100 / self.ticks_per_second;
        float(whole.saturating_mul(100).saturating_add(hundredths)) / 100.0
    }

    fn ticks_since_boot(self, proc: &Path) -> Result<u64, SampleError> {
        let uptime = Uptime::from_file(proc.join("uptime"))?.uptime_duration();
        let fraction = u64::from(uptime.subsec_micros()) * self.ticks_per_second / 1_000_000;
        Ok(uptime
            .as_secs()
            .saturating_mul(self.ticks_per_second)
            .saturating_add(fraction))
    }
}

fn unix_seconds(moment: SystemTime) -> f64 {
    moment
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

#[cfg(test)]
impl ProcessSampler {
    /// Makes the previous sample seem older.
    pub(super) fn age(&mut self, by: std::time::Duration) {
        let older = |at: Instant| at.checked_sub(by).unwrap();
        if let Some(previous) = &mut self.previous {
            previous.at = older(previous.at);
        }
        for process in self.tracked.values_mut() {
            process.at = older(process.at);
        }
    }
}

#[cfg(test)]
mod tests;
