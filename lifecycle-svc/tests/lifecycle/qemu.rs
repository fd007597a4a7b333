//! Tests with a real libvirtd and QEMU, for behaviour that libvirt's test driver cannot show. The VMs have no disk, so
//! only their firmware runs, which ignores the power button.

use std::{
    fs,
    time::{Duration, Instant},
};

use testkit::{Libvirtd, PATIENCE, eventually};
use vmwatch_api::{
    actions::VmAction,
    lifecycle::{
        ForceStop, MachineState, Operation, OperationState, Reboot, RebootTarget, Start, State, Stop,
    },
    vms::VmQuery,
    wire::FaultKind,
};

use crate::support::{Replica, World, instance_id, keyed, operator, states, target, within};

const VM: &str = "0f5d5a34-7c1e-4d7c-9a55-0d6a1f2b3c4d";
const BROKEN: &str = "1f5d5a34-7c1e-4d7c-9a55-0d6a1f2b3c4d";
/// The VM that libvirt's built-in test driver always has.
const TEST_VM: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

/// Defines a VM that is off and has these devices. They may be followed by further elements of the domain.
fn define(libvirtd: &Libvirtd, world: &World, uuid: &str, devices: &str) {
    let domain = format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>vm-{uuid}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{devices}</devices></domain>"
    );
    let file = world.path().join(format!("{uuid}.xml"));
    fs::write(&file, domain).unwrap();
    libvirtd.virsh(&["define", &file.display().to_string()]);
}

/// Starts a libvirtd with a VM that is off, and lifecycle-svc with this libvirtd and libvirt's test driver.
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
    eventually("lifecycle-svc is connected to libvirtd", PATIENCE, async || {
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
async fn real_qemu_vm_can_be_started_and_stopped() {
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
        hypervisor: None,
    };
    world.bus.call::<Reboot>(&operator(), &reset).await.unwrap();
    let list = world.vms(&operator(), &VmQuery::default()).await;
    let mut listed = list.vms.iter();
    let listed = listed.find(|vm| vm.instance_id.as_str() == VM).unwrap();
    assert_eq!(
        (listed.hypervisor.as_deref(), listed.state),
        (Some("lab"), Some(MachineState::Running))
    );

    // The firmware ignores the power button. The stop times out, and the power must not be cut.
    let (context, id) = keyed::<Stop>(PATIENCE, VM, "k");
    let fault = world.bus.call::<Stop>(&context, &target(VM)).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Timeout);
    assert!(fault.message.contains("the VM is running"), "{fault}");
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
async fn failed_vm_start_reports_libvirts_reason() {
    let (world, libvirtd, _service) = scene(&[]).await;
    let disk = "<disk type='file'><source file='/nowhere/disk.img'/><target dev='vda' bus='virtio'/></disk>";
    define(&libvirtd, &world, BROKEN, disk);
    let (context, id) = keyed::<Start>(PATIENCE, BROKEN, "k");
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
async fn lifecycle_svc_reconnects_to_restarted_libvirtd() {
    let (world, libvirtd, _service) = scene(&[]).await;
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);
    libvirtd.process.kill9();
    let fault = world.state(VM).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Backend, "{fault}");
    let fault = world.start(&operator(), VM).await.unwrap_err();
    assert!(fault.message.contains("does not answer"), "{fault}");
    // VMs of other hypervisors are not affected.
    world.state(TEST_VM).await.unwrap();

    libvirtd.process.start_again();
    eventually(
        "the VM of the restarted libvirtd is found",
        PATIENCE,
        async || world.state(VM).await.map_err(|fault| fault.to_string()),
    )
    .await;
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);
    assert_eq!(libvirtd.virsh(&["domstate", VM]), "running");
}

#[tokio::test]
async fn vm_start_in_progress_succeeds_after_libvirtd_restart() {
    let (world, libvirtd, service) = scene(&[]).await;
    let (context, id) = keyed::<Start>(Duration::from_mins(1), VM, "k");
    let starting = world.start(&context, VM);
    let killing = async {
        eventually("the action is sent to libvirtd", PATIENCE, async || {
            let log = service.0.log();
            log.contains("sending action to hypervisor")
                .then_some(())
                .ok_or(log)
        })
        .await;
        libvirtd.process.kill9();
        libvirtd.process.start_again();
    };
    let (started, ()) = tokio::join!(starting, killing);
    // Whether or not libvirtd had started the VM before it was killed, the VM runs now and was started once.
    assert_eq!(started.unwrap(), MachineState::Running);
    let operation = world.operation(&id).await.unwrap();
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert_eq!(states(&operation).last(), Some(&OperationState::Succeeded));
    assert_eq!(libvirtd.virsh(&["domstate", VM]), "running");
    assert_eq!(libvirtd.virsh(&["list", "--name"]), format!("vm-{VM}"));
}

#[tokio::test]
async fn hanging_libvirtd_does_not_delay_other_hypervisors() {
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
    eventually("the start succeeds", PATIENCE, async || {
        world
            .start(&operator(), VM)
            .await
            .map_err(|fault| fault.to_string())
    })
    .await;
    assert_eq!(libvirtd.virsh(&["domstate", VM]), "running");
}

#[tokio::test]
async fn another_replica_resumes_a_vm_start_of_a_killed_replica() {
    let (world, libvirtd, service) = scene(&[]).await;
    let (context, id) = keyed::<Start>(Duration::from_mins(1), VM, "k");
    libvirtd.process.pause();
    let (bus, asked) = (world.bus.clone(), context.clone());
    let asking = tokio::spawn(async move {
        let _ = bus
            .call::<vmwatch_api::lifecycle::Start>(&asked, &target(VM))
            .await;
    });
    eventually("the start attempt is recorded", PATIENCE, async || {
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

#[tokio::test]
async fn vm_that_was_undefined_while_running_can_be_stopped() {
    let (world, libvirtd, _service) = scene(&[]).await;
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);
    libvirtd.virsh(&["undefine", VM]);
    let machine = world.bus.call::<State>(&operator(), &target(VM)).await.unwrap();
    assert_eq!(machine.state, MachineState::Running);
    let reset = RebootTarget {
        instance_id: instance_id(VM),
        hypervisor: None,
        hard: true,
    };
    world.bus.call::<Reboot>(&operator(), &reset).await.unwrap();
    let stopped = world.bus.call::<ForceStop>(&operator(), &target(VM)).await;
    assert_eq!(stopped.unwrap().state, MachineState::ShutOff);
    let fault = world.state(VM).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::NotFound, "{fault}");
}

#[tokio::test]
async fn saved_vm_is_restored_or_the_fault_names_the_remedy() {
    let (world, libvirtd, _service) = scene(&[]).await;
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);
    libvirtd.virsh(&["managedsave", VM]);
    assert_eq!(world.state(VM).await.unwrap(), MachineState::ShutOff);
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);

    libvirtd.virsh(&["managedsave", VM]);
    let saved = libvirtd
        .home()
        .join(format!(".config/libvirt/qemu/save/vm-{VM}.save"));
    let mut image = fs::read(&saved).unwrap();
    let middle = image.len() / 2;
    image[middle..].fill(0);
    fs::write(&saved, &image).unwrap();
    let fault = world.start(&operator(), VM).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Backend, "{fault}");
    assert!(fault.message.contains("virsh managedsave-remove"), "{fault}");
    assert_eq!(world.state(VM).await.unwrap(), MachineState::ShutOff);
    libvirtd.virsh(&["managedsave-remove", VM]);
    assert_eq!(world.start(&operator(), VM).await.unwrap(), MachineState::Running);
}

/// The firmware reads the boot disk, whose reads fail.
#[tokio::test]
async fn vm_paused_by_a_disk_error_can_be_resumed_or_forced_off() {
    let (world, libvirtd, _service) = scene(&[]).await;
    let (disk, errors) = (
        libvirtd.home().join("disk.img"),
        libvirtd.home().join("errors.conf"),
    );
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    fs::write(&errors, "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\n").unwrap();
    let drive = format!(
        "if=none,id=bad,format=raw,readonly=on,rerror=stop,file=blkdebug:{}:{}",
        errors.display(),
        disk.display()
    );
    let arguments = [
        "-drive",
        &drive,
        "-device",
        "virtio-blk-pci,addr=0x1f,drive=bad,bootindex=1",
    ];
    let arguments = arguments
        .map(|argument| format!("<qemu:arg value='{argument}'/>"))
        .join("");
    let devices = format!("</devices><qemu:commandline>{arguments}</qemu:commandline><devices>");
    define(&libvirtd, &world, BROKEN, &devices);
    for _ in 0..2 {
        // The VM runs until the firmware reads the disk.
        match world.start(&operator(), BROKEN).await {
            Ok(state) => assert_eq!(state, MachineState::Running),
            Err(fault) => assert!(fault.message.contains("paused by a disk error"), "{fault}"),
        }
        eventually("the VM is paused", PATIENCE, async || {
            let machine = world.bus.call::<State>(&operator(), &target(BROKEN)).await;
            let machine = machine.map_err(|fault| fault.to_string())?;
            (machine.state == MachineState::Paused
                && machine.allowed_actions == [VmAction::Start, VmAction::ForceStop])
            .then_some(())
            .ok_or_else(|| format!("{machine:?}"))
        })
        .await;
        assert_eq!(
            libvirtd.virsh(&["domstate", "--reason", BROKEN]),
            "paused (I/O error)"
        );
    }
    let stopped = world.bus.call::<ForceStop>(&operator(), &target(BROKEN)).await;
    assert_eq!(stopped.unwrap().state, MachineState::ShutOff);
}
