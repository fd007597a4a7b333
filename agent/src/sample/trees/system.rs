//! Trees for the values of a VM that only the REST API has.

use vmwatch_api::metrics::SystemSample;

use super::Tree;

/// A case of the values that only the REST API has: the name, the change of the tree between two samples, and what the
/// second sample contains.
type SystemCase = (&'static str, fn(&Tree), SystemSample);

const SYSTEM: SystemSample = SystemSample {
    cores: Some(2),
    steal: Some(0.0),
    load: None,
    swap: None,
    pressure_cpu: None,
    pressure_mem: None,
    pressure_io: None,
};

#[test]
fn values_that_the_kernel_does_not_report_are_absent() {
    let cases: [SystemCase; 7] = [
        ("old kernel that reports nothing more", |_| {}, SYSTEM),
        (
            "load average",
            |tree| tree.write("proc/loadavg", "3.90 5.32 4.14 6/128 16882\n"),
            SystemSample {
                load: Some(3.9),
                ..SYSTEM
            },
        ),
        (
            "malformed load average",
            |tree| tree.write("proc/loadavg", "-nan 5.32\n"),
            SYSTEM,
        ),
        (
            "swap space",
            |tree| tree.memory("MemTotal: 1000 kB\nMemFree: 750 kB\nSwapTotal: 400 kB\nSwapFree: 300 kB\n"),
            SystemSample {
                swap: Some(25.0),
                ..SYSTEM
            },
        ),
        (
            "no swap space",
            |tree| tree.memory("MemTotal: 1000 kB\nMemFree: 750 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"),
            SYSTEM,
        ),
        (
            "stolen time",
            |tree| tree.cpu("1100 10 50 1001000 500 5 5 405", 2),
            SystemSample {
                steal: Some(16.7),
                ..SYSTEM
            },
        ),
        (
            "a CPU is added",
            |tree| tree.cpu("1100 10 50 5000000 500 5 5 405", 3),
            SystemSample {
                cores: Some(3),
                steal: None,
                ..SYSTEM
            },
        ),
    ];
    for (name, change, expected) in cases {
        let tree = Tree::new();
        let mut sampler = tree.sampler();
        sampler.sample().unwrap();
        change(&tree);
        assert_eq!(sampler.sample().unwrap().vm.unwrap().system, expected, "{name}");
    }
}

#[test]
fn pressure_is_known_from_the_second_sample_on() {
    let tree = Tree::new();
    let pressure = |resource: &str, micros: u64| {
        let line = format!("some avg10=1.00 avg60=1.00 avg300=1.00 total={micros}\n");
        tree.write(&format!("proc/pressure/{resource}"), line);
    };
    pressure("cpu", 5);
    pressure("io", 5);
    let mut sampler = tree.sampler();
    let first = sampler.sample().unwrap().vm.unwrap().system;
    assert_eq!((first.pressure_cpu, first.pressure_io), (None, None));
    // An hour of waiting since the first sample is more than the time that passed.
    pressure("cpu", 3_600_000_000);
    let second = sampler.sample().unwrap().vm.unwrap().system;
    assert_eq!(
        (second.pressure_cpu, second.pressure_io),
        (Some(100.0), Some(0.0))
    );
    assert_eq!(second.pressure_mem, None);
}
