//! Tests crashes of lifecycle-svc, hanging hypervisors and repeated requests: each operation takes effect at most once,
//! and its record ends with the real outcome.

use std::time::{Duration, Instant};

use futures::future::join_all;
use testkit::{
    PATIENCE,
    cloud::{At, Cloud, Obedience},
    eventually,
};
use tokio::task::JoinHandle;
use vmwatch_api::{
    audit::AuditResult,
    lifecycle::{MachineState, Operation, OperationId, OperationState, Reboot, RebootTarget, Start},
    wire::FaultKind,
};
use vmwatch_bus::Context;

use crate::support::{LEASE, Replica, World, instance_id, keyed, states, target, within};

mod bus;

const VM: &str = "aaaaaaaa-1111-4111-8111-111111111111";

/// A NATS server, a simulated cloud with one server, and the setting that configures the cloud.
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

    /// Sends a start request without waiting for its answer.
    fn start_in_background(&self, context: Context) -> JoinHandle<()> {
        let bus = self.world.bus.clone();
        tokio::spawn(async move {
            let _ = bus.call::<Start>(&context, &target(VM)).await;
        })
    }

    /// Kills the only replica at a step of a start, releases the cloud, and returns the operation after another replica
    /// has adopted and ended it.
    async fn killed_at(&self, at: At, limit: Duration) -> Operation {
        let first = self.replica("first").await;
        let (context, id) = keyed::<Start>(limit, VM, "k");
        self.cloud.hold(at);
        let asking = self.start_in_background(context.clone());
        self.cloud.wait_held(at, 0).await;
        first.0.kill9();
        self.cloud.wait_abandoned().await;
        asking.abort();
        if limit < LEASE {
            eventually("the deadline of the request passes", PATIENCE, async || {
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
async fn unsent_vm_start_of_a_killed_replica_is_sent_by_another() {
    let scene = Scene::new("SHUTOFF").await;
    let operation = scene.killed_at(At::Read, PATIENCE).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert!(was_adopted(&operation));
    assert_eq!(scene.cloud.accepted("os-start"), 1);
}

#[tokio::test]
async fn vm_start_lost_when_its_replica_was_killed_is_sent_again_by_another() {
    let scene = Scene::new("SHUTOFF").await;
    let operation = scene.killed_at(At::Arrived, PATIENCE).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert!(was_adopted(&operation));
    assert_eq!(
        scene.cloud.accepted("os-start"),
        1,
        "the first request had no effect, because its connection ended"
    );
}

#[tokio::test]
async fn vm_start_that_took_effect_is_not_repeated_after_its_replica_was_killed() {
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
async fn replica_that_takes_over_a_vm_start_waits_until_the_vm_runs() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let first = scene.replica("first").await;
    let (context, id) = keyed::<Start>(PATIENCE, VM, "k");
    let asking = scene.start_in_background(context);
    scene.cloud.wait_accepted("os-start", 1).await;
    first.0.kill9();
    asking.abort();
    let _second = scene.replica("second").await;
    eventually("the second replica adopts the operation", PATIENCE, async || {
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
async fn operation_of_a_live_replica_is_not_taken_over() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let (_one, _two) = (scene.replica("one").await, scene.replica("two").await);
    let (context, id) = keyed::<Start>(PATIENCE, VM, "k");
    let asking = scene.start_in_background(context);
    scene.cloud.wait_accepted("os-start", 1).await;
    let asked = Instant::now();
    eventually("three lease times have passed", PATIENCE, async || {
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
async fn vm_start_of_a_killed_replica_is_not_sent_after_its_deadline() {
    let scene = Scene::new("SHUTOFF").await;
    let operation = scene.killed_at(At::Read, Duration::from_secs(1)).await;
    assert_eq!(operation.state, OperationState::TimedOut, "{operation:?}");
    assert!(operation.fault.unwrap().message.contains("nothing was done"));
    assert_eq!(scene.cloud.commands(), []);
}

#[tokio::test]
async fn reboot_by_a_crashed_replica_ends_with_unknown_outcome() {
    for (at, accepted) in [(At::Arrived, 0), (At::Done, 1)] {
        let scene = Scene::new("ACTIVE").await;
        let first = scene.replica("first").await;
        let (context, id) = keyed::<Reboot>(PATIENCE, VM, "k");
        let reboot = RebootTarget {
            instance_id: instance_id(VM),
            hard: false,
            hypervisor: None,
        };
        scene.cloud.hold(at);
        let (bus, asked, again) = (scene.world.bus.clone(), context.clone(), reboot.clone());
        let asking = tokio::spawn(async move { bus.call::<Reboot>(&asked, &again).await });
        scene.cloud.wait_held(at, 0).await;
        first.0.kill9();
        scene.cloud.wait_abandoned().await;
        asking.abort();
        scene.cloud.release(at);
        let _second = scene.replica("second").await;
        let operation = scene.world.ended(&id).await;
        assert_eq!(operation.state, OperationState::OutcomeUnknown, "{operation:?}");
        // Sending the same request again does not repeat the reboot.
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
async fn hundred_requests_with_one_idempotency_key_start_the_vm_once() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let (_one, _two) = (scene.replica("one").await, scene.replica("two").await);
    let (context, id) = keyed::<Start>(PATIENCE, VM, "the key");
    let asking = join_all((0..100).map(|_| scene.world.start(&context, VM)));
    let settling = async {
        scene.cloud.wait_accepted("os-start", 1).await;
        scene.cloud.settle(VM, "ACTIVE");
    };
    let (answers, ()) = tokio::join!(asking, settling);
    for answer in answers {
        assert_eq!(answer.unwrap(), MachineState::Running);
    }
    assert_eq!(scene.cloud.accepted("os-start"), 1);
    assert_eq!(scene.cloud.commands().len(), 1);

    // The same holds after the VM was shut off again: the key identifies the finished operation.
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
async fn operation_continues_after_its_callers_deadline() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let _service = scene.replica("lifecycle").await;
    let (context, id) = keyed::<Start>(Duration::from_secs(1), VM, "k");
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
async fn start_request_times_out_if_the_vm_never_starts() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let settings = [
        ("VMWATCH_HYPERVISORS", scene.hypervisors.as_str()),
        ("VMWATCH_OPERATION_LIMIT", "2s"),
    ];
    let _service = scene.world.replica("lifecycle", &settings).await;
    let (context, id) = keyed::<Start>(PATIENCE, VM, "k");
    let fault = scene.world.start(&context, VM).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Timeout);
    assert!(fault.message.contains("the VM is starting"), "{fault}");
    assert_eq!(
        scene.world.operation(&id).await.unwrap().state,
        OperationState::TimedOut
    );
}

#[tokio::test]
async fn shutdown_of_lifecycle_svc_waits_for_running_operations() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let service = scene.replica("lifecycle").await;
    let (context, id): (_, OperationId) = keyed::<Start>(PATIENCE, VM, "k");
    let starting = scene.world.start(&context, VM);
    let stopping = async {
        scene.cloud.wait_accepted("os-start", 1).await;
        let ending = service.0.terminate(PATIENCE);
        let settling = async {
            eventually("the service stops accepting requests", PATIENCE, async || {
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
async fn new_operations_are_refused_when_their_kv_bucket_is_nearly_full() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let settings = [
        ("VMWATCH_HYPERVISORS", scene.hypervisors.as_str()),
        ("VMWATCH_OPERATIONS_MAX_BYTES", "1MiB"),
    ];
    let _service = scene.world.replica("lifecycle", &settings).await;
    let (context, id) = keyed::<Start>(PATIENCE, VM, "k");
    let asking = scene.start_in_background(context);
    scene.cloud.wait_accepted("os-start", 1).await;
    let nowhere = "bbbbbbbb-1111-4111-8111-111111111111";
    eventually("the operation bucket is nearly full", PATIENCE, async || {
        let within = within(PATIENCE);
        let answers = join_all((0..20).map(|_| scene.world.start(&within, nowhere))).await;
        let refused = answers
            .into_iter()
            .filter_map(Result::err)
            .find(|fault| fault.kind != FaultKind::NotFound);
        refused
            .ok_or_else(|| "the start was not refused".to_owned())
            .map(|fault| {
                assert_eq!(fault.kind, FaultKind::Unavailable);
                assert!(fault.message.contains("nearly full"), "{fault}");
            })
    })
    .await;
    scene.cloud.settle(VM, "ACTIVE");
    assert_eq!(scene.world.ended(&id).await.state, OperationState::Succeeded);
    asking.await.unwrap();
}
