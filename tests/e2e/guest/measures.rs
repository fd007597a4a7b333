//! Compares what the hypervisor measures of a VM with what the agent in the VM measures, under a constant load of CPU, disk
//! and network. The VM has a tap, whose traffic libvirt counts; the test creates it for the user of libvirtd.

use std::{
    fs,
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    process::{self, Command},
    time::Duration,
};

use futures::StreamExt;
use serde_json::{Value, json};
use testkit::{Libvirtd, NOBODY, Program, Stack, codes, eventually, figure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{MissedTickBehavior, interval},
};
use vmwatch_api::{
    Role, Scope,
    hypervisor_samples::{HypervisorSample, hypervisor_sample_subject},
};

const GUEST: &str = "7b1d6c52-0e4f-4c3a-8d9e-5f2a7c1b3e60";
/// Time limit from power-on until the load runs.
const BOOT: Duration = Duration::from_mins(2);
/// Number of samples of the hypervisor that are compared, and their interval.
const SAMPLES: usize = 10;
const INTERVAL: &str = "3s";
/// The smallest and the largest permitted ratio of what the host and the guest measure.
const RATIO: std::ops::RangeInclusive<f64> = 0.9..=1.1;
/// Network load in each direction: this many bytes, this many times a second.
const CHUNK: usize = 64 << 10;
const CHUNKS_PER_SECOND: u32 = 16;
/// Without KVM, the guest takes the time in which it waits for a CPU of the host for its own CPU time. With more of it, in
/// percent, the CPU usage from both sources is not comparable, because other programs use the host.
const MAX_STEAL: f64 = 5.0;

/// A tap of the host, with an address in a network of its own. It is deleted when this value is dropped.
struct Tap {
    name: String,
    network: u8,
}

impl Tap {
    fn new() -> Self {
        let tap = Self {
            name: format!("vmw{}", process::id()),
            network: u8::try_from(process::id() % 250).unwrap(),
        };
        let owner = NOBODY.to_string();
        ip(&["tuntap", "add", "dev", &tap.name, "mode", "tap", "user", &owner]);
        ip(&[
            "address",
            "add",
            &format!("{}/24", tap.address(1)),
            "dev",
            &tap.name,
        ]);
        ip(&["link", "set", &tap.name, "up"]);
        tap
    }

    /// The host has the number 1, the guest the number 2.
    fn address(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.network, number)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.name]).status();
    }
}

fn ip(args: &[&str]) {
    let status = Command::new("ip")
        .args(args)
        .status()
        .expect("`ip` of iproute2 is installed");
    assert!(status.success(), "ip {args:?}");
}

/// A direction of the network load.
#[derive(Debug, Clone, Copy)]
enum Direction {
    ToGuest,
    FromGuest,
}

/// Exchanges data with each client at a constant rate, and returns the port.
fn serve(address: Ipv4Addr, direction: Direction) -> u16 {
    let socket = TcpSocket::new_v4().unwrap();
    // With a small buffer, the client can send hardly faster than this program reads.
    socket.set_recv_buffer_size(32 << 10).unwrap();
    socket.bind(SocketAddr::from((address, 0))).unwrap();
    let listener = socket.listen(4).unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(exchange(client, direction));
        }
    });
    port
}

async fn exchange(mut client: TcpStream, direction: Direction) {
    let mut chunk = vec![0; CHUNK];
    let mut pace = interval(Duration::from_secs(1) / CHUNKS_PER_SECOND);
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        pace.tick().await;
        let done = match direction {
            Direction::ToGuest => client.write_all(&chunk).await,
            Direction::FromGuest => client.read_exact(&mut chunk).await.map(drop),
        };
        if done.is_err() {
            return;
        }
    }
}

/// The guest's first program. It starts the load once the second interface exists, and is replaced by the usual one. The
/// shell needs `/dev/null` to start anything in the background, which `/init` hides later under the usual `/dev`.
fn first_program(tap: &Tap, [to_guest, from_guest]: [u16; 2]) -> String {
    let (host, guest) = (tap.address(1), tap.address(2));
    format!(
        "#!/bin/sh\n\
         PATH=/bin\n\
         busybox mkdir -p /dev\n\
         busybox mknod /dev/null c 1 3\n\
         (\n\
         until busybox test -e /sys/class/net/eth1 -a -b /dev/vda; do busybox sleep 0.2; done\n\
         busybox ip link set eth1 up\n\
         busybox ip address add {guest}/24 dev eth1\n\
         while :; do busybox nc {host} {to_guest} </dev/null >/dev/null; busybox sleep 1; done &\n\
         while :; do busybox nc {host} {from_guest} </dev/zero >/dev/null; busybox sleep 1; done &\n\
         while :; do\n\
         busybox dd if=/dev/zero of=/dev/vda bs=64k count=16 oflag=direct 2>/dev/null\n\
         busybox dd if=/dev/vda of=/dev/null bs=64k count=32 iflag=direct 2>/dev/null\n\
         busybox sleep 0.5\n\
         done &\n\
         while :; do :; done\n\
         ) &\n\
         exec /init\n"
    )
}

/// A cpio archive in the format `newc` with these executable files. The kernel unpacks it before the archive that comes
/// after it.
pub(super) fn cpio(files: &[(&str, &str)]) -> Vec<u8> {
    let mut archive = Vec::new();
    let files = files.iter().map(|&(name, content)| (name, 0o100_755, content));
    for (name, mode, content) in files.chain([("TRAILER!!!", 0, "")]) {
        let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        write!(archive, "070701").unwrap();
        for field in fields {
            write!(archive, "{field:08x}").unwrap();
        }
        write!(archive, "{name}\0").unwrap();
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content.as_bytes());
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// Defines the guest with a second interface, a disk, a second virtual CPU, reports about its memory and the load.
fn define(libvirtd: &Libvirtd, tap: &Tap, ports: [u16; 2], settings: &[(&str, &str)]) {
    let initramfs = libvirtd.image().join("initramfs.gz");
    let mut image = cpio(&[("load", &first_program(tap, ports))]);
    image.extend(fs::read(&initramfs).unwrap());
    let with_load = libvirtd.image().join("with-load.gz");
    fs::write(&with_load, image).unwrap();
    let disk = libvirtd.disk("disk.img", 16 << 20);
    let devices = format!(
        "<disk type='file'><driver name='qemu' type='raw'/><source file='{}'/><target dev='vda' bus='virtio'/></disk>\
         <interface type='ethernet'><target dev='{}' managed='no'/><model type='virtio'/></interface></devices>",
        disk.display(),
        tap.name
    );
    let domain = libvirtd.guest(GUEST, settings);
    let domain = domain
        .replace(&initramfs.display().to_string(), &with_load.display().to_string())
        .replace("<cmdline>", "<cmdline>rdinit=/load ")
        .replace("<vcpu>1</vcpu>", "<vcpu>2</vcpu>")
        .replace(
            "<memballoon model='virtio'/>",
            "<memballoon model='virtio'><stats period='2'/></memballoon>",
        )
        .replace("</devices>", &devices);
    libvirtd.define(GUEST, &domain);
}

/// A measure, its minimum under load, and its values from both sources.
type Measure = (&'static str, f64, fn(&HypervisorSample) -> Option<f64>);

const MEASURES: [Measure; 6] = [
    ("cpu_util", 30.0, |sample| sample.cpu_util),
    ("mem", 1.0, |sample| sample.mem),
    ("disk_read", 100.0, |sample| sample.disk_read),
    ("disk_write", 100.0, |sample| sample.disk_write),
    ("net_incoming", 500.0, |sample| sample.net_incoming),
    ("net_outgoing", 500.0, |sample| sample.net_outgoing),
];

/// Whether all measures show the load.
fn is_loaded(sample: &HypervisorSample) -> bool {
    MEASURES
        .iter()
        .all(|(_, least, measure)| measure(sample).is_some_and(|value| value >= *least))
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let values: Vec<_> = values.collect();
    assert!(!values.is_empty());
    values.iter().sum::<f64>() / f64::from(u32::try_from(values.len()).unwrap())
}

#[tokio::test]
async fn hypervisor_and_agent_measure_the_same_load() {
    let tap = Tap::new();
    let libvirtd = Libvirtd::start_with_taps().await;
    let hypervisor = format!("lab={}", libvirtd.uri());
    let stack = Stack::builder()
        .set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisor)
        .set(Program::Lifecycle, "VMWATCH_HYPERVISOR_SAMPLE_INTERVAL", INTERVAL)
        .start()
        .await;
    let ports = [Direction::ToGuest, Direction::FromGuest].map(|direction| serve(tap.address(1), direction));
    // QEMU's user network maps 10.0.2.2 to this machine's loopback address.
    let bus = stack.nats.url().replace("127.0.0.1", "10.0.2.2");
    let settings = [
        ("NATS_URL", &*bus),
        ("AGENT_VM_INTERVAL", "1s"),
        ("AGENT_PROCESS_INTERVAL", "30s"),
    ];
    define(&libvirtd, &tap, ports, &settings);
    let client = stack.nats.connect("a test").await;
    let subject = hypervisor_sample_subject(&GUEST.parse().unwrap());
    let mut samples = client.client_for_tests().subscribe(subject).await.unwrap();
    libvirtd.virsh(&["start", GUEST]);

    let mut seen: Vec<HypervisorSample> = Vec::new();
    let collected = tokio::time::timeout(BOOT, async {
        // The load is complete in all samples that are compared.
        while seen.len() < SAMPLES + 1 {
            let message = samples.next().await.unwrap();
            let sample: HypervisorSample = serde_json::from_slice(&message.payload).unwrap();
            if !seen.is_empty() || is_loaded(&sample) {
                seen.push(sample);
            }
        }
    })
    .await;
    assert!(collected.is_ok(), "{seen:#?}\n{}", libvirtd.console(GUEST));
    // The first sample begins the time that is compared, and is not compared itself.
    let (from, to) = (seen[0].create_date.as_str(), seen[SAMPLES].create_date.as_str());

    let session = stack.session(Role::Operator, Scope::All).await;
    let gateway = stack.gateway(0);
    let rows = eventually("the agent's rows of this time are stored", BOOT, async || {
        let query = json!({ "instance_id": GUEST });
        let rows = gateway.rows(&session, codes::VM, 100, query).await;
        let is_complete = rows.iter().any(|row| row["create_date"].as_str() > Some(to));
        is_complete.then_some(rows).ok_or_else(|| libvirtd.console(GUEST))
    })
    .await;
    let is_between = |row: &&Value| {
        let at = row["create_date"].as_str();
        at > Some(from) && at <= Some(to)
    };
    let rows: Vec<_> = rows.iter().filter(is_between).collect();
    let steal = mean(seen[1..].iter().map(|sample| sample.steal.unwrap_or_default()));
    figure("hypervisor_to_agent_host_steal_percent", steal);
    let mut different = Vec::new();
    for (name, _, measure) in MEASURES {
        let host = mean(seen[1..].iter().map(|sample| measure(sample).unwrap()));
        let guest = mean(rows.iter().map(|row| row[name].as_f64().unwrap()));
        let ratio = host / guest;
        figure(&format!("hypervisor_to_agent_{name}_ratio"), ratio);
        let is_comparable = name != "cpu_util" || steal <= MAX_STEAL;
        if is_comparable && !RATIO.contains(&ratio) {
            different.push(format!("{name}: host {host}, guest {guest}"));
        }
    }
    assert!(
        different.is_empty(),
        "{different:?}, of {} rows, steal {steal}",
        rows.len()
    );
}
