//! A table of `/proc` trees made for the purpose, each with the rows that the agent reports for it.

mod system;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use vmwatch_api::metrics::{CpuSeconds, ProcessOwner, ProcessSample, Restriction, Sample};

use super::{Roots, Sampler};
use crate::select::Selection;

/// Time between two samples of a case. It is long, so that the time which the test itself takes is negligible.
const INTERVAL: Duration = Duration::from_secs(10_000);

/// A `/proc` and a `/sys` in a temporary folder. At first, it has two idle CPUs, 1,000 KiB of memory of which 75 %
/// are available, a network interface, and the processes 1 and 7.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        tree.cpu("100 10 50 1000000 500 5 5 5", 2);
        tree.boot(1_482_236_500);
        tree.uptime(20_000);
        tree.memory(
            "MemTotal: 1000 kB\nMemFree: 500 kB\nMemAvailable: 750 kB\nBuffers: 50 kB\nCached: 150 kB\n",
        );
        tree.write("proc/diskstats", "");
        tree.interfaces(&[("lo", 0), ("eth0", 1000)]);
        fs::create_dir_all(tree.path("sys/class/net/eth0/device")).unwrap();
        fs::create_dir_all(tree.path("proc/self/ns")).unwrap();
        tree.namespace("pid:[4026531836]");
        tree.process(1, b"init", 1, 0);
        tree.process(7, b"worker", 1607, 1000);
        tree
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Sets the CPU times and the number of online CPUs.
    fn cpu(&self, times: &str, online: u32) {
        let lines: Vec<_> = (0..online).map(|cpu| format!("cpu{cpu} 0 0 0 0\n")).collect();
        self.write(
            "cpu",
            format!("cpu  {times}\n{}intr 1 0 0\nctxt 1\n", lines.concat()),
        );
        self.write_stat();
    }

    fn boot(&self, seconds: u64) {
        self.write("boot", format!("btime {seconds}\nprocesses 1\n"));
        self.write_stat();
    }

    fn write_stat(&self) {
        let part = |name: &str| fs::read_to_string(self.path(name)).unwrap_or_default();
        self.write("proc/stat", part("cpu") + &part("boot"));
    }

    fn uptime(&self, seconds: u64) {
        self.write("proc/uptime", format!("{seconds}.00 0.00\n"));
    }

    fn memory(&self, lines: &str) {
        self.write("proc/meminfo", lines);
    }

    /// Sets the network interfaces and the number of KiB that each has received.
    fn interfaces(&self, interfaces: &[(&str, u64)]) {
        let line =
            |&(name, kib): &(&str, u64)| format!("  {name}: {} 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n", kib * 1024);
        let lines: Vec<_> = interfaces.iter().map(line).collect();
        self.write("proc/net/dev", format!("head\nhead\n{}", lines.concat()));
    }

    fn namespace(&self, name: &str) {
        let path = self.path("proc/self/ns/pid");
        let _ = fs::remove_file(&path);
        symlink(Path::new(name), path).unwrap();
    }

    /// Makes an interface part of another one.
    fn enslave(&self, interface: &str, master: &str) {
        let folder = self.path(&format!("sys/class/net/{interface}"));
        fs::create_dir_all(&folder).unwrap();
        symlink(format!("../{master}"), folder.join("master")).unwrap();
    }

    /// Writes the `stat` of a process, whose name is escaped as in the kernel.
    fn process(&self, pid: u32, comm: &[u8], start_ticks: u64, cpu_ticks: u64) {
        let numbers = format!(") S 1 1 1 0 -1 0 0 0 0 0 {cpu_ticks} 0 0 0 20 0 1 0 {start_ticks} 0 25 0\n");
        let stat = [format!("{pid} (").as_bytes(), comm, numbers.as_bytes()].concat();
        self.write(&format!("proc/{pid}/stat"), stat);
    }

    /// Writes the files of a process from which its owner is read.
    fn owner(&self, pid: u32, user: u32, cgroup: &str, command_line: &str) {
        let status = format!("Name:\tx\nUid:\t0\t{user}\t0\t0\nGid:\t0\t0\t0\t0\n");
        self.write(&format!("proc/{pid}/status"), status);
        self.write(&format!("proc/{pid}/cgroup"), format!("0::{cgroup}\n"));
        self.write(&format!("proc/{pid}/cmdline"), command_line);
    }

    fn end(&self, pid: u32) {
        fs::remove_dir_all(self.path(&format!("proc/{pid}"))).unwrap();
    }

    fn sampler(&self) -> Sampler {
        let roots = Roots {
            proc: self.path("proc"),
            sys: self.path("sys"),
            root: self.path(""),
        };
        Sampler::new(
            "vm-1".parse().unwrap(),
            "+00:00".parse().unwrap(),
            Selection::All,
            roots,
        )
        .unwrap()
    }
}

/// What a sample is expected to contain.
#[derive(Debug, Clone, PartialEq)]
struct Expected {
    cpu_util: Option<f64>,
    mem: Option<f64>,
    proc: Option<u32>,
    restricted: Option<Restriction>,
    net_incoming: f64,
    processes: Vec<Row>,
}

/// A process row, without the values that the cases do not change.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    cmd: String,
    pid: u32,
    cpu_util: f64,
    mem: f64,
    running_time: f64,
    ended: bool,
}

fn row(cmd: &str, pid: u32, cpu_util: f64, running_time: f64) -> Row {
    Row {
        cmd: cmd.to_owned(),
        pid,
        cpu_util,
        mem: 10.0,
        running_time,
        ended: false,
    }
}

/// The rows of a tree that does not change.
fn unchanged() -> Expected {
    Expected {
        cpu_util: Some(0.0),
        mem: Some(25.0),
        proc: Some(2),
        restricted: None,
        net_incoming: 0.0,
        processes: vec![
            row("init", 1, 0.0, 1_482_236_500.01),
            row("worker", 7, 0.0, 1_482_236_516.07),
        ],
    }
}

impl From<Sample> for Expected {
    fn from(sample: Sample) -> Self {
        let vm = sample.vm.unwrap();
        let to_row = |process: ProcessSample| Row {
            cmd: process.cmd,
            pid: process.pid,
            cpu_util: process.cpu_util,
            mem: process.mem,
            running_time: process.running_time,
            ended: process.shutdown_time.is_some(),
        };
        let mut processes: Vec<Row> = sample.processes.into_iter().map(to_row).collect();
        processes.sort_by_key(|process| (process.pid, !process.ended));
        Self {
            cpu_util: vm.cpu_util,
            mem: vm.mem,
            proc: vm.proc,
            restricted: vm.restricted,
            net_incoming: sample.net_incoming,
            processes,
        }
    }
}

/// A case: the name, the change of the tree between two samples, and how the second sample differs from that of a tree
/// that does not change.
type Case = (&'static str, fn(&Tree), fn(&mut Expected));

const CASES: [Case; 24] = [
    ("nothing changes", |_| {}, |_| {}),
    (
        "CPU time passes",
        |tree| tree.cpu("1100 1010 1050 1005000 1000 505 505 505", 2),
        |row| row.cpu_util = Some(45.0),
    ),
    (
        "user time decreases",
        |tree| tree.cpu("0 10 1050 1001000 500 5 5 5", 2),
        |row| row.cpu_util = Some(50.0),
    ),
    (
        "system time decreases",
        |tree| tree.cpu("1100 10 0 1003000 500 5 5 5", 2),
        |row| row.cpu_util = Some(25.0),
    ),
    (
        "stolen time decreases",
        |tree| tree.cpu("1100 10 50 1001000 500 5 5 0", 2),
        |row| row.cpu_util = Some(50.0),
    ),
    (
        "time waiting for I/O decreases",
        |tree| tree.cpu("1100 10 50 1003000 0 5 5 5", 2),
        |row| row.cpu_util = Some(25.0),
    ),
    (
        "idle time decreases",
        |tree| tree.cpu("1100 10 50 999999 500 5 5 5", 2),
        |row| row.cpu_util = None,
    ),
    (
        "a CPU is added",
        |tree| tree.cpu("1100 10 50 5000000 500 5 5 5", 3),
        |row| row.cpu_util = None,
    ),
    (
        "a CPU is removed",
        |tree| tree.cpu("1100 10 50 1001000 500 5 5 5", 1),
        |row| row.cpu_util = None,
    ),
    (
        "old kernel without MemAvailable",
        |tree| tree.memory("MemTotal: 1000 kB\nMemFree: 500 kB\nBuffers: 50 kB\nCached: 150 kB\n"),
        |row| row.mem = Some(30.0),
    ),
    (
        "neither MemAvailable nor Cached",
        |tree| tree.memory("MemTotal: 1000 kB\nMemFree: 500 kB\nBuffers: 50 kB\nSwapCached: 150 kB\n"),
        |row| row.mem = None,
    ),
    (
        "no MemTotal",
        |tree| tree.memory("MemFree: 500 kB\nMemAvailable: 750 kB\n"),
        |row| {
            row.mem = None;
            row.processes.iter_mut().for_each(|process| process.mem = 0.0);
        },
    ),
    (
        "foreign pid namespace",
        |tree| tree.namespace("pid:[4026532777]"),
        |row| (row.proc, row.restricted) = (None, Some(Restriction::PidNamespace)),
    ),
    (
        "network traffic",
        |tree| tree.interfaces(&[("lo", 99_000), ("eth0", 11_000)]),
        |row| row.net_incoming = 1.0,
    ),
    (
        "network counter decreases",
        |tree| tree.interfaces(&[("lo", 0), ("eth0", 5)]),
        |_| {},
    ),
    (
        "clock is set forward by three hours",
        |tree| tree.boot(1_482_236_500 + 10_800),
        |row| {
            row.processes[0].running_time += 10_800.0;
            row.processes[1].running_time += 10_800.0;
        },
    ),
    (
        "clock is set back by five hours",
        |tree| {
            tree.boot(1_482_236_500 - 18_000);
            tree.process(7, b"worker", 1607, 1000 + 500_000);
        },
        |row| {
            row.processes[0].running_time -= 18_000.0;
            row.processes[1].running_time -= 18_000.0;
            row.processes[1].cpu_util = 50.0;
        },
    ),
    (
        "boot time differs by a rounding error",
        |tree| tree.boot(1_482_236_501),
        |_| {},
    ),
    (
        "suspended for a day and resumed",
        |tree| {
            tree.uptime(20_000 + 10_000 + 86_400);
            tree.process(7, b"worker", 1607, 1000 + 500_000);
            // This process started before the VM was suspended, 5,000 s after the previous sample.
            tree.process(8, b"new", 2_500_000, 250_000);
        },
        |row_| {
            row_.proc = Some(3);
            row_.processes[1].cpu_util = 50.0;
            row_.processes.push(row("new", 8, 25.0, 1_482_261_500.0));
        },
    ),
    (
        "name of spaces and brackets",
        |tree| tree.process(8, b"a) S 1 (b c", 1, 0),
        |row_| {
            row_.proc = Some(3);
            row_.processes.push(row("a) S 1 (b c", 8, 0.0, 1_482_236_500.01));
        },
    ),
    (
        "name of line breaks",
        |tree| tree.process(8, br"\n7 (fake\\", 1, 0),
        |row_| {
            row_.proc = Some(3);
            row_.processes.push(row("\n7 (fake\\", 8, 0.0, 1_482_236_500.01));
        },
    ),
    (
        "name that is not UTF-8",
        |tree| tree.process(8, b"latin-1 \xe9\xff", 1, 0),
        |row_| {
            row_.proc = Some(3);
            row_.processes
                .push(row("latin-1 \u{fffd}\u{fffd}", 8, 0.0, 1_482_236_500.01));
        },
    ),
    (
        "process ends",
        |tree| tree.end(7),
        |row| {
            row.proc = Some(1);
            row.processes[1].ended = true;
            row.processes[1].mem = 0.0;
        },
    ),
    (
        "process runs in several threads on several CPUs",
        |tree| tree.process(7, b"worker", 1607, 1000 + 3_500_000),
        |row| row.processes[1].cpu_util = 350.0,
    ),
];

#[test]
fn rows_of_made_proc_trees_are_as_expected() {
    for (name, change, differs) in CASES {
        let tree = Tree::new();
        let mut sampler = tree.sampler();
        sampler.sample().unwrap();
        sampler.vm.age(INTERVAL);
        sampler.processes.age(INTERVAL);
        change(&tree);
        let mut expected = unchanged();
        differs(&mut expected);
        assert_eq!(Expected::from(sampler.sample().unwrap()), expected, "{name}");
        // The cause has ended or has become normal, so the next sample has all values again.
        let next = sampler.sample().unwrap();
        let vm = next.vm.unwrap();
        let memory_known = expected.mem.is_some();
        assert_eq!(
            (vm.cpu_util, vm.mem.is_some()),
            (Some(0.0), memory_known),
            "{name}"
        );
        assert!(
            next.processes
                .iter()
                .all(|process| process.shutdown_time.is_none()),
            "{name}"
        );
    }
}

#[test]
fn number_of_processes_is_unknown_while_some_are_hidden() {
    let tree = Tree::new();
    tree.end(1);
    let mut sampler = tree.sampler();
    let sample = sampler.sample().unwrap();
    let vm = sample.vm.unwrap();
    assert_eq!((vm.proc, vm.restricted), (None, Some(Restriction::Hidepid)));
    assert_eq!(sample.processes.len(), 1);
    tree.process(1, b"init", 1, 0);
    let vm = sampler.sample().unwrap().vm.unwrap();
    assert_eq!((vm.proc, vm.restricted), (Some(2), None));
}

#[test]
fn process_rows_have_owner_and_full_name() {
    const CONTAINER: &str = "8f3b1c2d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9";
    let tree = Tree::new();
    tree.write(
        "etc/passwd",
        "root:x:0:0::/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\nweb:x:33:33::/:/bin/false\n",
    );
    tree.owner(1, 0, "/init.scope", "/sbin/init\0--token\0hunter2\0");
    tree.owner(7, 33, "/system.slice/nginx.service", "");
    tree.process(8, b"systemd-journal", 1, 0);
    tree.owner(
        8,
        4711,
        &format!("/docker/{CONTAINER}"),
        "/lib/systemd/systemd-journald\0",
    );
    let owners = |sampler: &mut Sampler| {
        let mut rows = sampler.sample().unwrap().processes;
        rows.sort_by_key(|row| row.pid);
        let owner = |row: ProcessSample| (row.cmd, row.owner);
        rows.into_iter().map(owner).collect::<Vec<_>>()
    };
    let owner = |user: &str, unit: Option<&str>, container: Option<&str>| ProcessOwner {
        user: Some(user.to_owned()),
        parent_pid: Some(1),
        unit: unit.map(str::to_owned),
        container: container.map(str::to_owned),
        ..ProcessOwner::default()
    };
    let mut sampler = tree.sampler();
    let mut expected = vec![
        ("init".to_owned(), owner("root", Some("init.scope"), None)),
        ("worker".to_owned(), owner("web", Some("nginx.service"), None)),
        (
            "systemd-journald".to_owned(),
            owner("4711", None, Some("8f3b1c2d4e5f")),
        ),
    ];
    assert_eq!(owners(&mut sampler), expected);

    // The service has moved to its own user and unit just after its start. Of the container, the name is known now.
    tree.owner(7, 0, "/system.slice/other.service", "");
    tree.write(
        &format!("var/log/containers/web-7f_shop_nginx-{CONTAINER}.log"),
        "",
    );
    expected[1].1 = owner("root", Some("other.service"), None);
    expected[2].1 = owner("4711", None, Some("shop/web-7f/nginx"));
    assert_eq!(owners(&mut sampler), expected);
    // Later changes are read when the name or the parent of the process changes.
    tree.owner(7, 33, "/system.slice/nginx.service", "");
    assert_eq!(owners(&mut sampler), expected);
    tree.process(7, b"changed", 1607, 1000);
    expected[1] = ("changed".to_owned(), owner("web", Some("nginx.service"), None));
    assert_eq!(owners(&mut sampler), expected);
    // The last row has the owner as well.
    tree.end(7);
    assert_eq!(owners(&mut sampler), expected);

    let mut sampler = tree.sampler().with_command_lines();
    let command_line = owners(&mut sampler).remove(0).1.command_line;
    assert_eq!(command_line.as_deref(), Some("/sbin/init --token ***"));
}

#[test]
fn process_rows_and_their_sample_have_cpu_seconds_of_the_interval() {
    let tree = Tree::new();
    let mut sampler = tree.sampler();
    let first = sampler.sample().unwrap();
    assert_eq!(first.vm_cpu, None);
    assert!(first.processes.iter().all(|row| row.cpu_seconds.is_none()));
    tree.cpu("225 10 850 1001000 500 5 5 5", 2);
    tree.process(7, b"worker", 1607, 1000 + 123);
    // How much of this process's time is older than the interval is unknown.
    tree.process(9, b"found late", 1, 5000);
    let mut next = sampler.sample().unwrap();
    let vm = CpuSeconds {
        user: 1.25,
        nice: 0.0,
        system: 8.0,
    };
    assert_eq!(next.vm_cpu, Some(vm));
    next.processes.sort_by_key(|row| row.pid);
    let seconds: Vec<_> = next.processes.iter().map(|row| row.cpu_seconds).collect();
    assert_eq!(seconds, [Some(0.0), Some(1.23), None]);
    tree.end(7);
    let last = sampler.sample().unwrap();
    let ended = last.processes.iter().find(|row| row.shutdown_time.is_some());
    assert_eq!(ended.map(|row| (row.pid, row.cpu_seconds)), Some((7, None)));
}

#[test]
fn traffic_of_an_interface_and_its_master_counts_once() {
    // A container with a bridge: eth0 and veth1 belong to br0, and all three are virtual.
    let bridge = Tree::new();
    fs::remove_dir_all(bridge.path("sys/class/net/eth0")).unwrap();
    bridge.enslave("eth0", "br0");
    bridge.enslave("veth1", "br0");
    // A network card and its virtual function, as on Hyper-V; both are devices.
    let function = Tree::new();
    fs::create_dir_all(function.path("sys/class/net/enP1/device")).unwrap();
    function.enslave("enP1", "eth0");
    // A bond of two network cards; the bond itself is no device.
    let bond = Tree::new();
    for card in ["eth0", "eth1"] {
        fs::create_dir_all(bond.path(&format!("sys/class/net/{card}/device"))).unwrap();
        bond.enslave(card, "bond0");
    }
    for (tree, interfaces) in [
        (bridge, ["br0", "eth0", "veth1"].as_slice()),
        (function, &["eth0", "enP1"]),
        (bond, &["bond0", "eth0"]),
    ] {
        let counters = |kib| interfaces.iter().map(|name| (*name, kib)).collect::<Vec<_>>();
        tree.interfaces(&counters(0));
        let mut sampler = tree.sampler();
        sampler.sample().unwrap();
        sampler.vm.age(INTERVAL);
        tree.interfaces(&counters(25_000));
        assert_eq!(sampler.sample().unwrap().net_incoming, 2.5, "{interfaces:?}");
    }
}

#[test]
fn ten_thousand_processes_are_sampled() {
    let tree = Tree::new();
    for pid in 10..10_008 {
        tree.process(pid, b"one of many", 1, 0);
    }
    let mut sampler = tree.sampler();
    sampler.sample().unwrap();
    sampler.processes.age(INTERVAL);
    tree.process(9000, b"one of many", 1, 250_000);
    let sample = sampler.sample().unwrap();
    assert_eq!(sample.vm.unwrap().proc, Some(10_000));
    let mut busy = sample.processes.iter().filter(|row| row.cpu_util > 0.0);
    assert_eq!(sample.processes.len(), 10_000);
    assert_eq!(busy.next().map(|row| (row.pid, row.cpu_util)), Some((9000, 25.0)));
    assert_eq!(busy.next(), None);
}
