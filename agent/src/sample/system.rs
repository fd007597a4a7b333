//! Parses `/proc/stat`, `/proc/meminfo`, `/proc/loadavg` and `/proc/pressure`, which describe the whole VM.
//!
//! A field that the kernel does not report costs only the values that need it. The `procfs` crate is not used, because it
//! refuses a file as a whole if any of its fields is missing.

use std::{fs, io, path::Path, time::Duration};

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
        let passed = self.passed_since(earlier)?;
        let total = passed.total();
        Some(percent(total - float(passed.idle) - float(passed.iowait), total))
    }

    /// The percentage of stolen CPU time since an earlier reading, with the same restrictions.
    pub(super) fn stolen_since(&self, earlier: &Self) -> Option<f64> {
        let passed = self.passed_since(earlier)?;
        Some(percent(float(passed.steal), passed.total()))
    }

    fn passed_since(&self, earlier: &Self) -> Option<CpuTicks> {
        let is_comparable = self.online == earlier.online && self.ticks.idle >= earlier.ticks.idle;
        is_comparable.then(|| self.ticks.since(&earlier.ticks))
    }

    /// The number of CPUs that are online; `None` if the kernel does not list them.
    pub(super) fn cores(&self) -> Option<u32> {
        u32::try_from(self.online.len()).ok().filter(|cores| *cores > 0)
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

    fn total(&self) -> f64 {
        let parts = [
            self.user,
            self.nice,
            self.system,
            self.idle,
            self.iowait,
            self.irq,
            self.softirq,
            self.steal,
        ];
        parts.into_iter().map(float).sum()
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
    swap_total: Option<u64>,
    swap_free: Option<u64>,
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
            swap_total: bytes(b"SwapTotal:"),
            swap_free: bytes(b"SwapFree:"),
        }
    }

    /// The percentage of swap space in use; `None` if the VM has no swap space.
    pub(super) fn swap_used(&self) -> Option<f64> {
        let total = self.swap_total.filter(|total| *total > 0)?;
        Some(percent(
            float(total.saturating_sub(self.swap_free?)),
            float(total),
        ))
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

/// Reads the load average of one minute; `None` if the kernel does not report it.
pub(super) fn load(proc: &Path) -> Option<f64> {
    let file = fs::read_to_string(proc.join("loadavg")).ok()?;
    let load: f64 = file.split(' ').next()?.parse().ok()?;
    (load.is_finite() && load >= 0.0).then_some(load)
}

/// For how long some process has waited for each resource since boot; `None` where the kernel does not report it: it is
/// older than 4.20, or pressure stall information is switched off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Pressure {
    cpu: Option<Duration>,
    memory: Option<Duration>,
    io: Option<Duration>,
}

/// The share of the time in which some process waited for each resource, percent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct PressureShares {
    pub(super) cpu: Option<f64>,
    pub(super) memory: Option<f64>,
    pub(super) io: Option<f64>,
}

impl Pressure {
    pub(super) fn read(proc: &Path) -> Self {
        let waited = |resource: &str| {
            let file = fs::read_to_string(proc.join("pressure").join(resource)).ok()?;
            Self::parse(&file)
        };
        Self {
            cpu: waited("cpu"),
            memory: waited("memory"),
            io: waited("io"),
        }
    }

    /// Parses `total` of the line `some avg10=0.12 avg60=0.05 avg300=0.01 total=34620203336`, in microseconds.
    fn parse(file: &str) -> Option<Duration> {
        let line = file.lines().find_map(|line| line.strip_prefix("some "))?;
        let total = line.split(' ').find_map(|word| word.strip_prefix("total="))?;
        Some(Duration::from_micros(total.parse().ok()?))
    }

    /// The shares since an earlier reading; 0 if the counter decreased.
    pub(super) fn since(&self, earlier: &Self, elapsed: Duration) -> PressureShares {
        let share = |now: Option<Duration>, then: Option<Duration>| {
            let waited = now?.saturating_sub(then?);
            // The counter is read a little later than the clock, so it can run ahead of it.
            Some(percent(waited.as_secs_f64(), elapsed.as_secs_f64()).min(100.0))
        };
        PressureShares {
            cpu: share(self.cpu, earlier.cpu),
            memory: share(self.memory, earlier.memory),
            io: share(self.io, earlier.io),
        }
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

    #[test]
    fn pressure_is_the_share_of_time_with_waiting_processes() {
        let waited = |micros| Pressure {
            cpu: Pressure::parse(&format!(
                "some avg10=9.00 avg60=0.00 avg300=0.00 total={micros}\nfull total=5\n"
            )),
            ..Pressure::default()
        };
        let share = |from, to| waited(to).since(&waited(from), Duration::from_secs(2)).cpu;
        assert_eq!(share(1_000_000, 1_500_000), Some(25.0));
        assert_eq!(share(0, 2_000_500), Some(100.0));
        assert_eq!(share(9, 0), Some(0.0));
        assert_eq!(waited(1).since(&waited(0), Duration::from_secs(2)).io, None);
        for malformed in ["", "some total=x", "full total=1", "some avg10=0.00"] {
            assert_eq!(Pressure::parse(malformed), None, "{malformed}");
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
