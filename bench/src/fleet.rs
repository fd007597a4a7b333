//! Generates samples like those of agents with the default settings: VM rows every 10 s, and process rows every minute.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmwatch_api::{
    InstanceId,
    metrics::{ProcessSample, Sample, VmSample},
    time::{CreateDate, UtcOffset},
};

/// The default of `VMWATCH_AGENT_VM_INTERVAL`.
pub(crate) const VM_INTERVAL: Duration = Duration::from_secs(10);
/// The default of `VMWATCH_AGENT_PROCESS_INTERVAL`.
pub(crate) const PROCESS_INTERVAL: Duration = Duration::from_mins(1);
pub(crate) const VM_SAMPLES_PER_MINUTE: u32 = 6;
const NAMES: [&str; 12] = [
    "systemd",
    "kworker/u8:3-ev",
    "sshd",
    "nginx",
    "postgres",
    "java",
    "python3",
    "containerd",
    "dockerd",
    "bash",
    "cron",
    "chronyd",
];

/// A fleet of VMs that all have the same number of processes.
#[derive(Debug)]
pub(crate) struct Fleet {
    instances: Vec<InstanceId>,
    processes: u32,
    random: Random,
}

impl Fleet {
    pub(crate) fn new(vms: u32, processes: u32) -> anyhow::Result<Self> {
        let instances = (0..vms).map(|vm| instance(vm).parse());
        Ok(Self {
            instances: instances.collect::<Result<_, _>>()?,
            processes,
            random: Random::new(),
        })
    }

    /// Returns the samples of one minute, in the order in which they would arrive.
    pub(crate) fn minute(&mut self, start: SystemTime, offset: UtcOffset) -> Vec<Sample> {
        let mut samples = Vec::new();
        for step in 0..VM_SAMPLES_PER_MINUTE {
            for vm in 0..self.instances.len() {
                let Some(instance) = self.instances.get(vm).cloned() else {
                    continue;
                };
                // No two agents sample in the same microsecond.
                let moment = start + VM_INTERVAL * step + Duration::from_micros(7919 * vm as u64);
                let count = if step == 0 { self.processes } else { 0 };
                samples.push(sample(
                    &mut self.random,
                    instance,
                    CreateDate::at(moment, offset),
                    count,
                ));
            }
        }
        samples
    }
}

/// Returns the id of a VM of the fleet.
pub(crate) fn instance(vm: u32) -> String {
    format!("6abf5a1e-b85c-4e5f-ba02-{vm:012x}")
}

/// Returns a sample taken at the given time, with or without the row of the VM itself.
pub(crate) fn sample_at(
    id: &InstanceId,
    at: SystemTime,
    offset: UtcOffset,
    vm: bool,
    processes: u32,
) -> Sample {
    let mut random = Random(
        u64::from(
            at.duration_since(UNIX_EPOCH)
                .map_or(1, |since| since.subsec_micros()),
        ) | 1,
    );
    let mut sample = sample(&mut random, id.clone(), CreateDate::at(at, offset), processes);
    if !vm {
        sample.vm = None;
    }
    sample
}

/// Returns a sample of random values, rounded to one decimal as agents do.
fn sample(random: &mut Random, instance_id: InstanceId, create_date: CreateDate, processes: u32) -> Sample {
    Sample {
        instance_id,
        create_date,
        part: 0,
        net_incoming: random.tenths(20_000),
        net_outgoing: random.tenths(20_000),
        vm_cpu: None,
        sums: Vec::new(),
        short_lived: None,
        filesystems: Vec::new(),
        vm: Some(VmSample {
            cpu_util: Some(random.tenths(1000)),
            mem: Some(random.tenths(1000)),
            disk_read: random.tenths(50_000),
            disk_write: random.tenths(50_000),
            proc: Some(95),
            ..VmSample::default()
        }),
        processes: (0..processes).map(|index| process(random, index)).collect(),
    }
}

fn process(random: &mut Random, index: u32) -> ProcessSample {
    let name = NAMES
        .get(index as usize % NAMES.len())
        .copied()
        .unwrap_or_default();
    ProcessSample {
        cmd: name.to_owned(),
        pid: 300 + 7 * index,
        cpu_util: random.tenths(100),
        mem: random.tenths(80),
        disk_read: 0.0,
        disk_write: random.tenths(300),
        running_time: 1_482_236_515.63 + f64::from(index) / 100.0,
        ..ProcessSample::default()
    }
}

/// Marsaglia's xorshift generator with a fixed seed, so that every run has the same numbers.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new() -> Self {
        Self(1)
    }

    /// A generator whose numbers depend on a seed.
    pub(crate) const fn seeded(seed: u64) -> Self {
        // The multiplication spreads the bits of small seeds; the generator requires a number other than 0.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Returns a number from 0 up to, but not including, 1.
    pub(crate) fn unit(&mut self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "53 bits are exact in a double")]
        let number = (self.next() >> 11) as f64;
        number / 9_007_199_254_740_992.0
    }

    const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns a number from 0 up to, but not including, `below` tenths.
    fn tenths(&mut self, below: u32) -> f64 {
        let tenths = u32::try_from(self.next() % u64::from(below)).unwrap_or(0);
        f64::from(tenths) / 10.0
    }

    /// Returns a number from 0 up to, but not including, `below`; 0 if `below` is 0.
    pub(crate) fn below(&mut self, below: usize) -> usize {
        let number = self.next() % (below as u64).max(1);
        usize::try_from(number).unwrap_or(0)
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            items.swap(index, self.below(index + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use metrics_svc::documents::Documents;

    use super::*;

    #[test]
    fn generated_rows_are_valid_and_distinct() {
        let mut fleet = Fleet::new(20, 30).unwrap();
        let offset = "+08:00".parse().unwrap();
        let now = SystemTime::now();
        let mut ids = HashSet::new();
        for sample in fleet.minute(now, offset) {
            let documents = Documents::from_sample(&sample, offset, now).unwrap();
            let rows = documents.vms.iter().chain(&documents.processes);
            ids.extend(rows.map(|row| row.get_object_id("_id").unwrap()));
        }
        assert_eq!(ids.len(), 20 * (6 + 30));
    }
}
