use std::time::SystemTime;

use domain_stats::Balloon;
use vmwatch_api::time::UtcOffset;

use super::*;

const VM: &str = "0f5d5a34-7c1e-4d7c-9a55-0d6a1f2b3c4d";
const SECOND: u64 = 1_000_000_000;

/// Reads the counters of a VM every ten seconds.
struct Clock {
    readings: Readings,
    at: Instant,
}

impl Clock {
    fn new() -> Self {
        Self {
            readings: Readings::default(),
            at: Instant::now(),
        }
    }

    /// Reads the counters after some seconds.
    fn after(&mut self, seconds: u64, stats: &[DomainStats]) -> Vec<HypervisorSample> {
        self.at += Duration::from_secs(seconds);
        let origin = Origin {
            hypervisor: "lab",
            create_date: CreateDate::at(SystemTime::UNIX_EPOCH, UtcOffset::UTC),
        };
        let of = |stats: &DomainStats| (VM.parse().unwrap(), stats.clone());
        self.readings
            .samples(&origin, stats.iter().map(of).collect(), self.at)
    }

    /// Reads the counters of the VM ten seconds later, and returns its sample.
    fn next(&mut self, stats: &DomainStats) -> HypervisorSample {
        let samples = self.after(10, std::slice::from_ref(stats));
        samples.into_iter().next().unwrap()
    }
}

fn device(name: &str, input: u64, output: u64) -> Device {
    Device {
        name: Some(name.to_owned()),
        input: Some(input),
        output: Some(output),
    }
}

fn vcpu(time: u64, delay: u64) -> Vcpu {
    Vcpu {
        time: Some(time),
        wait: Some(0),
        delay: Some(delay),
    }
}

/// A VM with two virtual CPUs, two disks, and two interfaces of which one has no counters.
fn vm() -> DomainStats {
    DomainStats {
        run: Some(4),
        state: Some(1),
        cpu_time: Some(50 * SECOND),
        cores: Some(2),
        vcpus: [(0, vcpu(20 * SECOND, SECOND)), (1, vcpu(10 * SECOND, SECOND))].into(),
        disk_count: Some(2),
        disks: [(0, device("vda", 1 << 20, 1 << 21)), (1, device("vdb", 0, 0))].into(),
        nic_count: Some(2),
        nics: [(0, device("vnet0", 500, 600)), (1, Device::default())].into(),
        ..DomainStats::default()
    }
}

/// The VM of [`vm`] after ten seconds of work.
fn later() -> DomainStats {
    DomainStats {
        cpu_time: Some(65 * SECOND),
        vcpus: [(0, vcpu(29 * SECOND, 2 * SECOND)), (1, vcpu(12 * SECOND, SECOND))].into(),
        disks: [
            (0, device("vda", (1 << 20) + 102_400, 1 << 21)),
            (1, device("vdb", 512, 10_240)),
        ]
        .into(),
        nics: [(0, device("vnet0", 500 + 51_200, 600)), (1, Device::default())].into(),
        ..vm()
    }
}

/// The rates of a sample: CPU, steal, disk and network.
fn rates(sample: &HypervisorSample) -> [Option<f64>; 6] {
    [
        sample.cpu_util,
        sample.steal,
        sample.disk_read,
        sample.disk_write,
        sample.net_incoming,
        sample.net_outgoing,
    ]
}

const NONE: [Option<f64>; 6] = [None; 6];
/// The rates between [`vm`] and [`later`].
const RATES: [Option<f64>; 6] = [Some(55.0), Some(5.0), Some(10.1), Some(1.0), Some(5.0), Some(0.0)];

#[test]
fn rates_are_the_growth_of_counters_per_second() {
    let mut clock = Clock::new();
    let first = clock.next(&vm());
    assert_eq!(rates(&first), NONE);
    assert_eq!((first.cores, first.mem), (Some(2), None));
    assert_eq!((first.instance_id.as_str(), &*first.hypervisor), (VM, "lab"));
    assert_eq!(first.create_date.as_str(), "1970-01-01T00:00:00.000000");
    assert_eq!(rates(&clock.next(&later())), RATES);
    // Nothing has happened since.
    let idle = [Some(0.0); 6];
    assert_eq!(rates(&clock.next(&later())), idle);
}

#[test]
fn restart_and_migration_begin_without_rates() {
    // A VM that was started again, or has come back from another host, has another run.
    let mut clock = Clock::new();
    clock.next(&vm());
    let restarted = DomainStats {
        run: Some(5),
        ..later()
    };
    assert_eq!(rates(&clock.next(&restarted)), NONE);

    // A hypervisor that does not number the runs: the CPU time begins again.
    let mut clock = Clock::new();
    clock.next(&later());
    assert_eq!(rates(&clock.next(&vm())), NONE);

    // The VM was off, or on another host, at the reading in between.
    let mut clock = Clock::new();
    clock.next(&vm());
    assert_eq!(clock.after(10, &[]), []);
    assert_eq!(rates(&clock.next(&later())), NONE);
    assert_eq!(rates(&clock.next(&later())), [Some(0.0); 6]);

    // The reading in between failed.
    let mut clock = Clock::new();
    clock.next(&vm());
    clock.readings.clear();
    assert_eq!(rates(&clock.next(&later())), NONE);
}

#[test]
fn fallen_counter_of_a_device_gives_no_rate() {
    let mut clock = Clock::new();
    clock.next(&vm());
    let mut now = later();
    now.disks.insert(0, device("vda", 5, (1 << 21) + 1024));
    let sample = clock.next(&now);
    assert_eq!((sample.disk_read, sample.disk_write), (None, Some(1.1)));
    assert_eq!(sample.cpu_util, RATES[0]);
}

#[test]
fn added_and_removed_devices_and_vcpus_are_left_out() {
    let mut clock = Clock::new();
    clock.next(&vm());
    // `vda` is removed, so that `vdb` gets its index, and `vdc` is added.
    let plugged = DomainStats {
        cores: Some(3),
        vcpus: [
            (0, vcpu(29 * SECOND, 2 * SECOND)),
            (1, vcpu(12 * SECOND, SECOND)),
            (2, vcpu(9 * SECOND, 9 * SECOND)),
        ]
        .into(),
        disks: [
            (0, device("vdb", 10_240, 0)),
            (1, device("vdc", 1 << 40, 1 << 40)),
        ]
        .into(),
        ..later()
    };
    let sample = clock.next(&plugged);
    assert_eq!(sample.cores, Some(3));
    assert_eq!((sample.cpu_util, sample.steal), (RATES[0], RATES[1]));
    assert_eq!((sample.disk_read, sample.disk_write), (Some(1.0), Some(0.0)));

    let unplugged = DomainStats {
        cores: Some(1),
        cpu_time: Some(80 * SECOND),
        vcpus: [(0, vcpu(39 * SECOND, 2 * SECOND))].into(),
        disk_count: Some(0),
        disks: BTreeMap::new(),
        ..plugged
    };
    let sample = clock.next(&unplugged);
    assert_eq!((sample.cores, sample.cpu_util), (Some(1), Some(100.0)));
    assert_eq!(
        (sample.disk_read, sample.disk_write),
        (Some(0.0), Some(0.0)),
        "a VM without disks reads nothing"
    );
}

#[test]
fn counters_that_libvirt_does_not_report_give_no_values() {
    // Only the state is known, as with libvirt's test driver.
    let mut clock = Clock::new();
    let bare = DomainStats {
        run: Some(1),
        state: Some(1),
        ..DomainStats::default()
    };
    for _ in 0..2 {
        assert_eq!(clock.after(10, std::slice::from_ref(&bare)), []);
    }

    // Without counters of the virtual CPUs, the CPU time of the whole VM counts.
    let mut clock = Clock::new();
    let without_vcpus = |stats: DomainStats| DomainStats {
        vcpus: BTreeMap::new(),
        nics: BTreeMap::new(),
        ..stats
    };
    clock.next(&without_vcpus(vm()));
    let sample = clock.next(&without_vcpus(later()));
    assert_eq!((sample.cpu_util, sample.steal), (Some(75.0), None));
    assert_eq!((sample.net_incoming, sample.net_outgoing), (None, None));

    // The host's kernel does not count how long virtual CPUs wait.
    let mut clock = Clock::new();
    let without_delay = |mut stats: DomainStats| {
        stats.vcpus.values_mut().for_each(|vcpu| vcpu.delay = None);
        stats
    };
    clock.next(&without_delay(vm()));
    let sample = clock.next(&without_delay(later()));
    assert_eq!((sample.cpu_util, sample.steal), (RATES[0], None));

    // More disks than are read.
    let mut clock = Clock::new();
    clock.next(&vm());
    let many = DomainStats {
        disk_count: Some(u64::from(MAX_DEVICES) + 1),
        ..later()
    };
    assert_eq!(clock.next(&many).disk_read, None);
}

#[test]
fn cpu_usage_and_steal_never_exceed_100_percent() {
    let mut clock = Clock::new();
    clock.next(&vm());
    let mut busy = later();
    busy.vcpus = [
        (0, vcpu(99 * SECOND, 99 * SECOND)),
        (1, vcpu(99 * SECOND, 99 * SECOND)),
    ]
    .into();
    let sample = clock.next(&busy);
    assert_eq!((sample.cpu_util, sample.steal), (Some(100.0), Some(100.0)));
    // Two readings at the same moment.
    let samples = clock.after(0, &[busy]);
    assert_eq!(rates(&samples[0]), NONE);
}

/// The VM with a report of the guest about its memory.
fn reported(last_update: u64, usable: u64) -> DomainStats {
    DomainStats {
        balloon: Balloon {
            available: Some(1000),
            usable: Some(usable),
            last_update: Some(last_update),
        },
        ..vm()
    }
}

#[test]
fn memory_is_known_only_from_recent_reports_of_the_guest() {
    // The guest has no balloon driver, or the hypervisor does not ask it for reports.
    let mut clock = Clock::new();
    for _ in 0..2 {
        assert_eq!(clock.next(&vm()).mem, None);
    }
    // A report that may be old is not used.
    assert_eq!(clock.next(&reported(0, 400)).mem, None);
    let mut clock = Clock::new();
    assert_eq!(clock.next(&reported(70, 400)).mem, None);
    assert_eq!(clock.next(&reported(70, 400)).mem, None);
    assert_eq!(clock.next(&reported(80, 250)).mem, Some(75.0));
    assert_eq!(clock.next(&reported(80, 250)).mem, Some(75.0));
    // The guest hangs.
    assert_eq!(
        clock.after(100, &[reported(80, 250)])[0].mem,
        Some(75.0),
        "110 s after the report"
    );
    assert_eq!(clock.next(&reported(80, 250)).mem, Some(75.0));
    assert_eq!(clock.next(&reported(80, 250)).mem, None);
    assert_eq!(clock.next(&reported(90, 1500)).mem, Some(0.0));
    // A new run of the VM has not reported yet.
    let restarted = DomainStats {
        run: Some(5),
        ..reported(95, 250)
    };
    assert_eq!(clock.next(&restarted).mem, None);
    let mut partial = reported(99, 250);
    partial.run = Some(5);
    partial.balloon.usable = None;
    assert_eq!(clock.next(&partial).mem, None);
}
