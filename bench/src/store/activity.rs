//! Generated VMs of whose processes a stated share is active.

use std::time::{Duration, SystemTime};

use vmwatch_api::{
    InstanceId,
    metrics::{CpuSeconds, ProcessOwner, ProcessSample, Sample, ShortLived, SystemSample, VmSample},
    time::{CreateDate, UtcOffset},
};

use crate::fleet::{Random, instance};

/// Number of processes of each VM.
pub(crate) const PROCESSES: u32 = 100;
/// Shares of active processes of the two generated fleets.
pub(crate) const ACTIVITIES: [f64; 2] = [0.15, 0.4];
/// Seconds between two samples of the processes.
const INTERVAL: f64 = 60.0;
/// When the oldest process started, in Unix seconds.
const STARTED: f64 = 1_700_000_000.0;
/// Number of cores of each VM.
const CORES: u32 = 4;
/// Share of the swap space that a VM uses at first, percent.
const SWAP: f64 = 3.0;
const NAMES: [&str; 20] = [
    "kworker/u8",
    "postgres",
    "nginx",
    "java",
    "python3",
    "sshd",
    "containerd-shim",
    "systemd",
    "bash",
    "node",
    "kworker/0:1",
    "redis-server",
    "dockerd",
    "rcu_tasks",
    "php-fpm",
    "gunicorn",
    "cron",
    "chronyd",
    "rsyslogd",
    "migration/0",
];

/// A VM with [`PROCESSES`] processes. The values of active processes change with each sample; the others have no CPU
/// usage and the same memory usage in all samples.
pub(crate) struct Vm {
    sample: Sample,
    active: usize,
    random: Random,
    offset: UtcOffset,
}

impl Vm {
    /// Creates the VM with this number. `activity` is the share of its active processes.
    pub(crate) fn new(number: u32, activity: f64, offset: UtcOffset) -> anyhow::Result<Self> {
        let mut random = Random::seeded(u64::from(number) + 1);
        let processes = (0..PROCESSES).map(|place| ProcessSample {
            cmd: name(place),
            pid: place * 37 + 1,
            cpu_util: 0.0,
            mem: tenth(random.unit() * 5.0),
            disk_read: 0.0,
            disk_write: 0.0,
            running_time: STARTED + (random.unit() * 1e6).round() / 100.0,
            cpu_seconds: Some(0.0),
            owner: owner(place),
            ..ProcessSample::default()
        });
        let sample = Sample {
            processes: processes.collect(),
            instance_id: instance(number).parse()?,
            create_date: CreateDate::at(SystemTime::UNIX_EPOCH, offset),
            part: 0,
            net_incoming: 0.0,
            net_outgoing: 0.0,
            vm_cpu: None,
            sums: Vec::new(),
            short_lived: Some(ShortLived::Recorded),
            filesystems: Vec::new(),
            vm: None,
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "at most all processes are active"
        )]
        let active = (activity * f64::from(PROCESSES)).round() as usize;
        Ok(Self {
            sample,
            active,
            random,
            offset,
        })
    }

    pub(crate) const fn id(&self) -> &InstanceId {
        &self.sample.instance_id
    }

    /// Gives the last process another name.
    pub(crate) fn rename_last(&mut self, name: &str) {
        if let Some(last) = self.sample.processes.last_mut() {
            name.clone_into(&mut last.cmd);
        }
    }

    /// The next sample, taken at the given time, with the row of the VM. `processes` says whether it has rows of
    /// processes.
    pub(crate) fn sample(&mut self, at: SystemTime, processes: bool) -> Sample {
        self.change(at);
        let rows = if processes {
            self.sample.processes.clone()
        } else {
            Vec::new()
        };
        Sample {
            processes: rows,
            instance_id: self.sample.instance_id.clone(),
            create_date: self.sample.create_date.clone(),
            vm: self.sample.vm.clone(),
            vm_cpu: self.sample.vm_cpu.filter(|_| processes),
            short_lived: self.sample.short_lived.filter(|_| processes),
            sums: Vec::new(),
            filesystems: Vec::new(),
            ..self.sample
        }
    }

    /// The next sample, with rows of the VM and its processes.
    pub(crate) fn next(&mut self, at: SystemTime) -> &Sample {
        self.change(at);
        &self.sample
    }

    fn change(&mut self, at: SystemTime) {
        let (sample, random) = (&mut self.sample, &mut self.random);
        // Agents sample within milliseconds of the minute.
        let at = at + Duration::from_micros(random.below(1500) as u64);
        sample.create_date = CreateDate::at(at, self.offset);
        let mut total = 0.0;
        for process in sample.processes.iter_mut().take(self.active) {
            process.cpu_util = tenth(random.unit() * random.unit() * 40.0);
            let seconds = hundredth(process.cpu_util * INTERVAL / 100.0);
            process.cpu_seconds = Some(seconds);
            total += seconds;
            process.mem = tenth((process.mem + (random.unit() - 0.5) * 0.2).abs());
            let writes = random.below(5) == 0;
            process.disk_write = if writes { tenth(random.unit() * 500.0) } else { 0.0 };
        }
        sample.net_incoming = tenth(random.unit() * 300.0);
        sample.net_outgoing = tenth(random.unit() * 900.0);
        sample.vm_cpu = Some(CpuSeconds {
            user: hundredth(total * 0.7),
            nice: 0.0,
            system: hundredth(total * 0.3),
        });
        let cpu_util = tenth(random.unit() * 30.0);
        let swap = sample.vm.as_ref().and_then(|vm| vm.system.swap);
        sample.vm = Some(VmSample {
            cpu_util: Some(cpu_util),
            mem: Some(tenth(40.0 + random.unit())),
            disk_read: tenth(random.unit() * 20.0),
            disk_write: tenth(random.unit() * 800.0),
            proc: Some(PROCESSES),
            system: system(random, cpu_util, swap.unwrap_or(SWAP)),
            ..VmSample::default()
        });
    }
}

/// The name of the process in this place. Half of the names are shared by several processes of a VM.
pub(crate) fn name(place: u32) -> String {
    let name = NAMES
        .get(place as usize % NAMES.len())
        .copied()
        .unwrap_or_default();
    if place < PROCESSES / 2 {
        return name.to_owned();
    }
    // The kernel cuts names after 15 bytes.
    let mut name = format!("{name}-{place}");
    name.truncate(15);
    name
}

/// The owner of the process in this place: the kernel, or one of some services.
fn owner(place: u32) -> ProcessOwner {
    let (user, parent, unit) = match place % 4 {
        0 => ("root", 2, None),
        1 => ("postgres", 1851, Some("postgresql@15-main.service".to_owned())),
        _ => ("root", 1, Some(format!("systemd-unit-{place}.service"))),
    };
    ProcessOwner {
        user: Some(user.to_owned()),
        parent_pid: Some(parent),
        unit,
        ..ProcessOwner::default()
    }
}

/// Measures of a VM with some load: processes rarely wait for memory or disks, the hypervisor rarely takes CPU time, and
/// the swap space in use rarely changes.
fn system(random: &mut Random, cpu_util: f64, swap: f64) -> SystemSample {
    let change = if random.below(100) == 0 {
        random.unit() - 0.5
    } else {
        0.0
    };
    let mut rarely = |one_in, most: f64| {
        let value = tenth(random.unit() * most);
        if random.below(one_in) == 0 { value } else { 0.0 }
    };
    SystemSample {
        cores: Some(CORES),
        steal: Some(rarely(20, 2.0)),
        load: Some(hundredth(cpu_util / 100.0 * f64::from(CORES) + rarely(3, 0.5))),
        swap: Some(tenth((swap + change).clamp(0.0, 100.0))),
        pressure_cpu: Some(tenth(cpu_util / 20.0 + rarely(2, 1.0))),
        pressure_mem: Some(rarely(100, 1.0)),
        pressure_io: Some(rarely(4, 5.0)),
    }
}

/// Rounds to two decimals, which clock ticks have.
fn hundredth(number: f64) -> f64 {
    (number * 100.0).round() / 100.0
}

/// Rounds to one decimal, as agents do.
fn tenth(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}
