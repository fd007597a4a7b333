//! Tests lifecycle-svc while NATS is unreachable, frozen or slow: no action is sent late, and every effect is recorded.

use std::time::Duration;

use testkit::{
    PATIENCE,
    cloud::{At, Obedience},
    eventually,
};
use tokio::task::JoinHandle;
use vmwatch_api::{
    lifecycle::{MachineState, Operation, OperationState, Start},
    wire::FaultKind,
};
use vmwatch_bus::{Bus, BusSettings, Context};
use vmwatch_service::config::Environment;

use super::{Scene, VM, was_adopted};
use crate::support::{Replica, keyed, target, within};

/// Starts a replica and a caller that ping NATS once a minute, so that they do not reconnect while NATS is frozen.
async fn patient(scene: &Scene) -> (Replica, Bus) {
    let settings = [
        ("VMWATCH_HYPERVISORS", scene.hypervisors.as_str()),
        ("VMWATCH_NATS_PING_INTERVAL", "1m"),
        ("VMWATCH_LOG", "debug"),
        // If the audit were required, no operation would be recorded while NATS is frozen.
        ("VMWATCH_AUDIT_REQUIRED", "false"),
    ];
    let service = scene.world.replica("lifecycle", &settings).await;
    let env = Environment::from_variables([("VMWATCH_NATS_URL", scene.world.nats.url()), settings[1]]);
    let settings = BusSettings::read(&env).unwrap();
    let bus = Bus::connect("vmwatch-test", &settings).await.unwrap();
    eventually("the caller is connected to NATS", PATIENCE, async || {
        bus.is_connected().then_some(()).ok_or_else(String::new)
    })
    .await;
    (service, bus)
}

#[tokio::test]
async fn vm_start_that_arrives_after_its_deadline_is_refused() {
    let scene = Scene::new("SHUTOFF").await;
    let (service, bus) = patient(&scene).await;
    // NATS is frozen, not killed: when it continues, it delivers the messages that were sent to it meanwhile.
    scene.world.nats.server.pause();
    let late = within(Duration::from_millis(500));
    let fault = bus.call::<Start>(&late, &target(VM)).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Timeout);
    scene.world.nats.server.resume();
    eventually("lifecycle-svc refuses the late request", PATIENCE, async || {
        let metrics = service.get("/metrics").await?;
        let late = metrics
            .lines()
            .find(|line| line.starts_with("vmwatch_requests_late_total"));
        late.map(drop).ok_or(metrics)
    })
    .await;
    eventually("lifecycle-svc answers again", PATIENCE, async || {
        scene.world.state(VM).await.map_err(|fault| fault.to_string())
    })
    .await;
    assert_eq!(scene.cloud.commands(), []);
    assert_eq!(scene.world.operations(&within(PATIENCE), None).await, []);
}

/// Sends a start request, and freezes NATS after lifecycle-svc has received the request and before it has recorded the
/// operation. Returns the caller's task after lifecycle-svc has timed out waiting for NATS.
async fn frozen_while_the_record_is_made(
    scene: &Scene,
    service: &Replica,
    bus: &Bus,
    context: Context,
) -> JoinHandle<Result<MachineState, FaultKind>> {
    service.0.pause();
    let caller = bus.clone();
    let asking = tokio::spawn(async move {
        let started = caller.call::<Start>(&context, &target(VM)).await;
        started.map(|machine| machine.state).map_err(|fault| fault.kind)
    });
    tokio::task::yield_now().await;
    // This message follows the request on the same connection, so its answer shows that the request was delivered.
    bus.settled().await;
    scene.world.nats.server.pause();
    service.0.resume();
    eventually("lifecycle-svc times out waiting for NATS", PATIENCE, async || {
        let log = service.0.log();
        // The timeout comes from the operation store or, if the request's deadline is shorter, from the follower of the
        // KV bucket.
        let waited = log.contains("did not answer in time") || log.contains("deadline has elapsed");
        waited.then_some(()).ok_or(log)
    })
    .await;
    asking
}

#[tokio::test]
async fn vm_start_continues_if_nats_acknowledges_its_record_late() {
    let scene = Scene::new("SHUTOFF").await;
    let (service, bus) = patient(&scene).await;
    let (context, id) = keyed::<Start>(PATIENCE, VM, "k");
    let asking = frozen_while_the_record_is_made(&scene, &service, &bus, context).await;
    scene.world.nats.server.resume();
    assert_eq!(asking.await.unwrap(), Ok(MachineState::Running));
    let operation = scene.world.operation(&id).await.unwrap();
    assert!(!was_adopted(&operation), "{operation:?}");
    assert_eq!(scene.cloud.accepted("os-start"), 1);
}

#[tokio::test]
async fn vm_start_is_not_sent_if_it_was_recorded_too_late() {
    let scene = Scene::new("SHUTOFF").await;
    let (service, bus) = patient(&scene).await;
    let (context, id) = keyed::<Start>(Duration::from_secs(1), VM, "k");
    let asking = frozen_while_the_record_is_made(&scene, &service, &bus, context).await;
    assert_eq!(asking.await.unwrap(), Err(FaultKind::Timeout));
    scene.world.nats.server.resume();
    let operation = scene.world.ended(&id).await;
    assert_eq!(operation.state, OperationState::TimedOut, "{operation:?}");
    assert_eq!(scene.cloud.commands(), []);
}

#[tokio::test]
async fn vm_start_is_not_sent_after_its_lease_expired_in_a_nats_outage() {
    let scene = Scene::new("SHUTOFF").await;
    let _service = scene.replica("lifecycle").await;
    let (context, id) = keyed::<Start>(Duration::from_secs(1), VM, "k");
    scene.cloud.hold(At::Read);
    let asking = scene.start_in_background(context.clone());
    scene.cloud.wait_held(At::Read, 0).await;
    scene.world.nats.server.kill9();
    scene.cloud.release(At::Read);
    asking.abort();
    eventually("the deadline of the request passes", PATIENCE, async || {
        let left = context.remaining();
        left.is_zero().then_some(()).ok_or_else(|| format!("{left:?}"))
    })
    .await;
    scene.world.nats.restart().await;
    let operation = scene.world.ended(&id).await;
    assert_eq!(operation.state, OperationState::TimedOut, "{operation:?}");
    assert_eq!(scene.cloud.commands(), []);
}

#[tokio::test]
async fn operation_ends_with_its_result_after_a_nats_outage() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let _service = scene.replica("lifecycle").await;
    let (context, id) = keyed::<Start>(PATIENCE, VM, "k");
    let asking = scene.start_in_background(context);
    scene.cloud.wait_accepted("os-start", 1).await;
    scene.world.nats.server.kill9();
    asking.abort();
    scene.cloud.settle(VM, "ACTIVE");
    scene.world.nats.restart().await;
    let operation: Operation = scene.world.ended(&id).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert_eq!(scene.cloud.accepted("os-start"), 1);
}
