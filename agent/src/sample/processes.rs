//! Samples a VM's processes.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use procfs::{FromRead, Uptime};
use tracing::{info, warn};
use vmwatch_api::metrics::ProcessSample;

use super::{
    SampleError, float, kib_per_second, percent,
    proc_files::{DiskBytes, ProcFiles, Stat, is_gone, process_ids},
    system::SystemStat,
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
    files: ProcFiles,
    clock: Clock,
    page_bytes: u64,
    tracked: HashMap<u32, Tracked>,
    /// Last rows of ended processes that have not been returned yet.
    ended: Vec<ProcessSample>,
    /// Time at which the previous pass over `/proc` began, as an instant and in clock ticks since boot.
    previous: Option<(Instant, u64)>,
    /// The number of passes over `/proc` so far.
    passes: u64,
}

/// A process with its values in the previous pass over `/proc`.
#[derive(Debug)]
struct Tracked {
    name: String,
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
    pub fn new(selection: Selection, proc: PathBuf) -> Result<Self, SampleError> {
        let clock = Clock {
            ticks_per_second: rustix::param::clock_ticks_per_second().max(1),
            boot: SystemStat::read(&proc)?.boot.ok_or(SampleError::NoBootTime)?,
        };
        Ok(Self {
            selection,
            files: ProcFiles::new(proc).map_err(SampleError::List)?,
            clock,
            page_bytes: rustix::param::page_size() as u64,
            tracked: HashMap::new(),
            ended: Vec::new(),
            previous: None,
            passes: 0,
        })
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

    /// Returns the rows of the selected processes, followed by the last rows of ended processes. Memory usage is a
    /// percentage of `memory_bytes`.
    pub fn read(&mut self, memory_bytes: u64) -> Result<Vec<ProcessSample>, SampleError> {
        let mut rows = self.running(memory_bytes)?;
        self.selection.keep(&mut rows);
        for row in &rows {
            if let Some(process) = self.tracked.get_mut(&row.pid) {
                process.reported = true;
            }
        }
        rows.extend(self.forget_ended());
        Ok(rows)
    }

    /// Returns the rows of all running processes. If the list of processes cannot be read completely, the state of the
    /// sampler does not change, because the missing processes would seem to have ended.
    fn running(&mut self, memory_bytes: u64) -> Result<Vec<ProcessSample>, SampleError> {
        let began = (Instant::now(), self.clock.ticks_since_boot(self.files.root())?);
        if let Some(boot) = SystemStat::read(self.files.root())?.boot {
            self.clock.set_boot(boot);
        }
        let pids = process_ids(self.files.root())?;
        self.passes += 1;
        let rows = pids
            .into_iter()
            .filter_map(|pid| self.row(pid, memory_bytes))
            .collect();
        self.previous = Some(began);
        Ok(rows)
    }

    fn row(&mut self, pid: u32, memory_bytes: u64) -> Option<ProcessSample> {
        let (mut seen, rss_pages) = match self.files.stat(pid) {
            Ok(stat) if stat.has_ended() => return None,
            Ok(stat) => (Tracked::new(&stat, self.passes), stat.rss_pages),
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
        let baseline = match known {
            Some(known) if known.start_ticks == seen.start_ticks => {
                seen.reported = known.reported;
                Some(Baseline::from_tracked(&known))
            }
            other => {
                // This is a new process. If its pid was reused, the previous process with this pid has ended.
                self.ended.extend(other.and_then(|old| self.last_row(pid, old)));
                self.previous
                    .and_then(|(at, ticks)| (seen.start_ticks >= ticks).then_some(Baseline::zero(at)))
            }
        };
        let usage = baseline
            .map(|baseline| seen.usage_since(&baseline, self.clock))
            .unwrap_or_default();
        let row = ProcessSample {
            cmd: seen.name.clone(),
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
        };
        self.tracked.insert(pid, seen);
        Some(row)
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
            cmd: process.name,
            pid,
            cpu_util: 0.0,
            mem: 0.0,
            disk_read: 0.0,
            disk_write: 0.0,
            running_time: self.clock.unix_seconds(process.start_ticks),
            shutdown_time: None,
        })
    }
}

impl Tracked {
    fn new(stat: &Stat<'_>, last_pass: u64) -> Self {
        Self {
            name: stat.name().into_owned(),
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
        let cpu_seconds = float(cpu_ticks) / float(clock.ticks_per_second);
        let (disk_read, disk_write) = match (self.disk, baseline.disk) {
            (Some(now), Some(then)) => (
                kib_per_second(now.read.saturating_sub(then.read), elapsed),
                kib_per_second(now.written.saturating_sub(then.written), elapsed),
            ),
            _ => (0.0, 0.0),
        };
        Usage {
            cpu_util: percent(cpu_seconds, elapsed.as_secs_f64()),
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

/// The rates of a process row.
#[derive(Debug, Default)]
struct Usage {
    cpu_util: f64,
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
        self.previous = self.previous.map(|(at, ticks)| (older(at), ticks));
        for process in self.tracked.values_mut() {
            process.at = older(process.at);
        }
    }
}

#[cfg(test)]
mod tests;
