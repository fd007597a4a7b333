//! Computes the measures of VMs from two consecutive readings of their counters.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use domain_stats::{Device, DomainStats, MAX_DEVICES, Vcpu};
use vmwatch_api::{
    InstanceId, hypervisor_samples::HypervisorSample, measures::one_decimal, time::CreateDate,
};

/// Maximum age of the guest's report about its memory. The period of the reports is a setting of the VM, usually ten
/// seconds, so that a report which is older shows that the guest hangs or has no balloon driver any more.
const REPORT_KEPT: Duration = Duration::from_mins(2);

/// What all samples of one reading have in common.
#[derive(Debug)]
pub(super) struct Origin<'a> {
    pub(super) hypervisor: &'a str,
    pub(super) create_date: CreateDate,
}

/// The previous reading of each VM. A VM that was off at the previous reading has none.
#[derive(Debug, Default)]
pub(super) struct Readings(HashMap<InstanceId, Reading>);

/// The counters of a VM at a moment.
#[derive(Debug)]
struct Reading {
    stats: DomainStats,
    at: Instant,
    /// When this replica first read the guest's latest report about its memory; `None` if it has not seen the report
    /// change.
    reported: Option<Instant>,
}

impl Readings {
    /// Forgets all readings. The next samples then have no rates, instead of rates over a long time.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Replaces the readings, and returns the samples of the VMs of which anything is known.
    pub(super) fn samples(
        &mut self,
        origin: &Origin<'_>,
        stats: Vec<(InstanceId, DomainStats)>,
        at: Instant,
    ) -> Vec<HypervisorSample> {
        let mut readings = HashMap::with_capacity(stats.len());
        let mut samples = Vec::with_capacity(stats.len());
        for (id, stats) in stats {
            let before = self
                .0
                .get(&id)
                .filter(|before| is_same_run(&before.stats, &stats));
            let reported = before.and_then(|before| {
                let [last, now] = [&before.stats, &stats].map(|stats| stats.balloon.last_update);
                let is_new = last.is_some() && now.is_some() && last != now;
                if is_new { Some(at) } else { before.reported }
            });
            let reading = Reading { stats, at, reported };
            samples.extend(sample(origin, &id, before, &reading));
            readings.insert(id, reading);
        }
        self.0 = readings;
        samples
    }
}

/// Whether the counters of a VM have gone on since the previous reading. They begin again when the VM is started, also on
/// another host after a migration.
fn is_same_run(before: &DomainStats, now: &DomainStats) -> bool {
    before.run == now.run && before.cpu_time <= now.cpu_time
}

/// The sample of a VM; `None` if nothing is known of it.
fn sample(
    origin: &Origin<'_>,
    id: &InstanceId,
    before: Option<&Reading>,
    now: &Reading,
) -> Option<HypervisorSample> {
    let stats = &now.stats;
    let interval = before.and_then(|before| Interval::between(before, now));
    let interval = interval.as_ref();
    let sample = HypervisorSample {
        instance_id: id.clone(),
        create_date: origin.create_date.clone(),
        hypervisor: origin.hypervisor.to_owned(),
        cpu_util: interval.and_then(Interval::cpu_util),
        mem: memory(now),
        disk_read: interval.and_then(|interval| interval.disks(|disk| disk.input)),
        disk_write: interval.and_then(|interval| interval.disks(|disk| disk.output)),
        net_incoming: interval.and_then(|interval| interval.nics(|nic| nic.input)),
        net_outgoing: interval.and_then(|interval| interval.nics(|nic| nic.output)),
        cores: stats.cores.and_then(|cores| u32::try_from(cores).ok()),
        steal: interval.and_then(|interval| interval.share_of_vcpus(|vcpu| vcpu.delay)),
    };
    let is_known = sample.cores.is_some()
        || [
            sample.cpu_util,
            sample.mem,
            sample.disk_read,
            sample.disk_write,
            sample.net_incoming,
            sample.net_outgoing,
            sample.steal,
        ]
        .iter()
        .any(Option::is_some);
    is_known.then_some(sample)
}

/// Memory in use, from a report of the guest that is not too old.
fn memory(now: &Reading) -> Option<f64> {
    let age = now.at.duration_since(now.reported?);
    let balloon = now.stats.balloon;
    let (available, usable) = (balloon.available?, balloon.usable?);
    let is_current = age <= REPORT_KEPT && available > 0;
    is_current.then(|| one_decimal(100.0 * (1.0 - float(usable) / float(available))))
}

/// Two consecutive readings of a VM, between which it was not started.
struct Interval<'a> {
    before: &'a DomainStats,
    now: &'a DomainStats,
    seconds: f64,
}

impl<'a> Interval<'a> {
    fn between(before: &'a Reading, now: &'a Reading) -> Option<Self> {
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        (seconds > 0.0).then_some(Self {
            before: &before.stats,
            now: &now.stats,
            seconds,
        })
    }

    /// CPU usage in percent. A hypervisor that does not report each virtual CPU reports a sum, which also has what the
    /// VM's devices use on the host.
    fn cpu_util(&self) -> Option<f64> {
        let of_vcpus = self.share_of_vcpus(|vcpu| vcpu.time);
        of_vcpus.or_else(|| {
            let used = difference(self.before.cpu_time, self.now.cpu_time)?;
            let cores = self.now.cores.filter(|cores| *cores > 0)?;
            Some(self.percent(used, float(cores)))
        })
    }

    /// The growth of a counter of all virtual CPUs, in percent of their time. A virtual CPU that was added or removed
    /// since the previous reading is left out.
    fn share_of_vcpus(&self, counter: fn(&Vcpu) -> Option<u64>) -> Option<f64> {
        let (mut sum, mut vcpus) = (0_u64, 0_u32);
        for (index, now) in &self.now.vcpus {
            let Some(before) = self.before.vcpus.get(index) else {
                continue;
            };
            sum = sum.checked_add(difference(counter(before), counter(now))?)?;
            vcpus += 1;
        }
        (vcpus > 0).then(|| self.percent(sum, f64::from(vcpus)))
    }

    /// The part of the time of these virtual CPUs, in percent.
    fn percent(&self, nanoseconds: u64, vcpus: f64) -> f64 {
        let share = float(nanoseconds) / 1e9 / (self.seconds * vcpus);
        one_decimal(100.0 * share.min(1.0))
    }

    fn disks(&self, counter: fn(&Device) -> Option<u64>) -> Option<f64> {
        let [before, now] = [self.before, self.now].map(|stats| &stats.disks);
        self.device_rate(self.now.disk_count, before, now, counter)
    }

    fn nics(&self, counter: fn(&Device) -> Option<u64>) -> Option<f64> {
        let [before, now] = [self.before, self.now].map(|stats| &stats.nics);
        self.device_rate(self.now.nic_count, before, now, counter)
    }

    /// The rate of all devices with this counter in KiB/s. A device that was added or removed since the previous reading
    /// is left out. If a counter has fallen, or not all devices could be read, the rate is not known.
    fn device_rate(
        &self,
        count: Option<u64>,
        before: &BTreeMap<u32, Device>,
        now: &BTreeMap<u32, Device>,
        counter: fn(&Device) -> Option<u64>,
    ) -> Option<f64> {
        let count = count.filter(|count| *count <= MAX_DEVICES.into())?;
        // The index of a device changes when another one is removed, but not its name.
        let before: HashMap<_, _> = before
            .values()
            .filter_map(|device| counted(device, counter))
            .collect();
        let (mut sum, mut devices) = (0_u64, 0_u64);
        for (name, now) in now.values().filter_map(|device| counted(device, counter)) {
            let Some(before) = before.get(name) else {
                continue;
            };
            sum = sum.checked_add(now.checked_sub(*before)?)?;
            devices += 1;
        }
        (devices > 0 || count == 0).then(|| one_decimal(float(sum) / 1024.0 / self.seconds))
    }
}

/// The name of a device, and the value of this counter.
fn counted(device: &Device, counter: fn(&Device) -> Option<u64>) -> Option<(&str, u64)> {
    Some((device.name.as_deref()?, counter(device)?))
}

/// The growth of a counter; `None` if it has fallen.
fn difference(before: Option<u64>, now: Option<u64>) -> Option<u64> {
    now?.checked_sub(before?)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact up to 9 PB or 104 days of nanoseconds, and rounded to one decimal afterwards"
)]
fn float(counter: u64) -> f64 {
    counter as f64
}

#[cfg(test)]
mod tests;
