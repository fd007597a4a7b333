//! Tests each state of a VM of libvirt's test driver with each action, and VMs that two hypervisors have.

use std::{fmt::Write as _, fs, path::Path, time::Duration};

use testkit::{PATIENCE, eventually};
use vmwatch_api::{
    actions::{Refusal, VmAction, all_refused},
    lifecycle::{
        ActionTarget, ForceStop, Machine, MachineState, OperationState, Reboot, RebootTarget, Start, State,
        Stop,
    },
    vms::VmQuery,
    wire::{Fault, FaultKind},
};

use crate::support::{World, instance_id, keyed, operator, target, target_on, within};

/// A VM of the test driver in one state: a virDomainState, and whether the VM is transient or saved.
struct Case {
    run_state: u8,
    is_transient: bool,
    is_saved: bool,
    state: MachineState,
    /// For start, stop, reboot, reset and `force_stop`.
    actions: [Expected; 5],
}

#[derive(Clone, Copy)]
enum Expected {
    /// The action succeeds, and the VM is in this state, or gone.
    Ends(Option<MachineState>),
    Refuses(Refusal),
    /// The test driver cannot carry out the action.
    Fails,
    /// The VM never leaves its state, so that the deadline passes.
    Waits,
}

use Expected::{Ends, Fails, Refuses as No, Waits};

const ON: Expected = Ends(Some(MachineState::Running));
const OFF: Expected = Ends(Some(MachineState::ShutOff));
const GONE: Expected = Ends(None);

fn cases() -> Vec<Case> {
    use MachineState as Is;
    let case = |run_state, state, actions| Case {
        run_state,
        is_transient: false,
        is_saved: false,
        state,
        actions,
    };
    let no = |reason| No(reason);
    let resting = |start| {
        [
            start,
            no(Refusal::NotRunning),
            no(Refusal::NotRunning),
            no(Refusal::NotRunning),
            OFF,
        ]
    };
    let off = [ON, OFF, no(Refusal::Off), no(Refusal::Off), OFF];
    let crashed = no(Refusal::Crashed);
    vec![
        case(1, Is::Running, [ON, OFF, ON, ON, OFF]),
        case(2, Is::Running, [ON, OFF, ON, ON, OFF]),
        case(3, Is::Paused, resting(ON)),
        case(4, Is::ShuttingDown, [Waits, Waits, Waits, Waits, OFF]),
        case(5, Is::ShutOff, off),
        case(6, Is::Crashed, [crashed, crashed, crashed, crashed, OFF]),
        case(7, Is::Suspended, resting(Fails)),
        Case {
            is_saved: true,
            ..case(5, Is::ShutOff, off)
        },
        Case {
            is_transient: true,
            ..case(1, Is::Running, [ON, GONE, ON, ON, GONE])
        },
    ]
}

fn id(case: usize, action: usize) -> String {
    format!("bbbbbbbb-1111-4111-8{action:03}-{case:012}")
}

/// Writes a file for libvirt's test driver and returns the entry of `VMWATCH_HYPERVISORS`.
fn node(folder: &Path, name: &str, domains: &str) -> String {
    let node = format!("<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>\n{domains}</node>\n");
    let path = folder.join(format!("{name}.xml"));
    fs::write(&path, node).unwrap();
    format!("{name}=test://{}", path.display())
}

fn domain(uuid: &str, more: &str) -> String {
    format!(
        "<domain type='test'><name>vm-{uuid}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>\
         <os><type>hvm</type></os>{more}</domain>\n"
    )
}

fn in_state(uuid: &str, run_state: u8) -> String {
    domain(uuid, &format!("<test:runstate>{run_state}</test:runstate>"))
}

async fn act(
    world: &World,
    on: ActionTarget,
    action: VmAction,
    deadline: Duration,
) -> Result<Machine, Fault> {
    let context = within(deadline);
    let reboot = |hard| RebootTarget {
        instance_id: on.instance_id.clone(),
        hard,
        hypervisor: on.hypervisor.clone(),
    };
    match action {
        VmAction::Start => world.bus.call::<Start>(&context, &on).await,
        VmAction::Stop => world.bus.call::<Stop>(&context, &on).await,
        VmAction::Reboot => world.bus.call::<Reboot>(&context, &reboot(false)).await,
        VmAction::Reset => world.bus.call::<Reboot>(&context, &reboot(true)).await,
        VmAction::ForceStop => world.bus.call::<ForceStop>(&context, &on).await,
        VmAction::Unknown => panic!("no action"),
    }
}

#[tokio::test]
async fn each_state_of_a_libvirt_vm_allows_the_right_actions() {
    let (world, cases) = (World::new().await, cases());
    let mut domains = String::new();
    for (index, case) in cases.iter().enumerate() {
        for action in 0..VmAction::ALL.len() {
            let mut more = format!("<test:runstate>{}</test:runstate>", case.run_state);
            if case.is_transient {
                more.push_str("<test:transient>1</test:transient>");
            }
            if case.is_saved {
                more.push_str("<test:hasmanagedsave>1</test:hasmanagedsave>");
            }
            let _ = write!(domains, "{}", domain(&id(index, action), &more));
        }
    }
    let hypervisors = node(world.path(), "one", &domains);
    let settings = [("VMWATCH_HYPERVISORS", hypervisors.as_str())];
    let _service = world.replica("lifecycle", &settings).await;
    for (index, case) in cases.iter().enumerate() {
        let what = format!(
            "{} transient {} saved {}",
            case.run_state, case.is_transient, case.is_saved
        );
        let first = target(&id(index, 0));
        let machine = world.bus.call::<State>(&operator(), &first).await.unwrap();
        assert_eq!(machine.state, case.state, "{what}");
        for (position, action) in VmAction::ALL.into_iter().enumerate() {
            let what = format!("{what} {action:?}");
            let refusal = machine.refused_actions.get(&action).copied();
            let id = id(index, position);
            let deadline = match case.actions[position] {
                Waits => Duration::from_millis(300),
                _ => PATIENCE,
            };
            let answer = act(&world, target(&id), action, deadline).await;
            match case.actions[position] {
                Ends(state) => {
                    let ended = answer.unwrap_or_else(|fault| panic!("{what}: {fault}")).state;
                    assert_eq!(ended, state.unwrap_or(MachineState::ShutOff), "{what}");
                    match world.state(&id).await {
                        Ok(now) => assert_eq!(Some(now), state, "{what}"),
                        Err(fault) => assert_eq!((state, fault.kind), (None, FaultKind::NotFound), "{what}"),
                    }
                    let already = [Refusal::AlreadyRunning, Refusal::AlreadyOff];
                    assert!(refusal.is_none_or(|reason| already.contains(&reason)), "{what}");
                }
                No(reason) => {
                    let fault = answer.unwrap_err();
                    assert_eq!(
                        (refusal, fault.kind),
                        (Some(reason), FaultKind::Conflict),
                        "{what}"
                    );
                    assert_eq!(fault.message, reason.text(), "{what}");
                    assert_eq!(world.state(&id).await.unwrap(), case.state, "{what}");
                }
                Fails => {
                    assert_eq!(refusal, None, "{what}");
                    assert_eq!(answer.unwrap_err().kind, FaultKind::Backend, "{what}");
                }
                Waits => {
                    assert_eq!(refusal, Some(Refusal::InTransition), "{what}");
                    assert_eq!(answer.unwrap_err().kind, FaultKind::Timeout, "{what}");
                }
            }
        }
    }
}

#[tokio::test]
async fn action_on_a_vm_of_two_hypervisors_acts_on_the_named_one() {
    const VM: &str = "22222222-2222-4222-8222-222222222222";
    const ON_A: &str = "33333333-3333-4333-8333-333333333333";
    let world = World::new().await;
    let hypervisors = [
        node(world.path(), "a", &(in_state(VM, 1) + &in_state(ON_A, 1))),
        node(world.path(), "b", &in_state(VM, 5)),
    ]
    .join(",");
    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_STATE_INTERVAL", "200ms"),
    ];
    let _service = world.replica("lifecycle", &settings).await;
    let on = async |action, name: &str| act(&world, target_on(VM, name), action, PATIENCE).await;
    let refused = |answer: Result<Machine, Fault>, said: &str| {
        let fault = answer.unwrap_err();
        assert_eq!(fault.kind, FaultKind::Conflict, "{fault}");
        assert_eq!(fault.message, format!("{said}; nothing was done"));
    };
    let listed = async |a: MachineState, b: MachineState| {
        eventually("the list has both states", PATIENCE, async || {
            let vms = world.vms(&operator(), &VmQuery::default()).await.vms;
            let vm = vms.into_iter().find(|vm| vm.instance_id.as_str() == VM).unwrap();
            let states: Vec<_> = vm
                .copies
                .iter()
                .map(|copy| (copy.hypervisor.as_str(), copy.state))
                .collect();
            if states != [("a", a), ("b", b)] {
                return Err(format!("{vm:?}"));
            }
            assert_eq!(vm.refused, all_refused(Refusal::SeveralHypervisors));
            Ok(vm)
        })
        .await
    };
    let (running, off) = (MachineState::Running, MachineState::ShutOff);
    let vm = listed(running, off).await;
    assert_eq!(
        (vm.hypervisor.as_deref(), vm.also_on),
        (Some("a"), vec!["b".to_owned()])
    );
    let start_on_b = vm.copies[1].refused.get(&VmAction::Start);
    assert_eq!(start_on_b, Some(&Refusal::NotOffElsewhere));
    let machine = world.bus.call::<State>(&operator(), &target(VM)).await.unwrap();
    assert_eq!(
        (machine.hypervisor.as_deref(), machine.state),
        (Some("a"), running)
    );
    assert_eq!(machine.allowed_actions, []);

    refused(
        on(VmAction::Start, "b").await,
        "the VM is running on a, so a start here would run a second copy; shut it down on a first",
    );
    assert_eq!(
        on(VmAction::ForceStop, "b").await.unwrap().state,
        off,
        "it is off there"
    );
    assert_eq!(on(VmAction::Stop, "a").await.unwrap().state, off);
    listed(off, off).await;
    assert_eq!(
        on(VmAction::Start, "b").await.unwrap().hypervisor.as_deref(),
        Some("b")
    );
    refused(
        on(VmAction::Start, "a").await,
        "the VM is running on b, so a start here would run a second copy; shut it down on b first",
    );
    listed(off, running).await;
    let machine = world.bus.call::<State>(&operator(), &target(VM)).await.unwrap();
    assert_eq!(
        (machine.hypervisor.as_deref(), machine.state),
        (Some("b"), running)
    );
    refused(
        on(VmAction::Start, "c").await,
        "there is no hypervisor with the name c; the list of VMs shows the names",
    );
    let elsewhere = act(&world, target_on(ON_A, "b"), VmAction::Stop, PATIENCE).await;
    refused(
        elsewhere,
        "the hypervisor b does not have this VM; name one that has it",
    );

    // The hypervisor is a parameter of a request: the same key with another one is a conflict.
    let (context, id) = keyed::<ForceStop>(PATIENCE, VM, "k");
    let stop = async |name: &str| world.bus.call::<ForceStop>(&context, &target_on(VM, name)).await;
    assert_eq!(stop("b").await.unwrap().state, off);
    assert!(stop("a").await.unwrap_err().message.contains("idempotency key"));
    let operation = world.operation(&id).await.unwrap();
    assert_eq!(operation.state, OperationState::Succeeded);
    assert_eq!(operation.requested_hypervisor.as_deref(), Some("b"));
    assert_eq!(operation.instance_id, instance_id(VM));
}
