//! On real QEMU under a real libvirtd: what the test hypervisor cannot show. The machines have no disk: their firmware
//! runs and hears no power button.

use std::{
    fs,
    time::{Duration, Instant},
};

use testkit::{Libvirtd, PATIENCE, eventually};
use vmwatch_api::{
    lifecycle::{
        ForceStop, List, MachineState, Operation, OperationState, Page, Reboot, RebootTarget, Stop, Verb,
    },
    wire::FaultKind,
};

use crate::support::{Replica, World, instance_id, keyed, operator, states, target, within};

const VM: &str = "0f5d5a34-7c1e-4d7c-9a55-0d6a1f2b3c4d";
const BROKEN: &str = "1f5d5a34-7c1e-4d7c-9a55-0d6a1f2b3c4d";
/// The machine of libvirt's built-in test hypervisor.
const TEST_VM: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

/// Defines a machine that is off, with these devices.
fn define(libvirtd: &Libvirtd, world: &World, uuid: &str, devices: &str) {
    let domain = format!(
        "<domain type='qemu'><name>vm-{uuid}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{devices}</devices></domain>"
    );
    let file = world.path().join(format!("{uuid}.xml"));
    fs::write(&file, domain).unwrap();
    libvirtd.virsh(&["define", &file.display().to_string()]);
}

/// A libvirtd with a machine that is off, and the service on it and on libvirt's test hypervisor.
async fn scene(settings: &[(&str, &str)]) -> (World, Libvirtd, Replica) {
    let (world, libvirtd) = tokio::join!(World::new(), Libvirtd::start());
    define(&libvirtd, &world, VM, "");
    let service = replica(&world, &libvirtd, "lifecycle", settings).await;
    (world, libvirtd, service)
}

async fn replica(world: &World, libvirtd: &Libvirtd, name: &str, settings: &[(&str, &str)]) -> Replica {
    let hypervisors = format!("lab={},test=test:///default", libvirtd.uri());
    let own = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_HYPERVISOR_TIMEOUT", "2s"),
    ];
    let all: Vec<_> = own.into_iter().chain(settings.iter().copied()).collect();
    let replica = world.replica(name, &all).await;
    eventually("it has found libvirtd", PATIENCE, async || {
        let log = replica.0.log();
        log.contains("reachable hypervisor=\"lab\"")
            .then_some(())
            .ok_or(log)
    })
    .await;
    replica
}

fn says(operation: &Operation, words: &str) -> bool {
    operation.history.iter().any(|event| event.text.contains(words))
}

#[tokio::test]
async fn a_real_machine_goes_up_and_down_and_virsh_says_the_same() {
    let (world, libvirtd, _service) = scene(&[("VMWATCH_OPERATION_LIMIT", "4s")]).await;
    let domstate = || libvirtd.virsh(&["domstate", VM]);
    assert_eq!(domstate(), "shut off");
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);
    assert_eq!(domstate(), "running");

    libvirtd.virsh(&["suspend", VM]);
    assert_eq!(world.state(VM).await.unwrap(), MachineState::Paused);
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);
    assert_eq!(domstate(), "running");

    let reset = RebootTarget {
        instance_id: instance_id(VM),
        hard: true,
    };
    world.bus.call::<Reboot>(&operator(), &reset).await.unwrap();
    let list = world
        .bus
        .call::<List>(&operator(), &Page::default())
        .await
        .unwrap();
    let listed = list
        .machines
        .iter()
        .find(|machine| machine.instance_id.as_str() == VM)
        .unwrap();
    assert_eq!(
        (listed.hypervisor.as_str(), listed.state),
        ("lab", MachineState::Running)
    );

    // Nobody inside hears the power button: the caller is told so, and nothing is cut behind its back.
    let (context, id) = keyed(PATIENCE, Verb::Stop, VM, "k");
    let fault = world.bus.call::<Stop>(&context, &target(VM)).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Timeout);
    assert!(fault.message.contains("the machine is running"), "{fault}");
    assert_eq!(
        world.operation(&id).await.unwrap().state,
        OperationState::TimedOut
    );
    assert_eq!(domstate(), "running");

    let machine = world
        .bus
        .call::<ForceStop>(&operator(), &target(VM))
        .await
        .unwrap();
    assert_eq!(machine.state, MachineState::ShutOff);
    assert_eq!(domstate(), "shut off");
}

#[tokio::test]
async fn a_machine_that_cannot_come_up_is_a_failure_with_libvirts_reason() {
    let (world, libvirtd, _service) = scene(&[]).await;
    let disk = "<disk type='file'><source file='/nowhere/disk.img'/><target dev='vda' bus='virtio'/></disk>";
    define(&libvirtd, &world, BROKEN, disk);
    let (context, id) = keyed(PATIENCE, Verb::Start, BROKEN, "k");
    let fault = world.start(&context, BROKEN).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Backend);
    assert!(fault.message.starts_with("the hypervisor refused: "), "{fault}");
    assert!(fault.message.contains("/nowhere/disk.img"), "{fault}");
    let operation = world.operation(&id).await.unwrap();
    assert_eq!(operation.state, OperationState::Failed);
    assert!(says(&operation, "lab said: "), "{operation:?}");
    assert_eq!(libvirtd.virsh(&["domstate", BROKEN]), "shut off");
}

#[tokio::test]
async fn a_libvirtd_that_was_killed_is_found_again() {
    let (world, libvirtd, _service) = scene(&[]).await;
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);
    libvirtd.process.kill9();
    let fault = world.state(VM).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Backend, "{fault}");
    let fault = world.start(&operator(), VM).await.unwrap_err();
    assert!(fault.message.contains("does not answer"), "{fault}");
    // The others go on.
    world.state(TEST_VM).await.unwrap();

    libvirtd.process.start_again();
    eventually("the machine is found again", PATIENCE, async || {
        world.state(VM).await.map_err(|fault| fault.to_string())
    })
    .await;
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);
    assert_eq!(libvirtd.virsh(&["domstate", VM]), "running");
}

#[tokio::test]
async fn a_start_whose_libvirtd_is_killed_ends_true_once_it_is_back() {
    let (world, libvirtd, service) = scene(&[]).await;
    let (context, id) = keyed(Duration::from_mins(1), Verb::Start, VM, "k");
    let starting = world.start(&context, VM);
    let killing = async {
        eventually("libvirtd is told", PATIENCE, async || {
            let log = service.0.log();
            log.contains("telling it").then_some(()).ok_or(log)
        })
        .await;
        libvirtd.process.kill9();
        libvirtd.process.start_again();
    };
    let (started, ()) = tokio::join!(starting, killing);
    // Whether libvirtd died before or after it had made the machine run, it runs now, and only once.
    assert_eq!(started.unwrap(), MachineState::Running);
    let operation = world.operation(&id).await.unwrap();
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert_eq!(states(&operation).last(), Some(&OperationState::Succeeded));
    assert_eq!(libvirtd.virsh(&["domstate", VM]), "running");
    assert_eq!(libvirtd.virsh(&["list", "--name"]), format!("vm-{VM}"));
}

#[tokio::test]
async fn a_libvirtd_that_hangs_stalls_no_other_hypervisors_machines() {
    let (world, libvirtd, _service) = scene(&[]).await;
    libvirtd.process.pause();
    let hanging = async {
        let of = within(PATIENCE);
        futures::future::join_all((0..20).map(|_| world.start(&of, VM))).await
    };
    let other = async {
        let began = Instant::now();
        for _ in 0..10 {
            assert_eq!(
                world.start(&operator(), TEST_VM).await.unwrap(),
                MachineState::Running
            );
        }
        began.elapsed()
    };
    let (answers, took) = tokio::join!(hanging, other);
    assert!(took < Duration::from_secs(2), "{took:?}");
    for answer in answers {
        assert_eq!(answer.unwrap_err().kind, FaultKind::Backend);
    }
    libvirtd.process.resume();
    eventually("it is started", PATIENCE, async || {
        world
            .start(&operator(), VM)
            .await
            .map_err(|fault| fault.to_string())
    })
    .await;
    assert_eq!(libvirtd.virsh(&["domstate", VM]), "running");
}

#[tokio::test]
async fn a_start_whose_service_is_killed_is_carried_on_by_another() {
    let (world, libvirtd, service) = scene(&[]).await;
    let (context, id) = keyed(Duration::from_mins(1), Verb::Start, VM, "k");
    libvirtd.process.pause();
    let (bus, asked) = (world.bus.clone(), context.clone());
    let asking = tokio::spawn(async move {
        let _ = bus
            .call::<vmwatch_api::lifecycle::Start>(&asked, &target(VM))
            .await;
    });
    eventually("it is on record", PATIENCE, async || {
        world.operation(&id).await.map_err(|fault| fault.to_string())
    })
    .await;
    service.0.kill9();
    asking.abort();
    libvirtd.process.resume();
    let _next = replica(&world, &libvirtd, "next", &[]).await;
    let operation = world.ended(&id).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert!(says(&operation, "adopted"), "{operation:?}");
    assert_eq!(libvirtd.virsh(&["domstate", VM]), "running");
}
