//! The VM of a web shop with processes of several users, units and containers, for browser tests.

use testkit::Stack;
use vmwatch_api::{
    metrics::{CpuSeconds, FilesystemSample, ProcessOwner, ProcessSample, Restriction},
    time::unix_millis,
};

use crate::{
    history_support::stored,
    rest::client::{process, publish, sample},
};

/// Instance id of the VM.
pub(super) const SHOP: &str = "shop-1";

/// Interval of the process samples in seconds.
const INTERVAL: f64 = 10.0;

/// Name, number of processes, CPU usage of each in percent of one core, memory usage of each, user, unit, container.
type Kind = (
    &'static str,
    u32,
    f64,
    f64,
    &'static str,
    Option<&'static str>,
    Option<&'static str>,
);

const KINDS: [Kind; 13] = [
    (
        "java",
        1,
        118.0,
        31.4,
        "10001",
        None,
        Some("shop/orders-7d9c/orders"),
    ),
    (
        "gunicorn",
        4,
        31.5,
        2.6,
        "10001",
        None,
        Some("shop/cart-58f4/web"),
    ),
    (
        "postgres",
        9,
        4.0,
        1.9,
        "postgres",
        Some("postgresql@15-main.service"),
        None,
    ),
    ("nginx", 5, 2.2, 0.4, "www-data", Some("nginx.service"), None),
    (
        "containerd",
        1,
        1.4,
        0.9,
        "root",
        Some("containerd.service"),
        None,
    ),
    ("kubelet", 1, 2.6, 1.4, "root", Some("kubelet.service"), None),
    (
        "systemd-journald",
        1,
        0.6,
        0.5,
        "root",
        Some("systemd-journald.service"),
        None,
    ),
    (
        "vmwatch-agent",
        1,
        0.4,
        0.1,
        "vmwatch",
        Some("vmwatch-agent.service"),
        None,
    ),
    ("systemd", 1, 0.1, 0.2, "root", Some("init.scope"), None),
    ("sshd", 2, 0.0, 0.1, "root", Some("ssh.service"), None),
    ("bash", 2, 0.0, 0.1, "deploy", Some("session-12.scope"), None),
    ("kworker/u8:1-events_unbound", 24, 0.1, 0.0, "root", None, None),
    ("logrotate", 1, 0.0, 0.0, "root", Some("logrotate.service"), None),
];

/// Mount point, type, used space and size of each filesystem, in GiB.
const FILESYSTEMS: [(&str, &str, u64, u64); 6] = [
    ("/", "ext4", 12, 40),
    ("/backup", "nfs4", 0, 8192),
    ("/boot/efi", "vfat", 1, 4),
    ("/srv/images", "ext4", 180, 250),
    ("/var/lib/containerd", "ext4", 61, 80),
    ("/var/lib/postgresql", "xfs", 94, 100),
];

/// Publishes a sample of the VM, whose processes explain 86 % of its CPU time.
pub(super) async fn publish_shop(stack: &Stack) {
    let now = unix_millis();
    let mut body = sample(SHOP, now, 77.0);
    if let Some(vm) = &mut body.vm {
        (vm.proc, vm.restricted) = (None, Some(Restriction::Hidepid));
    }
    body.processes = processes(now);
    body.filesystems = FILESYSTEMS.map(filesystem).to_vec();
    let explained: f64 = body
        .processes
        .iter()
        .filter_map(|process| process.cpu_seconds)
        .sum();
    let total = explained / 0.86;
    body.vm_cpu = Some(CpuSeconds {
        user: total * 0.8,
        nice: 0.0,
        system: total * 0.2,
    });
    publish(stack, &body).await;
    stored(stack).await;
}

fn filesystem((mount_point, kind, used, total): (&str, &str, u64, u64)) -> FilesystemSample {
    FilesystemSample {
        mount_point: mount_point.to_owned(),
        filesystem: kind.to_owned(),
        used_bytes: used << 30,
        total_bytes: total << 30,
    }
}

fn processes(now_ms: u64) -> Vec<ProcessSample> {
    let mut processes: Vec<ProcessSample> = Vec::new();
    for (kind, (name, count, cpu, mem, user, unit, container)) in (0_u32..).zip(KINDS) {
        for index in 0..count {
            let started_ms = now_ms - 86_400_000 - 1000 * u64::from(100 * kind + index);
            let mut process = process(name, 400 + 37 * kind + index, cpu, started_ms);
            process.mem = mem;
            process.disk_write = if name == "postgres" { 812.5 } else { 0.0 };
            process.cpu_seconds = Some(cpu * INTERVAL / 100.0);
            process.owner = ProcessOwner {
                user: Some(user.to_owned()),
                parent_pid: Some(1),
                unit: unit.map(str::to_owned),
                container: container.map(str::to_owned),
                command_line: None,
                inherited: false,
            };
            if name == "logrotate" {
                process.shutdown_time = Some(process.running_time + 3.0);
            }
            processes.push(process);
        }
    }
    processes
}
