//! Starts a VM that two hypervisors have, in any order of requests, answers and restarts: it must never run twice.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use futures::future::join_all;
use testkit::{
    PATIENCE,
    cloud::{At, Cloud},
    eventually, figure,
};
use vmwatch_api::lifecycle::{OperationId, Start};

use crate::support::{World, keyed, target, target_on};

/// The runs: each round starts each VM.
const ROUNDS: usize = 25;
const VMS: [&str; 4] = [
    "aaaaaaaa-1111-4111-8111-111111111111",
    "bbbbbbbb-2222-4222-8222-222222222222",
    "cccccccc-3333-4333-8333-333333333333",
    "dddddddd-4444-4444-8444-444444444444",
];
/// Number of concurrent starts of each VM, of which some name a hypervisor.
const STARTS: usize = 4;
/// Longest random delay of each answer of a hypervisor.
const JITTER: Duration = Duration::from_millis(80);
/// Deadline of a start. After a replica was killed, the caller waits for it.
const DEADLINE: Duration = Duration::from_secs(6);

/// What happens in a round, apart from the starts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    Nothing,
    /// A replica is killed and started again.
    Kill,
    /// A replica is stopped and started again.
    Restart,
    /// One hypervisor hangs for the time of the starts.
    Hang,
}

fn random(below: u64) -> u64 {
    RandomState::new().hash_one(()) % below
}

/// Sends a start of the VM in the background, on one of the hypervisors or without naming one.
async fn start(world: &World, vm: &str, key: String) -> OperationId {
    let (context, id) = keyed::<Start>(DEADLINE, vm, &key);
    let on = match random(5) {
        0 => target(vm),
        1 | 2 => target_on(vm, "a"),
        _ => target_on(vm, "b"),
    };
    let _ = world.bus.call::<Start>(&context, &on).await;
    id
}

/// Waits until the operation has ended; an operation without record never began.
async fn ended(world: &World, id: &OperationId) {
    eventually("the operation has ended", PATIENCE, async || {
        match world.operation(id).await {
            Ok(operation) if !operation.state.is_final() => Err(format!("{operation:?}")),
            _ => Ok(()),
        }
    })
    .await;
}

#[tokio::test]
async fn vm_that_two_hypervisors_have_never_runs_twice() {
    let world = World::new().await;
    let servers = VMS.map(|vm| (vm, "SHUTOFF"));
    let (a, b) = (Cloud::start(&servers).await, Cloud::start(&servers).await);
    let hypervisors = [a.entry(world.path(), "a"), b.entry(world.path(), "b")].join(",");
    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_STATE_INTERVAL", "200ms"),
        ("VMWATCH_HYPERVISOR_TIMEOUT", "2s"),
    ];
    let replicas = [
        world.replica("one", &settings).await,
        world.replica("two", &settings).await,
    ];
    a.jitter(JITTER);
    b.jitter(JITTER);
    let (mut twice, mut started, mut ran_before) = (0_u32, 0_u32, 0_u32);
    for round in 0..ROUNDS {
        for vm in VMS {
            let runs_on = random(4);
            a.settle(vm, if runs_on == 0 { "ACTIVE" } else { "SHUTOFF" });
            b.settle(vm, if runs_on == 1 { "ACTIVE" } else { "SHUTOFF" });
            ran_before += u32::from(runs_on < 2);
        }
        let event = match round % 8 {
            1 => Event::Kill,
            3 => Event::Restart,
            5 => Event::Hang,
            _ => Event::Nothing,
        };
        let hung = if random(2) == 0 { &a } else { &b };
        if event == Event::Hang {
            hung.hold(At::Read);
        }
        let requests = VMS
            .iter()
            .flat_map(|vm| (0..STARTS).map(move |index| (vm, index)));
        let starting = join_all(requests.map(|(vm, index)| start(&world, vm, format!("{round} {index}"))));
        let replica = &replicas[usize::from(random(2) == 0)];
        let disturbing = async {
            let running = || {
                VMS.iter()
                    .filter(|vm| a.status(vm) == "ACTIVE" || b.status(vm) == "ACTIVE")
                    .count()
            };
            let before = running();
            match event {
                Event::Nothing | Event::Hang => return,
                Event::Kill | Event::Restart => {}
            }
            // The replica ends while some operations are in progress. If all starts are refused, no VM starts to run, so the
            // wait is limited.
            let _ = tokio::time::timeout(Duration::from_secs(1), async {
                while running() == before {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
            if event == Event::Kill {
                replica.0.kill9();
            } else {
                replica.0.terminate(PATIENCE).await;
            }
            replica.0.start_again();
        };
        let (operations, ()) = tokio::join!(starting, disturbing);
        hung.release(At::Read);
        join_all(operations.iter().map(|id| ended(&world, id))).await;
        replica.ready().await;
        for vm in VMS {
            let running = [&a, &b].map(|cloud| u32::from(cloud.status(vm) == "ACTIVE"));
            twice += u32::from(running == [1, 1]);
            started += u32::from(running != [0, 0]);
        }
    }
    figure("second_starts_of_a_vm_in_100_runs", f64::from(twice));
    assert_eq!(twice, 0);
    // The starts must not all have been refused.
    assert!(
        started > ran_before,
        "{started} of the VMs run, {ran_before} ran before"
    );
}
