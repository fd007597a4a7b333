//! What dies, hangs or is asked again: a command acts once, and its record ends true.

use std::time::{Duration, Instant};

use futures::future::join_all;
use testkit::{PATIENCE, eventually};
use tokio::task::JoinHandle;
use vmwatch_api::{
    audit::AuditResult,
    lifecycle::{MachineState, Operation, OperationId, OperationState, Reboot, RebootTarget, Start, Verb},
    wire::FaultKind,
};
use vmwatch_bus::Context;

use crate::{
    cloud::{At, Cloud, Obedience},
    support::{LEASE, Replica, World, instance_id, keyed, states, target, within},
};

mod bus;

const VM: &str = "aaaaaaaa-1111-4111-8111-111111111111";

/// A bus, a cloud with one server, and what names the cloud to the service.
struct Scene {
    world: World,
    cloud: Cloud,
    hypervisors: String,
}

impl Scene {
    async fn new(status: &str) -> Self {
        let world = World::new().await;
        let cloud = Cloud::start(&[(VM, status)]).await;
        let hypervisors = cloud.entry(world.path(), "cloud");
        Self {
            world,
            cloud,
            hypervisors,
        }
    }

    async fn replica(&self, name: &str) -> Replica {
        self.world
            .replica(name, &[("VMWATCH_HYPERVISORS", &self.hypervisors)])
            .await
    }

    /// Asks for a start that nobody here waits for.
    fn start_in_background(&self, context: Context) -> JoinHandle<()> {
        let bus = self.world.bus.clone();
        tokio::spawn(async move {
            let _ = bus.call::<Start>(&context, &target(VM)).await;
        })
    }

    /// Kills the only replica at a step of a start, lets the cloud go on, and gives the record that another one makes
    /// of it.
    async fn killed_at(&self, at: At, limit: Duration) -> Operation {
        let first = self.replica("first").await;
        let (context, id) = keyed(limit, Verb::Start, VM, "k");
        self.cloud.hold(at);
        let asking = self.start_in_background(context.clone());
        self.cloud.one_more_held(at, 0).await;
        first.0.kill9();
        self.cloud.has_given_up().await;
        asking.abort();
        if limit < LEASE {
            eventually("the deadline passes", PATIENCE, async || {
                let left = context.remaining();
                left.is_zero().then_some(()).ok_or_else(|| format!("{left:?}"))
            })
            .await;
        }
        self.cloud.release(at);
        let _second = self.replica("second").await;
        self.world.ended(&id).await
    }
}

fn was_adopted(operation: &Operation) -> bool {
    operation
        .history
        .iter()
        .any(|event| event.text.starts_with("adopted"))
}

#[tokio::test]
async fn killed_before_the_hypervisor_is_told_a_start_is_carried_on() {
    let scene = Scene::new("SHUTOFF").await;
    let operation = scene.killed_at(At::Look, PATIENCE).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert!(was_adopted(&operation));
    assert_eq!(scene.cloud.accepted("os-start"), 1);
}

#[tokio::test]
async fn killed_while_the_hypervisor_is_told_a_start_is_told_again() {
    let scene = Scene::new("SHUTOFF").await;
    let operation = scene.killed_at(At::Arrived, PATIENCE).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert!(was_adopted(&operation));
    assert_eq!(
        scene.cloud.accepted("os-start"),
        1,
        "what died with its connection was not done"
    );
}

#[tokio::test]
async fn killed_once_the_hypervisor_did_it_a_start_is_not_told_again() {
    let scene = Scene::new("SHUTOFF").await;
    let operation = scene.killed_at(At::Done, PATIENCE).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert!(was_adopted(&operation));
    assert_eq!(scene.cloud.accepted("os-start"), 1);
    let results: Vec<_> = scene
        .world
        .audit_of(&operation.id)
        .await
        .iter()
        .map(|record| record.result)
        .collect();
    assert_eq!(results, [AuditResult::Requested, AuditResult::Succeeded]);
}

#[tokio::test]
async fn killed_while_the_machine_comes_up_a_start_is_waited_for_by_another() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let first = scene.replica("first").await;
    let (context, id) = keyed(PATIENCE, Verb::Start, VM, "k");
    let asking = scene.start_in_background(context);
    scene.cloud.has_accepted("os-start", 1).await;
    first.0.kill9();
    asking.abort();
    let _second = scene.replica("second").await;
    eventually("it is adopted", PATIENCE, async || {
        let operation = scene
            .world
            .operation(&id)
            .await
            .map_err(|fault| fault.to_string())?;
        was_adopted(&operation)
            .then_some(())
            .ok_or_else(|| format!("{operation:?}"))
    })
    .await;
    scene.cloud.settle(VM, "ACTIVE");
    let operation = scene.world.ended(&id).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert_eq!(scene.cloud.accepted("os-start"), 1);
}

#[tokio::test]
async fn a_command_is_not_taken_from_a_replica_that_lives() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let (_one, _two) = (scene.replica("one").await, scene.replica("two").await);
    let (context, id) = keyed(PATIENCE, Verb::Start, VM, "k");
    let asking = scene.start_in_background(context);
    scene.cloud.has_accepted("os-start", 1).await;
    let asked = Instant::now();
    eventually("three leases pass", PATIENCE, async || {
        let operation = scene
            .world
            .operation(&id)
            .await
            .map_err(|fault| fault.to_string())?;
        assert!(!was_adopted(&operation), "{operation:?}");
        let passed = asked.elapsed();
        (passed > LEASE * 3)
            .then_some(())
            .ok_or_else(|| format!("{passed:?}"))
    })
    .await;
    scene.cloud.settle(VM, "ACTIVE");
    asking.await.unwrap();
    let operation = scene.world.operation(&id).await.unwrap();
    assert_eq!(operation.state, OperationState::Succeeded);
    assert!(!was_adopted(&operation), "{operation:?}");
}

#[tokio::test]
async fn an_adopted_start_past_its_deadline_is_not_begun() {
    let scene = Scene::new("SHUTOFF").await;
    let operation = scene.killed_at(At::Look, Duration::from_secs(1)).await;
    assert_eq!(operation.state, OperationState::TimedOut, "{operation:?}");
    assert!(operation.fault.unwrap().message.contains("nothing was done"));
    assert_eq!(scene.cloud.commands(), []);
}

#[tokio::test]
async fn a_reboot_whose_replica_died_ends_as_unknown_and_is_never_repeated() {
    for (at, accepted) in [(At::Arrived, 0), (At::Done, 1)] {
        let scene = Scene::new("ACTIVE").await;
        let first = scene.replica("first").await;
        let (context, id) = keyed(PATIENCE, Verb::Reboot, VM, "k");
        let reboot = RebootTarget {
            instance_id: instance_id(VM),
            hard: false,
        };
        scene.cloud.hold(at);
        let (bus, asked, again) = (scene.world.bus.clone(), context.clone(), reboot.clone());
        let asking = tokio::spawn(async move { bus.call::<Reboot>(&asked, &again).await });
        scene.cloud.one_more_held(at, 0).await;
        first.0.kill9();
        scene.cloud.has_given_up().await;
        asking.abort();
        scene.cloud.release(at);
        let _second = scene.replica("second").await;
        let operation = scene.world.ended(&id).await;
        assert_eq!(operation.state, OperationState::OutcomeUnknown, "{operation:?}");
        // Nor when it is asked for again.
        let fault = scene
            .world
            .bus
            .call::<Reboot>(&context, &reboot)
            .await
            .unwrap_err();
        assert!(fault.message.contains("may or may not"), "{fault}");
        assert_eq!(scene.cloud.accepted("reboot"), accepted);
    }
}

#[tokio::test]
async fn the_same_key_a_hundred_times_over_two_replicas_acts_once() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let (_one, _two) = (scene.replica("one").await, scene.replica("two").await);
    let (context, id) = keyed(PATIENCE, Verb::Start, VM, "the key");
    let asking = join_all((0..100).map(|_| scene.world.start(&context, VM)));
    let settling = async {
        scene.cloud.has_accepted("os-start", 1).await;
        scene.cloud.settle(VM, "ACTIVE");
    };
    let (answers, ()) = tokio::join!(asking, settling);
    for answer in answers {
        assert_eq!(answer.unwrap(), MachineState::Running);
    }
    assert_eq!(scene.cloud.accepted("os-start"), 1);
    assert_eq!(scene.cloud.commands().len(), 1);

    // Also when the machine is off again meanwhile: the key stands for what was done.
    scene.cloud.settle(VM, "SHUTOFF");
    assert_eq!(
        scene.world.start(&context, VM).await.unwrap(),
        MachineState::Running
    );
    assert_eq!(scene.cloud.commands().len(), 1);
    let operation = scene.world.operation(&id).await.unwrap();
    let expected = [
        OperationState::Requested,
        OperationState::Running,
        OperationState::Running,
        OperationState::Succeeded,
    ];
    assert_eq!(states(&operation), expected);
    assert_eq!(scene.world.audit_of(&id).await.len(), 2);
}

#[tokio::test]
async fn a_caller_whose_deadline_passes_is_told_and_the_operation_ends_right() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let _service = scene.replica("lifecycle").await;
    let (context, id) = keyed(Duration::from_secs(1), Verb::Start, VM, "k");
    let fault = scene.world.start(&context, VM).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Timeout);
    assert_eq!(
        scene.world.operation(&id).await.unwrap().state,
        OperationState::Running
    );
    scene.cloud.settle(VM, "ACTIVE");
    let operation = scene.world.ended(&id).await;
    assert_eq!(operation.state, OperationState::Succeeded);
    assert_eq!(operation.machine, Some(MachineState::Running));
}

#[tokio::test]
async fn a_machine_that_never_comes_up_ends_as_timed_out() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let settings = [
        ("VMWATCH_HYPERVISORS", scene.hypervisors.as_str()),
        ("VMWATCH_OPERATION_LIMIT", "2s"),
    ];
    let _service = scene.world.replica("lifecycle", &settings).await;
    let (context, id) = keyed(PATIENCE, Verb::Start, VM, "k");
    let fault = scene.world.start(&context, VM).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Timeout);
    assert!(fault.message.contains("the machine is on its way up"), "{fault}");
    assert_eq!(
        scene.world.operation(&id).await.unwrap().state,
        OperationState::TimedOut
    );
}

#[tokio::test]
async fn a_stop_of_the_service_waits_for_the_commands_that_it_carries_out() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let service = scene.replica("lifecycle").await;
    let (context, id): (_, OperationId) = keyed(PATIENCE, Verb::Start, VM, "k");
    let starting = scene.world.start(&context, VM);
    let stopping = async {
        scene.cloud.has_accepted("os-start", 1).await;
        let ending = service.0.terminate(PATIENCE);
        let settling = async {
            eventually("it drains", PATIENCE, async || {
                let log = service.0.log();
                log.contains("draining").then_some(()).ok_or(log)
            })
            .await;
            scene.cloud.settle(VM, "ACTIVE");
        };
        tokio::join!(ending, settling).0
    };
    let (started, status) = tokio::join!(starting, stopping);
    assert_eq!(started.unwrap(), MachineState::Running);
    assert!(status.success(), "{status}");
    let _next = scene.replica("next").await;
    assert_eq!(
        scene.world.operation(&id).await.unwrap().state,
        OperationState::Succeeded
    );
}

#[tokio::test]
async fn a_store_of_records_that_is_nearly_full_takes_no_new_commands_and_finishes_the_old() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let settings = [
        ("VMWATCH_HYPERVISORS", scene.hypervisors.as_str()),
        ("VMWATCH_OPERATIONS_MAX_BYTES", "1MiB"),
    ];
    let _service = scene.world.replica("lifecycle", &settings).await;
    let (context, id) = keyed(PATIENCE, Verb::Start, VM, "k");
    let asking = scene.start_in_background(context);
    scene.cloud.has_accepted("os-start", 1).await;
    let nowhere = "bbbbbbbb-1111-4111-8111-111111111111";
    eventually("it is nearly full", PATIENCE, async || {
        let within = within(PATIENCE);
        let answers = join_all((0..20).map(|_| scene.world.start(&within, nowhere))).await;
        let refused = answers
            .into_iter()
            .filter_map(Result::err)
            .find(|fault| fault.kind != FaultKind::NotFound);
        refused.ok_or_else(|| "not yet".to_owned()).map(|fault| {
            assert_eq!(fault.kind, FaultKind::Unavailable);
            assert!(fault.message.contains("nearly full"), "{fault}");
        })
    })
    .await;
    scene.cloud.settle(VM, "ACTIVE");
    assert_eq!(scene.world.ended(&id).await.state, OperationState::Succeeded);
    asking.await.unwrap();
}
