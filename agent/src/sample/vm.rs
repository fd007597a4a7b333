//! Samples the VM's own row: usage of CPU, memory, disks and network.

use std::time::{Duration, Instant, SystemTime};

use procfs::{DiskStats, FromRead, net::InterfaceDeviceStatus};
use vmwatch_api::{
    metrics::{SystemSample, VmSample},
    time::{CreateDate, UtcOffset},
};

use super::{
    Roots, SampleError,
    devices::{Devices, Traffic, disk_class, interface_class, master},
    kib_per_second,
    proc_files::process_ids,
    restriction::Restricted,
    system::{Memory, Pressure, SystemStat, load},
};

/// The kernel counts disk traffic in sectors of 512 bytes, whatever the disk's own sector size is
/// (Documentation/block/stat.rst).
const SECTOR_BYTES: u64 = 512;

/// Samples the VM's own row.
#[derive(Debug)]
pub struct VmSampler {
    utc_offset: UtcOffset,
    roots: Roots,
    previous: Option<Previous>,
    restricted: Restricted,
    disks: Devices,
    interfaces: Devices,
}

/// The counters of the previous sample.
#[derive(Debug)]
struct Previous {
    at: Instant,
    stat: SystemStat,
    pressure: Pressure,
}

/// The VM's own values at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct VmReading {
    /// The time of the sample, which all of its rows share.
    pub create_date: CreateDate,
    /// Network receive rate, KiB/s.
    pub net_incoming: f64,
    /// Network transmit rate, KiB/s.
    pub net_outgoing: f64,
    /// The VM's own row.
    pub vm: VmSample,
    /// Total memory of the VM in bytes, or 0 if it is unknown; the memory usage of processes is a percentage of it.
    pub memory_bytes: u64,
}

impl VmSampler {
    /// Creates a VM sampler without reading anything.
    pub fn new(utc_offset: UtcOffset, roots: Roots) -> Self {
        Self {
            utc_offset,
            roots,
            previous: None,
            restricted: Restricted::default(),
            disks: Devices::default(),
            interfaces: Devices::default(),
        }
    }

    /// Reads the VM's own row. The first call only reads the counters: it returns rates of 0 and no CPU usage.
    pub fn read(&mut self) -> Result<VmReading, SampleError> {
        let create_date = CreateDate::at(SystemTime::now(), self.utc_offset);
        let now = Instant::now();
        let stat = SystemStat::read(&self.roots.proc)?;
        let memory = Memory::read(&self.roots.proc)?;
        let pressure = Pressure::read(&self.roots.proc);
        let disk = self.disk_traffic()?;
        let net = self.net_traffic()?;
        let restricted = self.restricted.check(&self.roots.proc);
        // The number of the processes that the agent sees would be mistaken for the number of all processes.
        let proc = match restricted {
            Some(_) => None,
            None => Some(u32::try_from(process_ids(&self.roots.proc)?.len()).unwrap_or(u32::MAX)),
        };
        // Without a previous sample, an infinite interval makes every rate 0.
        let previous = self.previous.as_ref();
        let elapsed = previous.map_or(Duration::MAX, |previous| now - previous.at);
        let cpu_util = previous.and_then(|previous| stat.busy_since(&previous.stat));
        let waited = previous.map(|previous| pressure.since(&previous.pressure, elapsed));
        let waited = waited.unwrap_or_default();
        let system = SystemSample {
            cores: stat.cores(),
            steal: previous.and_then(|previous| stat.stolen_since(&previous.stat)),
            load: load(&self.roots.proc),
            swap: memory.swap_used(),
            pressure_cpu: waited.cpu,
            pressure_mem: waited.memory,
            pressure_io: waited.io,
        };
        self.previous = Some(Previous {
            at: now,
            stat,
            pressure,
        });
        Ok(VmReading {
            create_date,
            net_incoming: kib_per_second(net.inward, elapsed),
            net_outgoing: kib_per_second(net.outward, elapsed),
            vm: VmSample {
                cpu_util,
                mem: memory.used(),
                disk_read: kib_per_second(disk.inward, elapsed),
                disk_write: kib_per_second(disk.outward, elapsed),
                proc,
                restricted,
                system,
                dropped_parts: 0,
                lost_exit_records: 0,
            },
            memory_bytes: memory.total.unwrap_or(0),
        })
    }

    fn disk_traffic(&mut self) -> Result<Traffic, SampleError> {
        let DiskStats(disks) = DiskStats::from_file(self.roots.proc.join("diskstats"))?;
        let totals = disks.iter().map(|disk| {
            let total = Traffic {
                inward: disk.sectors_read.saturating_mul(SECTOR_BYTES),
                outward: disk.sectors_written.saturating_mul(SECTOR_BYTES),
            };
            (disk.name.as_str(), total)
        });
        Ok(self
            .disks
            .advance(totals, |name| disk_class(&self.roots.sys, name), |_| None))
    }

    fn net_traffic(&mut self) -> Result<Traffic, SampleError> {
        let InterfaceDeviceStatus(interfaces) =
            InterfaceDeviceStatus::from_file(self.roots.proc.join("net/dev"))?;
        let totals = interfaces.values().map(|interface| {
            let total = Traffic {
                inward: interface.recv_bytes,
                outward: interface.sent_bytes,
            };
            (interface.name.as_str(), total)
        });
        let sys = &self.roots.sys;
        let class_of = |name: &str| interface_class(sys, name);
        Ok(self
            .interfaces
            .advance(totals, class_of, |name| master(sys, name)))
    }
}

#[cfg(test)]
impl VmSampler {
    /// Makes the previous sample seem older.
    pub(super) fn age(&mut self, by: Duration) {
        if let Some(previous) = &mut self.previous {
            previous.at = previous.at.checked_sub(by).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fake `/proc` and `/sys` in a temporary folder, with one disk, a partition, two virtual disks and three network
    /// interfaces.
    struct FakeVm(tempfile::TempDir);

    impl FakeVm {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in [
                "proc/net",
                "proc/1",
                "proc/42",
                "proc/self",
                "sys/block/vda/device",
                "sys/class/net/eth0/device",
            ] {
                std::fs::create_dir_all(dir.path().join(name)).unwrap();
            }
            let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
            let meminfo: String = meminfo
                .lines()
                .map(|line| match line.split_once(':').unwrap().0 {
                    "MemTotal" => "MemTotal: 1000 kB\n".to_owned(),
                    "MemAvailable" => "MemAvailable: 914 kB\n".to_owned(),
                    _ => format!("{line}\n"),
                })
                .collect();
            std::fs::write(dir.path().join("proc/meminfo"), meminfo).unwrap();
            std::fs::write(dir.path().join("proc/1/stat"), "").unwrap();
            Self(dir)
        }

        fn set(&self, cpu: &str, sectors: (u64, u64), net: (u64, u64)) {
            let stat = format!("cpu  {cpu}\ncpu0 {cpu}\nintr 1\nctxt 1\nbtime 1482236500\nprocesses 1\n");
            let (read, written) = sectors;
            let disk = |name: &str| format!("   8  0 {name} 1 0 {read} 0 1 0 {written} 0 0 0 0\n");
            let (received, sent) = net;
            let interface = |name: &str| format!("  {name}: {received} 1 0 0 0 0 0 0 {sent} 1 0 0 0 0 0 0\n");
            let write = |name: &str, text: String| {
                std::fs::write(self.0.path().join("proc").join(name), text).unwrap();
            };
            write("stat", stat);
            write("diskstats", ["vda", "vda1", "dm-0", "loop0"].map(disk).concat());
            write(
                "net/dev",
                format!(
                    "head\nhead\n{}",
                    ["lo", "eth0", "docker0"].map(interface).concat()
                ),
            );
        }

        fn sampler(&self) -> VmSampler {
            let roots = Roots {
                proc: self.0.path().join("proc"),
                sys: self.0.path().join("sys"),
                root: self.0.path().to_owned(),
            };
            VmSampler::new("+08:00".parse().unwrap(), roots)
        }
    }

    #[test]
    fn vm_rates_are_zero_in_first_sample_and_measured_in_second_sample() {
        let vm = FakeVm::new();
        let mut sampler = vm.sampler();
        vm.set("100 10 50 1000 40 5 5 0 0 0", (1000, 2000), (10_000, 20_000));
        let first = sampler.read().unwrap();
        assert_eq!(
            (first.vm.cpu_util, first.vm.disk_read, first.net_incoming),
            (None, 0.0, 0.0)
        );
        assert_eq!(
            (first.vm.mem, first.vm.proc, first.memory_bytes),
            (Some(8.6), Some(2), 1000 * 1024)
        );

        sampler.age(Duration::from_secs(10_000));
        // Of 100 ticks, 20 are user time, 5 stolen, 15 idle and 60 waiting for I/O, so the CPU was busy for 25 %.
        // Two sectors are 1 KiB.
        vm.set(
            "120 10 50 1015 100 5 5 5 0 0",
            (1000 + 2_560_000, 2000),
            (10_000 + 6_144_000, 20_000 + 58_368_000),
        );
        let second = sampler.read().unwrap();
        assert_eq!(second.vm.cpu_util, Some(25.0));
        assert_eq!(
            (second.vm.system.cores, second.vm.system.steal),
            (Some(1), Some(5.0))
        );
        assert_eq!((second.vm.disk_read, second.vm.disk_write), (128.0, 0.0));
        assert_eq!((second.net_incoming, second.net_outgoing), (0.6, 5.7));
        assert!(second.create_date > first.create_date);
    }

    #[test]
    fn decreased_vm_counters_give_rates_of_zero() {
        let vm = FakeVm::new();
        let mut sampler = vm.sampler();
        vm.set("100 10 50 1000 40 5 5 0 0 0", (1000, 2000), (10_000, 20_000));
        sampler.read().unwrap();
        sampler.age(Duration::from_secs(10_000));
        vm.set("90 10 50 900 40 5 5 0 0 0", (1, 2), (3, 4));
        let reading = sampler.read().unwrap();
        assert_eq!(reading.vm.cpu_util, None);
        let rates = [
            reading.vm.disk_read,
            reading.vm.disk_write,
            reading.net_incoming,
            reading.net_outgoing,
        ];
        assert_eq!(rates, [0.0; 4]);
    }

    #[test]
    fn missing_kernel_statistics_fail_only_the_current_vm_sample() {
        let vm = FakeVm::new();
        let mut sampler = vm.sampler();
        assert!(matches!(sampler.read(), Err(SampleError::Kernel(_))));
        vm.set("1 1 1 1 1 1 1 1 1 1", (0, 0), (0, 0));
        sampler.read().unwrap();
    }
}
