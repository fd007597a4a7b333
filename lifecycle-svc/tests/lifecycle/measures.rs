//! Tests the measures that hypervisors give, with a real libvirtd and QEMU. The VM has no operating system; its firmware
//! reads the disk and uses CPU time.

use std::{fmt::Write as _, time::Duration};

use async_nats::jetstream::stream::Config;
use testkit::{Libvirtd, PATIENCE, eventually};
use vmwatch_api::{
    hypervisor_samples::{HYPERVISOR_SAMPLE_SUBJECT_PREFIX, HypervisorSample, hypervisor_sample_subject},
    metrics::SAMPLE_STREAM,
    time::{UtcOffset, unix_millis},
    vms::VmQuery,
};

use crate::support::{Replica, World, instance_id, operator};

const VM: &str = "0f5d5a34-7c1e-4d7c-9a55-0d6a1f2b3c4d";
const OFFSET: &str = "+08:00";
/// Maximum time from the start of a VM to its first rates, with the default interval.
const TARGET: Duration = Duration::from_secs(30);

async fn replica(world: &World, name: &str, libvirtd: &Libvirtd) -> Replica {
    let hypervisors = format!("lab={},test=test:///default", libvirtd.uri());
    let settings = [
        ("VMWATCH_HYPERVISORS", &*hypervisors),
        ("VMWATCH_HYPERVISOR_SAMPLE_INTERVAL", "1s"),
        ("VMWATCH_UTC_OFFSET", OFFSET),
    ];
    world.replica(name, &settings).await
}

/// Creates the stream of samples, which metrics-svc owns.
async fn create_stream(world: &World) {
    let stream = Config {
        name: SAMPLE_STREAM.to_owned(),
        subjects: vec![format!("{HYPERVISOR_SAMPLE_SUBJECT_PREFIX}*")],
        ..Config::default()
    };
    world.bus.create_stream(&stream, PATIENCE).await.unwrap();
}

async fn last_sequence(world: &World) -> u64 {
    let info = world.bus.stream_info(SAMPLE_STREAM, PATIENCE).await.unwrap();
    info.state.last_sequence
}

/// Waits for a sample after this sequence number, and returns it with its own number.
async fn next(
    world: &World,
    after: u64,
    is_wanted: fn(&HypervisorSample) -> bool,
) -> (u64, HypervisorSample) {
    let mut seen = String::new();
    let mut sequence = after + 1;
    eventually("the wanted sample is published", TARGET, async || {
        while let Some(message) = world
            .bus
            .message(SAMPLE_STREAM, sequence, PATIENCE)
            .await
            .unwrap()
        {
            let sample: HypervisorSample = serde_json::from_slice(&message.payload).unwrap();
            assert_eq!(&*message.subject, hypervisor_sample_subject(&sample.instance_id));
            if is_wanted(&sample) {
                return Ok((sequence, sample));
            }
            let _ = writeln!(seen, "{sample:?}");
            sequence += 1;
        }
        Err(seen.clone())
    })
    .await
}

/// The number of measures with this result that the replica has counted for the hypervisor.
async fn counted(replica: &Replica, metric: &str, hypervisor: &str, result: &str) -> u64 {
    let metrics = replica.get("/metrics").await.unwrap();
    let series = format!("{metric}{{hypervisor=\"{hypervisor}\",result=\"{result}\"}} ");
    let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
    value.map_or(0, |value| value.parse().unwrap())
}

#[tokio::test]
async fn running_vm_without_agent_has_measures_from_its_hypervisor() {
    let (world, libvirtd) = tokio::join!(World::new(), Libvirtd::start());
    let disk = libvirtd.disk("disk.img", 1 << 20);
    let domain = format!(
        "<domain type='qemu'><name>vm</name><uuid>{VM}</uuid><memory unit='MiB'>64</memory><vcpu>2</vcpu>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>\
         <disk type='file'><source file='{}'/><target dev='vda' bus='virtio'/></disk>\
         <interface type='user'><model type='virtio'/></interface></devices></domain>",
        disk.display()
    );
    libvirtd.define(VM, &domain);
    let one = replica(&world, "one", &libvirtd).await;
    let two = replica(&world, "two", &libvirtd).await;
    libvirtd.virsh(&["start", VM]);

    // Samples that cannot be stored are counted and logged.
    eventually(
        "a sample is lost, because there is no stream",
        PATIENCE,
        async || {
            let mut lost = 0;
            for replica in [&one, &two] {
                lost += counted(replica, "vmwatch_hypervisor_samples_total", "lab", "lost").await;
            }
            (lost > 0).then_some(()).ok_or_else(|| one.0.log())
        },
    )
    .await;
    let log = format!("{}{}", one.0.log(), two.0.log());
    assert!(log.contains("publishing measures of VMs failed"), "{log}");

    create_stream(&world).await;
    let (sequence, sample) = next(&world, 0, |sample| sample.cpu_util.is_some()).await;
    assert_eq!(
        (&sample.instance_id, &*sample.hypervisor),
        (&instance_id(VM), "lab")
    );
    assert_eq!(sample.cores, Some(2));
    for percent in [sample.cpu_util, sample.steal] {
        assert!((0.0..=100.0).contains(&percent.unwrap()), "{sample:?}");
    }
    assert!(
        sample.disk_read.is_some() && sample.disk_write == Some(0.0),
        "{sample:?}"
    );
    // libvirt counts nothing for an interface of user space, and this guest reports nothing about its memory.
    let unknown = (sample.mem, sample.net_incoming, sample.net_outgoing);
    assert_eq!(unknown, (None, None, None));
    let offset: UtcOffset = OFFSET.parse().unwrap();
    let at = offset.unix_millis_of(sample.create_date.as_str()).unwrap();
    assert!(unix_millis().abs_diff(at) < 60_000, "{sample:?}");

    // Only the replica that polls the hypervisor reads its counters.
    for replica in [&one, &two] {
        let metrics = replica.get("/metrics").await.unwrap();
        let polls = metrics.contains("vmwatch_hypervisor_polled{hypervisor=\"lab\"} 1");
        let reads = counted(
            replica,
            "vmwatch_hypervisor_measurements_total",
            "lab",
            "complete",
        )
        .await;
        assert_eq!(reads > 0, polls, "{metrics}");
    }

    // A VM that was started again begins without rates.
    next(&world, sequence, |sample| sample.cpu_util.is_some()).await;
    let before = last_sequence(&world).await;
    libvirtd.virsh(&["destroy", VM]);
    libvirtd.virsh(&["start", VM]);
    let (restarted, sample) = next(&world, before, |sample| sample.cpu_util.is_none()).await;
    assert_eq!((sample.disk_read, sample.steal), (None, None));
    next(&world, restarted, |sample| sample.cpu_util.is_some()).await;
}

/// The samples of two copies of a VM that run at the same time do not alternate.
#[tokio::test]
async fn samples_of_a_vm_that_runs_on_two_hypervisors_are_those_of_one() {
    let (world, one, two) = tokio::join!(World::new(), Libvirtd::start(), Libvirtd::start());
    create_stream(&world).await;
    for libvirtd in [&one, &two] {
        let domain = format!(
            "<domain type='qemu'><name>vm</name><uuid>{VM}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os>\
             <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices></domain>"
        );
        libvirtd.define(VM, &domain);
        libvirtd.virsh(&["start", VM]);
    }
    let hypervisors = format!("a={},b={}", one.uri(), two.uri());
    let settings = [
        ("VMWATCH_HYPERVISORS", &*hypervisors),
        ("VMWATCH_STATE_INTERVAL", "500ms"),
        ("VMWATCH_HYPERVISOR_SAMPLE_INTERVAL", "1s"),
    ];
    let _service = world.replica("lifecycle", &settings).await;
    eventually("both copies are listed", PATIENCE, async || {
        let page = world.vms(&operator(), &VmQuery::default()).await;
        let is_listed = page.vms.iter().any(|vm| vm.copies.len() == 2);
        is_listed.then_some(()).ok_or_else(|| format!("{page:?}"))
    })
    .await;
    // Samples from before that may still arrive.
    let (mut sequence, _) = next(&world, last_sequence(&world).await, |sample| {
        sample.hypervisor == "a"
    })
    .await;
    (sequence, _) = next(&world, sequence, |sample| sample.hypervisor == "a").await;
    for _ in 0..4 {
        let (at, sample) = next(&world, sequence, |_| true).await;
        assert_eq!(sample.hypervisor, "a");
        sequence = at;
    }
    one.virsh(&["destroy", VM]);
    // The counters of the other copy were read all the time, so its first sample has rates.
    let (_, sample) = next(&world, sequence, |sample| sample.hypervisor == "b").await;
    assert!(sample.cpu_util.is_some(), "{sample:?}");
}

/// A hypervisor that does not answer costs no more than its own measures.
#[tokio::test]
async fn failed_reading_of_counters_is_counted_and_repeated() {
    let (world, libvirtd) = tokio::join!(World::new(), Libvirtd::start());
    create_stream(&world).await;
    let one = replica(&world, "one", &libvirtd).await;
    let read = async |result: &str, more_than: u64| {
        eventually(result, PATIENCE, async || {
            let count = counted(&one, "vmwatch_hypervisor_measurements_total", "lab", result).await;
            (count > more_than).then_some(count).ok_or_else(|| one.0.log())
        })
        .await
    };
    let complete = read("complete", 0).await;
    libvirtd.process.kill9();
    read("failed", 0).await;
    libvirtd.process.start_again();
    read("complete", complete + 1).await;
    // libvirt's test driver has no counters, so nothing was published.
    assert_eq!(last_sequence(&world).await, 0);
    assert!(counted(&one, "vmwatch_hypervisor_measurements_total", "test", "complete").await > 0);
}
