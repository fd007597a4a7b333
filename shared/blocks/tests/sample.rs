//! A sample is decoded exactly as it was encoded for the bus.
#![expect(clippy::unwrap_used, reason = "a test may end with a panic")]

use std::collections::BTreeMap;

use proptest::{
    array::{uniform3, uniform4, uniform6},
    collection::vec,
    option,
    prelude::*,
};
use vmwatch_api::metrics::{
    CpuSeconds, FilesystemSample, ProcessOwner, ProcessSample, Restriction, Sample, ShortLived, SumSample,
    SystemSample, VmSample,
};
use vmwatch_blocks::{
    BlockError, Encoder, Limits, SAMPLE_LIMITS, SampleHead, decode_sample, encode_sample, sample_head,
};

/// A sample as JSON, and in the encoding of agents (docs/compatibility.md).
const GOLDEN_JSON: &str = include_str!("../../../tests/golden/forms/sample.json");
const GOLDEN: &[u8] = include_bytes!("../../../tests/golden/forms/sample.vms");
const GOLDEN_WITHOUT_FILESYSTEMS: &[u8] =
    include_bytes!("../../../tests/golden/forms/sample-without-filesystems.vms");

fn measure() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(0.0),
        (0_u32..100_000).prop_map(|tenths| f64::from(tenths) / 10.0),
        -1e300_f64..1e300
    ]
}

fn process() -> impl Strategy<Value = ProcessSample> {
    let started = (0_u32..1000).prop_map(|hundredths| 1_482_236_515.0 + f64::from(hundredths) / 100.0);
    (
        "\\PC{0,15}",
        any::<u32>(),
        uniform4(measure()),
        started,
        option::of(measure()),
    )
        .prop_map(
            |(cmd, pid, [cpu_util, mem, disk_read, disk_write], running_time, shutdown_time)| ProcessSample {
                cmd,
                pid,
                cpu_util,
                mem,
                disk_read,
                disk_write,
                running_time,
                shutdown_time,
                ..ProcessSample::default()
            },
        )
}

fn owned_process() -> impl Strategy<Value = ProcessSample> {
    let text = || option::of("\\PC{0,20}");
    let owner = (
        text(),
        option::of(any::<u32>()),
        text(),
        text(),
        text(),
        any::<bool>(),
    )
        .prop_map(
            |(user, parent_pid, unit, container, command_line, inherited)| ProcessOwner {
                user,
                parent_pid,
                unit,
                container,
                command_line,
                inherited,
            },
        );
    let exit_code = option::of(0_u32..256);
    (process(), option::of(measure()), owner, exit_code).prop_map(
        |(process, cpu_seconds, owner, exit_code)| ProcessSample {
            cpu_seconds,
            exit_code,
            owner,
            ..process
        },
    )
}

fn sum() -> impl Strategy<Value = SumSample> {
    (owned_process(), option::of(any::<u32>())).prop_map(|(process, processes)| SumSample {
        cmd: process.cmd,
        processes,
        cpu_util: process.cpu_util,
        mem: process.mem,
        disk_read: process.disk_read,
        disk_write: process.disk_write,
        cpu_seconds: process.cpu_seconds.unwrap_or(0.0),
        owner: ProcessOwner {
            parent_pid: None,
            command_line: None,
            ..process.owner
        },
    })
}

/// A sample has at most one sum for each name and user.
fn sums() -> impl Strategy<Value = Vec<SumSample>> {
    vec(sum(), 0..10).prop_map(|mut sums| {
        sort(&mut sums);
        sums.dedup_by(|one, other| (&one.cmd, &one.owner.user) == (&other.cmd, &other.owner.user));
        sums
    })
}

fn sort(sums: &mut [SumSample]) {
    sums.sort_by(|one, other| (&one.cmd, &one.owner.user).cmp(&(&other.cmd, &other.owner.user)));
}

fn sample() -> impl Strategy<Value = Sample> {
    let unknown = (
        option::of(measure()),
        option::of(measure()),
        option::of(any::<u32>()),
        option::of(Just(Restriction::Hidepid)),
    );
    let system = (option::of(any::<u32>()), uniform6(option::of(measure())));
    let system = system.prop_map(|(cores, [steal, load, swap, cpu, mem, io])| SystemSample {
        cores,
        steal,
        load,
        swap,
        pressure_cpu: cpu,
        pressure_mem: mem,
        pressure_io: io,
    });
    let vm = (unknown, system, measure(), measure(), 0_u32..3, 0_u32..3).prop_map(
        |((cpu_util, mem, proc, restricted), system, disk_read, disk_write, dropped_parts, lost)| VmSample {
            cpu_util,
            mem,
            disk_read,
            disk_write,
            proc,
            restricted,
            system,
            dropped_parts,
            lost_exit_records: lost,
        },
    );
    (
        option::of(vm),
        vec(owned_process(), 0..50),
        measure(),
        measure(),
        option::of(uniform3(measure())),
        0_u32..9,
        sums(),
        filesystems(),
    )
        .prop_map(
            |(vm, mut processes, net_incoming, net_outgoing, vm_cpu, part, sums, filesystems)| {
                processes.sort_by_key(|process| (process.pid, process.running_time.to_bits()));
                processes.dedup_by_key(|process| (process.pid, process.running_time.to_bits()));
                Sample {
                    instance_id: "vm-1".parse().unwrap(),
                    create_date: "2017-01-01T21:37:59.001065".parse().unwrap(),
                    part,
                    net_incoming,
                    net_outgoing,
                    vm,
                    // Each process row has the CPU time of the VM.
                    vm_cpu: vm_cpu
                        .filter(|_| !processes.is_empty() || !sums.is_empty())
                        .map(|[user, nice, system]| CpuSeconds { user, nice, system }),
                    short_lived: (!sums.is_empty()).then_some(ShortLived::Recorded),
                    processes,
                    sums,
                    filesystems,
                }
            },
        )
}

/// Filesystems with different mount points, sorted by them.
fn filesystems() -> impl Strategy<Value = Vec<FilesystemSample>> {
    let filesystem = (any::<String>(), "ext4|nfs4", 0..1_u64 << 62, 0..1_u64 << 62);
    vec(filesystem, 0..5).prop_map(|filesystems| {
        let by_mount_point: BTreeMap<_, _> = filesystems
            .into_iter()
            .map(|(mount_point, filesystem, used_bytes, total_bytes)| {
                let row = FilesystemSample {
                    mount_point: mount_point.clone(),
                    filesystem,
                    used_bytes,
                    total_bytes,
                };
                (mount_point, row)
            })
            .collect();
        by_mount_point.into_values().collect()
    })
}

fn encode(sample: &Sample) -> Vec<u8> {
    encode_sample(sample, &mut Encoder::new().unwrap()).unwrap()
}

proptest! {
    #[test]
    fn sample_is_decoded_exactly_and_its_processes_are_sorted(sample in sample()) {
        let bytes = encode(&sample);
        prop_assert_eq!(decode_sample(&bytes, SAMPLE_LIMITS).unwrap(), sample.clone());
        let head = SampleHead {
            instance_id: sample.instance_id.clone(),
            create_date: sample.create_date.clone(),
            part: sample.part,
        };
        prop_assert_eq!(sample_head(&bytes).unwrap(), head);
        let mut reversed = sample;
        reversed.processes.reverse();
        reversed.sums.reverse();
        reversed.filesystems.reverse();
        prop_assert_eq!(encode(&reversed), bytes);
    }

    #[test]
    fn damaged_sample_is_rejected(sample in sample(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let mut bytes = encode(&sample);
        let at = at.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        prop_assert!(decode_sample(&bytes, SAMPLE_LIMITS).is_err() && sample_head(&bytes).is_err());
        bytes.truncate(at);
        prop_assert!(decode_sample(&bytes, SAMPLE_LIMITS).is_err() && sample_head(&bytes).is_err());
    }
}

#[test]
fn encoding_of_a_sample_matches_the_golden_file() {
    let sample: Sample = serde_json::from_str(GOLDEN_JSON).unwrap();
    assert_eq!(encode(&sample), GOLDEN);
    assert_eq!(decode_sample(GOLDEN, SAMPLE_LIMITS).unwrap(), sample);
}

#[test]
fn sample_of_an_agent_without_filesystems_keeps_its_encoding() {
    let mut sample: Sample = serde_json::from_str(GOLDEN_JSON).unwrap();
    sample.filesystems.clear();
    assert_eq!(encode(&sample), GOLDEN_WITHOUT_FILESYSTEMS);
    let decoded = decode_sample(GOLDEN_WITHOUT_FILESYSTEMS, SAMPLE_LIMITS).unwrap();
    assert_eq!(decoded, sample);
}

#[test]
fn sample_of_100_processes_takes_at_most_25_bytes_per_row() {
    let processes: Vec<ProcessSample> = (0..100_u32)
        .map(|number| ProcessSample {
            cmd: format!("process-{}", number * 7919 % 1000),
            pid: number * 37 + 1,
            cpu_util: if number % 3 == 0 {
                f64::from(number) / 10.0
            } else {
                0.0
            },
            mem: f64::from(number * 31 % 70) / 10.0,
            disk_read: 0.0,
            disk_write: if number % 7 == 0 {
                f64::from(number * 3571 % 5000) / 10.0
            } else {
                0.0
            },
            running_time: 1_482_236_515.63 + f64::from(number * 7919 % 1000),
            ..ProcessSample::default()
        })
        .collect();
    let sample = Sample {
        instance_id: "6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e".parse().unwrap(),
        create_date: "2017-01-01T21:37:59.001065".parse().unwrap(),
        part: 0,
        net_incoming: 0.6,
        net_outgoing: 5.7,
        vm_cpu: None,
        sums: Vec::new(),
        short_lived: None,
        filesystems: Vec::new(),
        vm: None,
        processes,
    };
    let bytes = encode(&sample);
    assert!(bytes.len() <= 2500, "{}", bytes.len());
    assert_eq!(decode_sample(&bytes, SAMPLE_LIMITS).unwrap(), sample);
    let fewer = Limits {
        rows: 99,
        ..SAMPLE_LIMITS
    };
    assert_eq!(decode_sample(&bytes, fewer), Err(BlockError::TooLarge));
}
