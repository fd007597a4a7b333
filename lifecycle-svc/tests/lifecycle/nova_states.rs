//! Tests each state of a Nova server with each action: which actions are allowed, what the others answer, and which calls
//! Nova receives.

use std::time::Duration;

use testkit::cloud::Cloud;
use vmwatch_api::{
    actions::{Refusal, VmAction},
    lifecycle::{ForceStop, Machine, MachineState, Reboot, RebootTarget, Start, State, Stop},
    metrics::Limit,
    vms::VmQuery,
    wire::{Fault, FaultKind},
};

use crate::support::{World, instance_id, operator, target, within};

/// A state of a server, and what is expected of it.
#[derive(Clone, Copy)]
struct Case {
    status: &'static str,
    task: Option<&'static str>,
    /// The state of the guest that the host reports, if it is not the usual one.
    power: Option<i64>,
    host: Option<&'static str>,
    is_locked: bool,
    state: MachineState,
    /// For start, stop, reboot, reset and `force_stop`: the call that Nova gets, a refusal, or nothing to do.
    actions: [Expected; 5],
}

#[derive(Clone, Copy)]
enum Expected {
    Sends(&'static str),
    Refuses(Refusal),
    /// The VM already is in the wanted state, so that the action succeeds without a call.
    Succeeds,
    /// The VM is on its way, so that the action waits without a call.
    Waits,
}

use Expected::{Refuses as No, Sends, Succeeds, Waits};

const fn case(status: &'static str, state: MachineState, actions: [Expected; 5]) -> Case {
    Case {
        status,
        task: None,
        power: None,
        host: None,
        is_locked: false,
        state,
        actions,
    }
}

const fn with_task(task: &'static str, case: Case) -> Case {
    Case {
        task: Some(task),
        ..case
    }
}

const fn with_power(power: i64, case: Case) -> Case {
    Case {
        power: Some(power),
        ..case
    }
}

const fn on_host(host: &'static str, case: Case) -> Case {
    Case {
        host: Some(host),
        ..case
    }
}

const fn locked(case: Case) -> Case {
    Case {
        is_locked: true,
        ..case
    }
}

const RUNNING: [Expected; 5] = [
    Succeeds,
    Sends("os-stop"),
    Sends("reboot"),
    Sends("reboot"),
    Sends("os-stop"),
];
const CRASHED: [Expected; 5] = [
    No(Refusal::Crashed),
    No(Refusal::Crashed),
    No(Refusal::Crashed),
    No(Refusal::Crashed),
    Sends("os-stop"),
];
const fn off(start: Expected) -> [Expected; 5] {
    [start, Succeeds, No(Refusal::Off), No(Refusal::Off), Succeeds]
}
const fn resting(start: &'static str) -> [Expected; 5] {
    let no = No(Refusal::NotRunning);
    [Sends(start), no, no, no, No(Refusal::ResumeFirst)]
}
const fn running_but(hindrance: Refusal) -> [Expected; 5] {
    let no = No(hindrance);
    [Succeeds, no, no, no, no]
}
const fn nothing(hindrance: Refusal) -> [Expected; 5] {
    [No(hindrance); 5]
}

fn cases() -> Vec<Case> {
    use MachineState as Is;
    let on_its_way = [Waits, Waits, Waits, Waits, No(Refusal::Busy)];
    let off_but = |hindrance| {
        let no = No(hindrance);
        [no, Succeeds, no, no, Succeeds]
    };
    vec![
        case("ACTIVE", Is::Running, RUNNING),
        on_host("UP", case("ACTIVE", Is::Running, RUNNING)),
        on_host("DOWN", case("ACTIVE", Is::Unknown, nothing(Refusal::HostDown))),
        on_host("UNKNOWN", case("ACTIVE", Is::Unknown, nothing(Refusal::HostDown))),
        on_host("DOWN", case("SHUTOFF", Is::ShutOff, off_but(Refusal::HostDown))),
        with_power(4, case("ACTIVE", Is::Crashed, CRASHED)),
        with_power(6, case("ACTIVE", Is::Crashed, CRASHED)),
        locked(case("ACTIVE", Is::Running, running_but(Refusal::Locked))),
        locked(case("SHUTOFF", Is::ShutOff, off_but(Refusal::Locked))),
        with_task(
            "image_snapshot",
            case("ACTIVE", Is::Running, running_but(Refusal::Busy)),
        ),
        with_task(
            "migrating",
            case("MIGRATING", Is::Running, running_but(Refusal::Busy)),
        ),
        with_task(
            "updating_password",
            case("PASSWORD", Is::Running, running_but(Refusal::Busy)),
        ),
        with_task("powering-off", case("ACTIVE", Is::ShuttingDown, on_its_way)),
        with_task("reboot_started", case("REBOOT", Is::Starting, on_its_way)),
        with_task("spawning", case("BUILD", Is::Starting, on_its_way)),
        case("SHUTOFF", Is::ShutOff, off(Sends("os-start"))),
        with_power(1, case("SHUTOFF", Is::Unknown, nothing(Refusal::OutOfSync))),
        case("PAUSED", Is::Paused, resting("unpause")),
        case("SUSPENDED", Is::Suspended, resting("resume")),
        case("SHELVED", Is::ShutOff, off(Sends("unshelve"))),
        case("SHELVED_OFFLOADED", Is::ShutOff, off(Sends("unshelve"))),
        case(
            "VERIFY_RESIZE",
            Is::Running,
            running_but(Refusal::ResizeUnconfirmed),
        ),
        with_power(
            4,
            case("VERIFY_RESIZE", Is::ShutOff, off_but(Refusal::ResizeUnconfirmed)),
        ),
        with_task(
            "resize_migrating",
            case("RESIZE", Is::Unknown, nothing(Refusal::Busy)),
        ),
        with_task(
            "resize_reverting",
            case("REVERT_RESIZE", Is::Unknown, nothing(Refusal::Busy)),
        ),
        with_task("rebuilding", case("REBUILD", Is::Unknown, nothing(Refusal::Busy))),
        case("RESCUE", Is::Unknown, nothing(Refusal::Rescue)),
        case("ERROR", Is::Crashed, CRASHED),
        with_power(
            1,
            case(
                "ERROR",
                Is::Running,
                [
                    Succeeds,
                    Sends("os-stop"),
                    No(Refusal::ErrorState),
                    Sends("reboot"),
                    Sends("os-stop"),
                ],
            ),
        ),
    ]
}

fn id(case: usize, action: usize) -> String {
    format!("aaaaaaaa-1111-4111-8{action:03}-{case:012}")
}

/// Carries out an action with this deadline.
async fn act(world: &World, id: &str, action: VmAction, deadline: Duration) -> Result<Machine, Fault> {
    let context = within(deadline);
    let reboot = |hard| RebootTarget {
        instance_id: instance_id(id),
        hard,
        hypervisor: None,
    };
    match action {
        VmAction::Start => world.bus.call::<Start>(&context, &target(id)).await,
        VmAction::Stop => world.bus.call::<Stop>(&context, &target(id)).await,
        VmAction::Reboot => world.bus.call::<Reboot>(&context, &reboot(false)).await,
        VmAction::Reset => world.bus.call::<Reboot>(&context, &reboot(true)).await,
        VmAction::ForceStop => world.bus.call::<ForceStop>(&context, &target(id)).await,
        VmAction::Unknown => panic!("no action"),
    }
}

#[tokio::test]
async fn each_state_of_a_nova_server_allows_the_right_actions() {
    let (world, cases) = (World::new().await, cases());
    let cloud = Cloud::start(&[]).await;
    for (index, case) in cases.iter().enumerate() {
        for action in 0..VmAction::ALL.len() {
            let id = id(index, action);
            cloud.add(&id, case.status);
            if let Some(power) = case.power {
                cloud.power(&id, power);
            }
            if let Some(host) = case.host {
                cloud.host(&id, host);
            }
            if let Some(task) = case.task {
                cloud.task(&id, task);
            }
            if case.is_locked {
                cloud.lock_server(&id);
            }
        }
    }
    // Only an administrator sees whether a host is down.
    let hypervisors = cloud.admin_entry(world.path(), "cloud");
    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_STATE_INTERVAL", "1h"),
    ];
    let _service = world.replica("lifecycle", &settings).await;
    let all = VmQuery {
        limit: Limit::new(1000).unwrap(),
        ..VmQuery::default()
    };
    let listed = world.vms(&operator(), &all).await.vms;
    for (index, case) in cases.iter().enumerate() {
        let what = format!("{} {:?} {:?} {:?}", case.status, case.task, case.power, case.host);
        let machine = world
            .bus
            .call::<State>(&operator(), &target(&id(index, 0)))
            .await
            .unwrap();
        assert_eq!(machine.state, case.state, "{what}");
        let mut vms = listed.iter();
        let vm = vms.find(|vm| vm.instance_id.as_str() == id(index, 0)).unwrap();
        assert_eq!(
            (vm.state, &vm.refused),
            (Some(case.state), &machine.refused_actions),
            "the list: {what}"
        );
        for (position, action) in VmAction::ALL.into_iter().enumerate() {
            let what = format!("{what} {action:?}");
            let expected = case.actions[position];
            let refusal = machine.refused_actions.get(&action).copied();
            let is_allowed = machine.allowed_actions.contains(&action);
            assert_eq!(is_allowed, matches!(expected, Sends(_)), "{what}");
            assert_eq!(refusal.is_none(), is_allowed, "{what}");
            let id = id(index, position);
            let before = cloud.commands().len();
            let deadline = match expected {
                Waits => Duration::from_millis(300),
                _ => testkit::PATIENCE,
            };
            let answer = act(&world, &id, action, deadline).await;
            let sent = cloud.commands().split_off(before);
            let sent: Vec<_> = sent
                .iter()
                .map(|(_, command, status)| (command.as_str(), *status))
                .collect();
            match expected {
                Sends(command) => {
                    answer.unwrap_or_else(|fault| panic!("{what}: {fault}"));
                    assert_eq!(sent, [(command, 202)], "{what}");
                }
                Succeeds => {
                    answer.unwrap_or_else(|fault| panic!("{what}: {fault}"));
                    assert_eq!(sent, [], "{what}");
                }
                Waits => {
                    assert_eq!(answer.unwrap_err().kind, FaultKind::Timeout, "{what}");
                    assert_eq!((refusal, sent), (Some(Refusal::InTransition), vec![]), "{what}");
                }
                No(reason) => {
                    assert_eq!(refusal, Some(reason), "{what}");
                    let fault = answer.unwrap_err();
                    assert_eq!(fault.kind, FaultKind::Conflict, "{what}: {fault}");
                    assert!(fault.message.contains(reason.text()), "{what}: {fault}");
                    assert_eq!(sent, [], "{what}");
                }
            }
        }
    }
}
