//! Prints the size of blocks and the time to encode and decode them, for generated rows.
//!
//! Run with `cargo run --release -p vmwatch-blocks --example measure`. With the path of a file, it reads samples as
//! JSON lines from it instead, as agents publish them.
#![expect(clippy::unwrap_used, reason = "a tool for developers may end with a panic")]
#![expect(clippy::cast_precision_loss, reason = "figures are printed with three digits")]

use std::{
    error::Error,
    time::{Duration, Instant, UNIX_EPOCH},
};

use vmwatch_api::{
    metrics::{CpuSeconds, ProcessOwner, ProcessSample, Sample, VmSample},
    time::{CreateDate, UtcOffset},
};
use vmwatch_blocks::{Block, Encoded, Encoder, Kind, Limits, Rows, Value, encode_sample};

const INSTANCE: &str = "6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e";
const LIMITS: Limits = Limits {
    rows: 65_536,
    bytes: 64 << 20,
};

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(path) = std::env::args().nth(1) {
        let lines = std::fs::read_to_string(path)?;
        let samples = lines
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<Vec<Sample>, _>>()?;
        return report("recorded", &samples);
    }
    for activity in [0.15, 0.4] {
        let mut samples = generated(activity);
        report(&format!("{activity} active"), &samples)?;
        let without = encoded_bytes(&samples)?;
        samples.iter_mut().for_each(add_owners);
        report(
            &format!("{activity} active, with CPU seconds and owners"),
            &samples,
        )?;
        let with = encoded_bytes(&samples)?;
        println!("  encoded samples with owners ÷ without: {:.2}", with / without);
    }
    Ok(())
}

/// The length of all samples as agents encode them.
fn encoded_bytes(samples: &[Sample]) -> Result<f64, Box<dyn Error>> {
    let mut encoder = Encoder::new()?;
    let mut bytes = 0;
    for sample in samples {
        bytes += encode_sample(sample, &mut encoder)?.len();
    }
    Ok(bytes as f64)
}

/// Adds CPU seconds that match the CPU usage, and owners as on a server: kernel threads, workers of one service, and a
/// unit for each of some other processes.
fn add_owners(sample: &mut Sample) {
    let hundredth = |number: f64| (number * 100.0).round() / 100.0;
    let mut total = 0.0;
    for (number, process) in sample.processes.iter_mut().enumerate() {
        let seconds = hundredth(process.cpu_util * 0.6);
        total += seconds;
        process.cpu_seconds = Some(seconds);
        process.owner = match number {
            0..50 => ProcessOwner {
                user: Some("root".to_owned()),
                parent_pid: Some(2),
                ..ProcessOwner::default()
            },
            50..80 => ProcessOwner {
                user: Some("postgres".to_owned()),
                parent_pid: Some(1851),
                unit: Some("postgresql@15-main.service".to_owned()),
                ..ProcessOwner::default()
            },
            _ => ProcessOwner {
                user: Some("root".to_owned()),
                parent_pid: Some(1),
                unit: Some(format!("systemd-unit-{number}.service")),
                ..ProcessOwner::default()
            },
        };
    }
    sample.vm_cpu = Some(CpuSeconds {
        user: hundredth(total * 0.7),
        nice: 0.0,
        system: hundredth(total * 0.3),
    });
}

/// One VM-hour of 100 processes with a sample per minute. The given share of the processes is active.
fn generated(activity: f64) -> Vec<Sample> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    let tenth = |number: f64| (number * 10.0).round() / 10.0;
    let mut processes: Vec<ProcessSample> = (0..100)
        .map(|number: u32| ProcessSample {
            cmd: format!("{}-{number}", if number < 50 { "kworker/u8" } else { "postgres" }),
            pid: number * 37 + 1,
            cpu_util: 0.0,
            mem: tenth(random() * 5.0),
            disk_read: 0.0,
            disk_write: 0.0,
            running_time: 1_790_000_000.0 + (random() * 1e6).round() / 100.0,
            ..ProcessSample::default()
        })
        .collect();
    let start = UNIX_EPOCH + Duration::from_hours(500_000);
    (0..60)
        .map(|minute| {
            for (number, process) in processes.iter_mut().enumerate() {
                if (number as f64) < activity * 100.0 {
                    process.cpu_util = tenth(random() * random() * 40.0);
                    process.mem = tenth((process.mem + (random() - 0.5) * 0.2).abs());
                    let disk = random() < 0.2;
                    process.disk_write = if disk { tenth(random() * 500.0) } else { 0.0 };
                }
            }
            let jitter = Duration::from_secs_f64(random() * 0.0015);
            Sample {
                instance_id: INSTANCE.parse().unwrap(),
                create_date: CreateDate::at(
                    start + Duration::from_secs(60 * minute) + jitter,
                    UtcOffset::UTC,
                ),
                part: 0,
                net_incoming: tenth(random() * 300.0),
                net_outgoing: tenth(random() * 900.0),
                vm_cpu: None,
                sums: Vec::new(),
                short_lived: None,
                filesystems: Vec::new(),
                vm: Some(VmSample {
                    cpu_util: Some(tenth(random() * 30.0)),
                    mem: Some(tenth(40.0 + random())),
                    disk_read: tenth(random() * 20.0),
                    disk_write: tenth(random() * 800.0),
                    proc: Some(100),
                    ..VmSample::default()
                }),
                processes: processes.clone(),
            }
        })
        .collect()
}

fn push(vms: &mut Rows, processes: &mut Rows, sample: &Sample) {
    let date = sample.create_date.as_str();
    let net = [
        ("net_incoming", Value::Double(sample.net_incoming)),
        ("net_outgoing", Value::Double(sample.net_outgoing)),
    ];
    if let Some(vm) = &sample.vm {
        let fields = [
            ("cpu_util", vm.cpu_util.map_or(Value::Null, Value::Double)),
            ("mem", vm.mem.map_or(Value::Null, Value::Double)),
            ("disk_read", Value::Double(vm.disk_read)),
            ("disk_write", Value::Double(vm.disk_write)),
            (
                "proc",
                vm.proc
                    .map_or(Value::Null, |count| Value::Int32(count.cast_signed())),
            ),
        ];
        vms.push(date, None, None, net.into_iter().chain(fields)).unwrap();
    }
    let cpu = |kind: fn(&CpuSeconds) -> f64| {
        sample
            .vm_cpu
            .as_ref()
            .map_or(Value::Missing, |cpu| Value::Double(kind(cpu)))
    };
    for process in &sample.processes {
        let owner = &process.owner;
        let fields = [
            ("cmd", Value::Text(&process.cmd)),
            ("pid", Value::Int32(process.pid.cast_signed())),
            ("cpu_util", Value::Double(process.cpu_util)),
            ("mem", Value::Double(process.mem)),
            ("disk_read", Value::Double(process.disk_read)),
            ("disk_write", Value::Double(process.disk_write)),
            ("running_time", Value::Double(process.running_time)),
            (
                "shutdown_time",
                process.shutdown_time.map_or(Value::Null, Value::Double),
            ),
            (
                "cpu_seconds",
                process.cpu_seconds.map_or(Value::Missing, Value::Double),
            ),
            ("user", owner.user.as_deref().map_or(Value::Missing, Value::Text)),
            (
                "parent_pid",
                owner
                    .parent_pid
                    .map_or(Value::Missing, |pid| Value::Int32(pid.cast_signed())),
            ),
            ("unit", owner.unit.as_deref().map_or(Value::Missing, Value::Text)),
            ("vm_user_seconds", cpu(|cpu| cpu.user)),
            ("vm_nice_seconds", cpu(|cpu| cpu.nice)),
            ("vm_system_seconds", cpu(|cpu| cpu.system)),
        ];
        processes
            .push(date, None, None, net.into_iter().chain(fields))
            .unwrap();
    }
}

fn lists() -> (Rows, Rows) {
    (
        Rows::new(Kind::Vm, INSTANCE, 0),
        Rows::new(Kind::Process, INSTANCE, 0),
    )
}

fn report(what: &str, samples: &[Sample]) -> Result<(), Box<dyn Error>> {
    let mut encoder = Encoder::new()?;
    println!("{what}: {} samples", samples.len());
    let mut one = Vec::new();
    let time = timed(|| {
        one = samples
            .iter()
            .flat_map(|sample| {
                let (mut vms, mut processes) = lists();
                push(&mut vms, &mut processes, sample);
                encoder.encode(&processes)
            })
            .collect();
    });
    line("process rows of one sample", &one, time);
    let time = timed(|| {
        for sample in samples {
            let (mut vms, mut processes) = lists();
            push(&mut vms, &mut processes, sample);
        }
    });
    line("collecting the rows of one sample", &one, time);
    let time = timed(|| {
        for sample in samples {
            let (mut vms, mut processes) = lists();
            push(&mut vms, &mut processes, sample);
            processes.block_id();
        }
    });
    line("the same and its id", &one, time);
    let mut hour = Vec::new();
    let time = timed(|| {
        let (mut vms, mut processes) = lists();
        for sample in samples {
            push(&mut vms, &mut processes, sample);
        }
        hour = encoder.encode(&processes);
    });
    line("process rows of an hour", &hour, time);
    let time = timed(|| {
        let (_, mut processes) = lists();
        for block in &one {
            processes
                .push_block(&mut Block::open(&block.bytes, LIMITS).unwrap())
                .unwrap();
        }
        assert_eq!(encoder.encode(&processes), hour);
    });
    line("an hour from blocks of samples", &hour, time);
    let time = timed(|| {
        for block in &hour {
            let mut block = Block::open(&block.bytes, LIMITS).unwrap();
            let names: Vec<&str> = block.names().collect();
            for name in names {
                block.column(name).unwrap();
            }
        }
    });
    line("decode an hour, all columns", &hour, time);
    let time = timed(|| {
        for block in &hour {
            let mut block = Block::open(&block.bytes, LIMITS).unwrap();
            for name in ["pid", "cmd", "cpu_util"] {
                block.column(name).unwrap();
            }
        }
    });
    line("decode an hour, three columns", &hour, time);
    let (mut vms, mut processes) = lists();
    for sample in samples {
        push(&mut vms, &mut processes, sample);
    }
    let mut hour = Vec::new();
    let time = timed(|| hour = encoder.encode(&vms));
    line("VM rows of an hour", &hour, time);
    Ok(())
}

fn timed(mut run: impl FnMut()) -> Duration {
    let rounds = 20;
    let mut best = Duration::MAX;
    for _ in 0..rounds {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed());
    }
    best
}

fn line(what: &str, blocks: &[Encoded], time: Duration) {
    let rows: usize = blocks.iter().map(|block| block.rows).sum();
    let bytes: usize = blocks.iter().map(|block| block.bytes.len()).sum();
    let (rows, bytes) = (rows as f64, bytes as f64);
    println!(
        "  {what:36} {:6.2} bytes/row {:7.1} ns/row",
        bytes / rows,
        time.as_nanos() as f64 / rows
    );
}
