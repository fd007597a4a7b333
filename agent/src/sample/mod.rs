//! What this VM and its processes do, from procfs, as the rows and units of the contract.
//!
//! Every rate is taken over the time since the sampler's previous reading; the first reading only primes them.
//! Rates and shares are rounded to one decimal and are never negative or infinite: a counter that went backwards
//! (a device replaced, a driver reset) gives 0.

mod devices;
mod proc_files;
mod processes;
mod vm;

use std::{path::PathBuf, time::Duration};

use procfs::ProcError;
use shared::{
    api::{
        InstanceId,
        metrics::{ProcessSample, Sample},
    },
    time::UtcOffset,
};

pub use processes::ProcessSampler;
pub use vm::{VmReading, VmSampler};

use crate::select::Selection;

/// Where the kernel's pseudo file systems are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys`.
    pub sys: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }
}

/// A sample could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// A file of the whole machine is missing or unreadable.
    #[error("the kernel's statistics cannot be read")]
    Kernel(#[from] ProcError),
    /// The list of processes cannot be read.
    #[error("the list of processes cannot be read")]
    List(#[source] std::io::Error),
}

/// Both samplers. The agent's loop runs each on its own, so that a process whose files hang does not take the
/// VM's own row with it; who has no such worry takes whole samples here.
#[derive(Debug)]
pub struct Sampler {
    instance_id: InstanceId,
    /// Of the VM's own row.
    pub vm: VmSampler,
    /// Of the process rows.
    pub processes: ProcessSampler,
}

impl Sampler {
    /// Samplers of this machine that have read nothing yet but its boot time.
    pub fn new(
        instance_id: InstanceId,
        utc_offset: UtcOffset,
        selection: Selection,
        roots: Roots,
    ) -> Result<Self, SampleError> {
        Ok(Self {
            instance_id,
            vm: VmSampler::new(utc_offset, roots.clone()),
            processes: ProcessSampler::new(selection, roots.proc)?,
        })
    }

    /// The VM's row and the process rows. The first call primes the rates, which are 0 in what it gives.
    pub fn sample(&mut self) -> Result<Sample, SampleError> {
        let reading = self.vm.read()?;
        let processes = self.processes.read(reading.memory_bytes)?;
        Ok(reading.into_sample(&self.instance_id, processes))
    }
}

impl VmReading {
    /// The sample of this reading.
    pub fn into_sample(self, instance_id: &InstanceId, processes: Vec<ProcessSample>) -> Sample {
        Sample {
            instance_id: instance_id.clone(),
            create_date: self.create_date,
            net_incoming: self.net_incoming,
            net_outgoing: self.net_outgoing,
            vm: Some(self.vm),
            processes,
        }
    }
}

/// A rate in KiB/s.
fn kib_per_second(bytes: u64, elapsed: Duration) -> f64 {
    one_decimal(float(bytes) / 1024.0 / elapsed.as_secs_f64())
}

/// A share in percent.
fn percent(part: f64, whole: f64) -> f64 {
    one_decimal(100.0 * part / whole)
}

/// Rounded as in the document's samples; 0 where nothing elapsed or there is no whole.
fn one_decimal(value: f64) -> f64 {
    let rounded = (value * 10.0).round() / 10.0;
    if rounded.is_finite() && rounded > 0.0 {
        rounded
    } else {
        0.0
    }
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
        fn a_figure_is_a_number_of_one_decimal_and_not_negative(part: f64, whole: f64, bytes: u64, nanos: u64) {
            for figure in [percent(part, whole), kib_per_second(bytes, Duration::from_nanos(nanos))] {
                prop_assert!(figure >= 0.0 && figure.is_finite(), "{figure}");
                prop_assert!(figure > 1e15 || format!("{figure:?}").split_once('.').unwrap().1.len() == 1, "{figure}");
            }
        }
    }

    #[test]
    fn units_are_those_of_the_contract() {
        assert_eq!(kib_per_second(128 * 1024, Duration::from_secs(10)), 12.8);
        assert_eq!(percent(1.0, 3.0), 33.3);
        assert_eq!(kib_per_second(1, Duration::ZERO), 0.0);
        assert_eq!(percent(0.0, 0.0), 0.0);
    }
}
