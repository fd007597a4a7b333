//! The counters of a process in two samples, and the rates computed from them.

use std::{path::Path, time::Instant};

use procfs::{FromRead, Uptime};
use tracing::info;
use vmwatch_api::metrics::{CpuSeconds, ProcessOwner};

use super::super::{
    SampleError, float, kib_per_second, percent,
    proc_files::{DiskBytes, Stat},
    reaped::Counted,
    system::CpuTicks,
};

/// What does not change in each sample of a process.
#[derive(Debug, Clone, Default)]
pub(super) struct Description {
    /// The kernel's name of the process.
    pub(super) comm: Vec<u8>,
    pub(super) name: String,
    pub(super) owner: ProcessOwner,
    /// Number of times that the description was read with this name, at most 2.
    pub(super) readings: u8,
}

/// A process with its values in the previous pass over `/proc`.
#[derive(Debug)]
pub(super) struct Tracked {
    pub(super) description: Description,
    pub(super) start_ticks: u64,
    pub(super) cpu_ticks: u64,
    pub(super) disk: Option<DiskBytes>,
    pub(super) at: Instant,
    /// The number of the last pass over `/proc` that found the process.
    pub(super) last_pass: u64,
    /// Whether a row of the process was returned; only then does it get a last row when it ends.
    pub(super) reported: bool,
}

impl Counted {
    pub(super) fn of(stat: &Stat<'_>) -> Self {
        Self {
            start_ticks: stat.start_ticks,
            own: stat.cpu_ticks,
            children: stat.child_ticks,
            parent_pid: stat.parent_pid,
            is_zombie: stat.has_ended(),
        }
    }
}

impl Tracked {
    pub(super) fn new(stat: &Stat<'_>, last_pass: u64) -> Self {
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

    pub(super) fn usage_since(&self, baseline: &Baseline, clock: Clock) -> Usage {
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
pub(super) struct Baseline {
    pub(super) cpu_ticks: u64,
    pub(super) disk: Option<DiskBytes>,
    pub(super) at: Instant,
}

impl Baseline {
    pub(super) fn from_tracked(process: &Tracked) -> Self {
        Self {
            cpu_ticks: process.cpu_ticks,
            disk: process.disk,
            at: process.at,
        }
    }

    /// The counters of a process that did not exist in the previous sample: zero.
    pub(super) fn zero(at: Instant) -> Self {
        Self {
            cpu_ticks: 0,
            disk: Some(DiskBytes { read: 0, written: 0 }),
            at,
        }
    }
}

/// The rates of a process row. The default is that of a process whose earlier usage is unknown.
#[derive(Debug, Default)]
pub(super) struct Usage {
    pub(super) cpu_util: f64,
    pub(super) cpu_seconds: Option<f64>,
    pub(super) disk_read: f64,
    pub(super) disk_write: f64,
}

/// Converts the kernel's clock ticks to seconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    pub(super) ticks_per_second: u64,
    /// Boot time in Unix seconds.
    pub(super) boot: u64,
}

impl Clock {
    /// Takes over the boot time, which the kernel computes from the current time. It changes when the clock is set. A
    /// difference of one second is ignored: it comes from rounding, and would make another start time, and therefore
    /// another process, of each process.
    pub(super) fn set_boot(&mut self, boot: u64) {
        if boot.abs_diff(self.boot) > 1 {
            info!(
                seconds = i128::from(boot) - i128::from(self.boot),
                "the clock of the VM was set; start times of processes change"
            );
            self.boot = boot;
        }
    }

    pub(super) fn seconds(self, ticks: u64) -> f64 {
        float(ticks) / float(self.ticks_per_second)
    }

    pub(super) fn cpu_seconds(self, ticks: &CpuTicks) -> CpuSeconds {
        CpuSeconds {
            user: self.seconds(ticks.user),
            nice: self.seconds(ticks.nice),
            system: self.seconds(ticks.system),
        }
    }

    /// Converts clock ticks since boot to Unix seconds with two decimals, as in the examples of the documented API.
    pub(super) fn unix_seconds(self, ticks: u64) -> f64 {
        let whole = self.boot.saturating_add(ticks / self.ticks_per_second);
        let hundredths = ticks % self.ticks_per_second * 100 / self.ticks_per_second;
        float(whole.saturating_mul(100).saturating_add(hundredths)) / 100.0
    }

    pub(super) fn ticks_since_boot(self, proc: &Path) -> Result<u64, SampleError> {
        let uptime = Uptime::from_file(proc.join("uptime"))?.uptime_duration();
        let fraction = u64::from(uptime.subsec_micros()) * self.ticks_per_second / 1_000_000;
        Ok(uptime
            .as_secs()
            .saturating_mul(self.ticks_per_second)
            .saturating_add(fraction))
    }
}
