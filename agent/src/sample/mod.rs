//! Samples this VM and its processes from procfs, with the rows and units that the API contract defines.
//!
//! Every rate covers the time since the sampler's previous call; the first call only reads the counters. Rates and
//! percentages are rounded to one decimal and are never negative or infinite. If a counter decreased (a replaced
//! device, a driver reset), the rate is 0. A value that the kernel's files do not allow to compute is absent.

mod cgroup;
mod command_line;
mod devices;
mod ended;
mod exits;
mod filesystems;
mod owner;
mod proc_files;
mod processes;
mod reaped;
mod restriction;
mod system;
mod vm;

#[cfg(test)]
mod trees;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use procfs::ProcError;
use vmwatch_api::{
    InstanceId,
    measures::one_decimal,
    metrics::{FilesystemSample, Sample},
    time::UtcOffset,
};

pub use filesystems::FilesystemSampler;
pub use processes::{ProcessReading, ProcessSampler};
pub use vm::{VmReading, VmSampler};

use crate::select::Selection;

/// The folders that the agent reads; tests replace them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// The mount point of procfs, normally `/proc`.
    pub proc: PathBuf,
    /// The mount point of sysfs, normally `/sys`.
    pub sys: PathBuf,
    /// The root folder of the VM, which has `etc/passwd` and `var/log/containers`.
    pub root: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        // In a container that has the pid namespace of the VM, `/etc/passwd` is the container's.
        let root = Path::new("/proc/1/root");
        let is_readable = root.join("etc/passwd").exists();
        Self {
            proc: "/proc".into(),
            sys: "/sys".into(),
            root: if is_readable { root } else { Path::new("/") }.into(),
        }
    }
}

/// Why sampling failed.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// A file with statistics of the whole system is missing or unreadable.
    #[error("cannot read the kernel's statistics in /proc")]
    Kernel(#[from] ProcError),
    /// `/proc/stat` has no boot time, from which the start times of processes are computed.
    #[error("/proc/stat has no boot time")]
    NoBootTime,
    /// The list of processes cannot be read from procfs.
    #[error("cannot list the processes in /proc")]
    List(#[source] std::io::Error),
}

/// Time limit for the filesystems in [`Sampler::sample`].
const FILESYSTEM_LIMIT: Duration = Duration::from_secs(1);

/// The samplers of the VM, its processes and its filesystems. The sampling loop runs them separately, so a process whose
/// files in procfs block the reader does not delay the VM's row. [`Sampler::sample`] runs them one after the other.
#[derive(Debug)]
pub struct Sampler {
    instance_id: InstanceId,
    /// Samples the VM's row.
    pub vm: VmSampler,
    /// Samples the process rows.
    pub processes: ProcessSampler,
    /// Samples the filesystem rows.
    pub filesystems: FilesystemSampler,
}

impl Sampler {
    /// Creates the samplers. The only value read is the boot time.
    pub fn new(
        instance_id: InstanceId,
        utc_offset: UtcOffset,
        selection: Selection,
        roots: Roots,
    ) -> Result<Self, SampleError> {
        Ok(Self {
            instance_id,
            vm: VmSampler::new(utc_offset, roots.clone()),
            filesystems: FilesystemSampler::new(&roots),
            processes: ProcessSampler::new(selection, roots)?,
        })
    }

    /// Reports command lines as well, without secrets.
    #[must_use]
    pub fn with_command_lines(mut self) -> Self {
        self.processes.report_command_lines();
        self
    }

    /// Listens to the kernel's records of ended processes. Of the processes that no sample has seen, the `rows` with the
    /// highest CPU time in each sample get rows of their own. If the kernel does not report to the agent, the CPU time of
    /// these processes is estimated.
    #[must_use]
    pub fn with_exit_records(mut self, rows: usize) -> Self {
        self.processes.listen_to_exits(rows);
        self
    }

    /// Samples the VM, its processes and its filesystems. The first call only reads the counters and returns rates of 0.
    pub fn sample(&mut self) -> Result<Sample, SampleError> {
        let mut reading = self.vm.read()?;
        let processes = self.processes.read(reading.memory_bytes)?;
        reading.vm.lost_exit_records = processes.lost;
        let filesystems = self.filesystems.read(FILESYSTEM_LIMIT);
        Ok(reading.into_sample(&self.instance_id, processes, filesystems))
    }
}

impl VmReading {
    /// Creates a sample from the VM's values and those of its processes and filesystems.
    pub fn into_sample(
        self,
        instance_id: &InstanceId,
        processes: ProcessReading,
        filesystems: Vec<FilesystemSample>,
    ) -> Sample {
        Sample {
            instance_id: instance_id.clone(),
            create_date: self.create_date,
            part: 0,
            net_incoming: self.net_incoming,
            net_outgoing: self.net_outgoing,
            vm: Some(self.vm),
            vm_cpu: processes.vm_cpu,
            processes: processes.rows,
            sums: processes.sums,
            short_lived: processes.short_lived,
            filesystems,
        }
    }
}

fn kib_per_second(bytes: u64, elapsed: Duration) -> f64 {
    one_decimal(float(bytes) / 1024.0 / elapsed.as_secs_f64())
}

fn percent(part: f64, whole: f64) -> f64 {
    one_decimal(100.0 * part / whole)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact up to 9 PB, and rounded to one decimal afterwards"
)]
pub(crate) fn float(counter: u64) -> f64 {
    counter as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sampled_values_are_finite_nonnegative_and_have_one_decimal(part: f64, whole: f64, bytes: u64, nanos: u64) {
            for value in [percent(part, whole), kib_per_second(bytes, Duration::from_nanos(nanos))] {
                prop_assert!(value >= 0.0 && value.is_finite(), "{value}");
                prop_assert!(value > 1e15 || format!("{value:?}").split_once('.').unwrap().1.len() == 1, "{value}");
            }
        }
    }

    #[test]
    fn rates_and_percentages_have_documented_units() {
        assert_eq!(kib_per_second(128 * 1024, Duration::from_secs(10)), 12.8);
        assert_eq!(percent(1.0, 3.0), 33.3);
        assert_eq!(kib_per_second(1, Duration::ZERO), 0.0);
        assert_eq!(percent(0.0, 0.0), 0.0);
    }
}
