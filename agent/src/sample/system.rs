//! Parses `/proc/stat` and `/proc/meminfo`, which describe the whole VM.
//!
//! A field that the kernel does not report costs only the values that need it. The `procfs` crate is not used, because it
//! refuses a file as a whole if any of its fields is missing.

use std::{fs, io, path::Path};

use procfs::ProcError;

use super::{SampleError, float, percent};

/// The values of `/proc/stat`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SystemStat {
    pub(super) ticks: CpuTicks,
    /// The numbers of the CPUs that are online.
    online: Vec<u32>,
    /// Boot time in Unix seconds.
    pub(super) boot: Option<u64>,
}

/// CPU time of all CPUs since boot, in clock ticks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct CpuTicks {
    /// Includes the time of guests (proc(5)).
    pub(super) user: u64,
    pub(super) nice: u64,
    pub(super) system: u64,
    idle: u64,
    iowait: u64,
    irq: u64,
    softirq: u64,
    steal: u64,
}

impl SystemStat {
    pub(super) fn read(proc: &Path) -> Result<Self, SampleError> {
        let file = fs::read(proc.join("stat")).map_err(ProcError::from)?;
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "/proc/stat has no CPU times");
        Ok(Self::parse(&file).ok_or_else(invalid).map_err(ProcError::from)?)
    }

    /// Parses the content of `/proc/stat`; `None` if it has no CPU times.
    fn parse(file: &[u8]) -> Option<Self> {
        let mut stat = Self::default();
        let mut ticks = None;
        for line in file.split(|&byte| byte == b'\n') {
            let mut words = line.split(|&byte| byte == b' ').filter(|word| !word.is_empty());
            match words.next() {
                Some(b"cpu") => ticks = CpuTicks::parse(words),
                Some(b"btime") => stat.boot = words.next().and_then(number),
                Some(word) => {
                    let cpu = word.strip_prefix(b"cpu").and_then(number);
                    stat.online.extend(cpu.and_then(|cpu| u32::try_from(cpu).ok()));
                }
                None => {}
            }
        }
        stat.ticks = ticks?;
        Some(stat)
    }

    /// The percentage of busy CPU time since an earlier reading. `None` if the idle time decreased, or if CPUs were
    /// added or removed: the kernel then counts the idle time of these CPUs in another way.
    ///
    /// Time spent waiting for I/O counts as idle, because the CPU could have worked. Stolen time counts as busy, because
    /// there was work but the hypervisor did not run it. psutil, which the agents of 2017 used, counts in the same way.
    pub(super) fn busy_since(&self, earlier: &Self) -> Option<f64> {
        if self.online != earlier.online || self.ticks.idle < earlier.ticks.idle {
            return None;
        }
        let passed = self.ticks.since(&earlier.ticks);
        let sum = |parts: &[u64]| parts.iter().copied().map(float).sum::<f64>();
        let busy = sum(&[
            passed.user,
            passed.nice,
            passed.system,
            passed.irq,
            passed.softirq,
            passed.steal,
        ]);
        Some(percent(busy, busy + sum(&[passed.idle, passed.iowait])))
    }
}

impl CpuTicks {
    /// Parses the numbers after `cpu`. Old kernels report only the first four.
    fn parse<'a>(words: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let mut fields = words.map(number);
        let mut required = || fields.next().flatten();
        let (user, nice, system, idle) = (required()?, required()?, required()?, required()?);
        let mut optional = || required().unwrap_or(0);
        Some(Self {
            user,
            nice,
            system,
            idle,
            iowait: optional(),
            irq: optional(),
            softirq: optional(),
            steal: optional(),
        })
    }

    /// The increase of each field since an earlier reading; 0 for a field that decreased.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        Self {
            user: self.user.saturating_sub(earlier.user),
            nice: self.nice.saturating_sub(earlier.nice),
            system: self.system.saturating_sub(earlier.system),
            idle: self.idle.saturating_sub(earlier.idle),
            iowait: self.iowait.saturating_sub(earlier.iowait),
            irq: self.irq.saturating_sub(earlier.irq),
            softirq: self.softirq.saturating_sub(earlier.softirq),
            steal: self.steal.saturating_sub(earlier.steal),
        }
    }
}

/// The memory of the VM in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) total: Option<u64>,
    available: Option<u64>,
}

impl Memory {
    pub(super) fn read(proc: &Path) -> Result<Self, SampleError> {
        let file = fs::read(proc.join("meminfo")).map_err(ProcError::from)?;
        Ok(Self::parse(&file))
    }

    fn parse(file: &[u8]) -> Self {
        let bytes = |key: &[u8]| {
            let value = file
                .split(|&byte| byte == b'\n')
                .find_map(|line| line.strip_prefix(key))?;
            let kib = value.trim_ascii().split(|&byte| byte == b' ').next()?;
            number(kib)?.checked_mul(1024)
        };
        // Kernels before 3.14 do not report MemAvailable.
        let estimate = || {
            let parts = [bytes(b"MemFree:")?, bytes(b"Buffers:")?, bytes(b"Cached:")?];
            Some(parts.into_iter().fold(0, u64::saturating_add))
        };
        Self {
            total: bytes(b"MemTotal:"),
            available: bytes(b"MemAvailable:").or_else(estimate),
        }
    }

    /// The percentage of memory in use; `None` if the kernel does not report enough to compute it.
    pub(super) fn used(&self) -> Option<f64> {
        let total = self.total.filter(|total| *total > 0)?;
        Some(percent(
            float(total.saturating_sub(self.available?)),
            float(total),
        ))
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn cpu_times_online_cpus_and_boot_time_are_parsed() {
        let file =
            b"cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 2 3 4\ncpu2 0 0 0 0\nintr 9 9\nctxt 1\nbtime 1482236500\n";
        let stat = SystemStat::parse(file).unwrap();
        assert_eq!((stat.boot, stat.online), (Some(1_482_236_500), vec![0, 2]));
        let ticks = stat.ticks;
        assert_eq!((ticks.user, ticks.nice, ticks.system, ticks.idle), (1, 2, 3, 4));
        assert_eq!(
            (ticks.iowait, ticks.irq, ticks.softirq, ticks.steal),
            (5, 6, 7, 8)
        );
        // Linux 2.4 reports four numbers.
        let old = SystemStat::parse(b"cpu 1 2 3 4\n").unwrap();
        assert_eq!((old.ticks.idle, old.ticks.steal, old.boot), (4, 0, None));
        for malformed in ["", "cpu\n", "cpu 1 2 3\n", "cpu x 2 3 4\n", "cpu0 1 2 3 4\n"] {
            assert_eq!(SystemStat::parse(malformed.as_bytes()), None, "{malformed}");
        }
    }

    proptest! {
        #[test]
        fn parsing_arbitrary_system_files_does_not_panic(file in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = SystemStat::parse(&file).map(|stat| stat.busy_since(&stat));
            let _ = Memory::parse(&file).used();
        }
    }
}
