//! A bus that is away, frozen or late: no command is carried out late, and what was done is on record.

use std::{fs, time::Duration};

use testkit::{PATIENCE, Process, Server, eventually};
use tokio::task::JoinHandle;
use vmwatch_api::{
    lifecycle::{MachineState, Operation, OperationState, Start, Verb},
    wire::FaultKind,
};
use vmwatch_bus::{Bus, BusSettings, Context};
use vmwatch_service::config::Environment;

use super::{Scene, VM, was_adopted};
use crate::{
    cloud::{At, Obedience},
    support::{Replica, keyed, target, within},
};

/// A replica and a caller that do not take a frozen server for dead, and so do not connect anew.
async fn patient(scene: &Scene) -> (Replica, Bus) {
    let settings = [
        ("VMWATCH_HYPERVISORS", scene.hypervisors.as_str()),
        ("VMWATCH_NATS_PING_INTERVAL", "1m"),
        ("VMWATCH_LOG", "debug"),
        // A command that must be announced in the audit first makes no record while the bus is frozen.
        ("VMWATCH_AUDIT_REQUIRED", "false"),
    ];
    let service = scene.world.replica("lifecycle", &settings).await;
    let env = Environment::of([("VMWATCH_NATS_URL", scene.world.nats.url()), settings[1]]);
    let settings = BusSettings::read(&env).unwrap();
    let bus = Bus::connect("vmwatch-test", &settings).await.unwrap();
    eventually("a connection", PATIENCE, async || {
        bus.is_connected().then_some(()).ok_or_else(String::new)
    })
    .await;
    (service, bus)
}

#[tokio::test]
async fn a_start_that_the_bus_delivers_late_is_not_carried_out() {
    let scene = Scene::new("SHUTOFF").await;
    let (service, bus) = patient(&scene).await;
    // Frozen and not dead: what is sent now is delivered once it goes on.
    freeze_bus(&scene).await;
    let late = within(Duration::from_millis(500));
    let fault = bus.call::<Start>(&late, &target(VM)).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Timeout);
    scene.world.nats.server.resume();
    eventually("it is delivered, and refused", PATIENCE, async || {
        let metrics = service.get("/metrics").await?;
        let late = metrics
            .lines()
            .find(|line| line.starts_with("vmwatch_requests_late_total"));
        late.map(drop).ok_or(metrics)
    })
    .await;
    eventually("the service answers", PATIENCE, async || {
        scene.world.state(VM).await.map_err(|fault| fault.to_string())
    })
    .await;
    assert_eq!(scene.cloud.commands(), []);
    assert_eq!(scene.world.operations(&within(PATIENCE), None).await, []);
}

async fn freeze_bus(scene: &Scene) {
    match &scene.world.nats.server {
        Server::Process(process) => freeze(process).await,
        // An engine answers once all of it stands still.
        container @ Server::Container(_) => container.pause(),
    }
}

/// Stops a process, and waits until the last of it stands still.
async fn freeze(process: &Process) {
    process.pause();
    eventually("it stands still", PATIENCE, async || {
        let threads = fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
        let states = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("stat")).unwrap());
        let moving = states.into_iter().find(|stat| !stat.contains(") T "));
        moving.map_or(Ok(()), Err)
    })
    .await;
}

/// Asks for a start, and freezes the bus when the service has the request and has not made its record yet. Gives back
/// what the caller is told, once the service has waited in vain for the bus.
async fn frozen_while_the_record_is_made(
    scene: &Scene,
    service: &Replica,
    bus: &Bus,
    context: Context,
) -> JoinHandle<Result<MachineState, FaultKind>> {
    freeze(&service.0).await;
    let caller = bus.clone();
    let asking = tokio::spawn(async move {
        let started = caller.call::<Start>(&context, &target(VM)).await;
        started.map(|machine| machine.state).map_err(|fault| fault.kind)
    });
    tokio::task::yield_now().await;
    // Asked behind the request, on the same connection: what is answered is behind it as well.
    bus.settled().await;
    freeze_bus(scene).await;
    service.0.resume();
    eventually("the service waits in vain", PATIENCE, async || {
        let log = service.0.log();
        // From the record store, or, where the deadline of the request was shorter, from the follower of its bucket.
        let waited = log.contains("did not answer in time") || log.contains("deadline has elapsed");
        waited.then_some(()).ok_or(log)
    })
    .await;
    asking
}

#[tokio::test]
async fn a_record_of_which_no_answer_came_is_still_ours() {
    let scene = Scene::new("SHUTOFF").await;
    let (service, bus) = patient(&scene).await;
    let (context, id) = keyed(PATIENCE, Verb::Start, VM, "k");
    let asking = frozen_while_the_record_is_made(&scene, &service, &bus, context).await;
    scene.world.nats.server.resume();
    assert_eq!(asking.await.unwrap(), Ok(MachineState::Running));
    let operation = scene.world.operation(&id).await.unwrap();
    assert!(!was_adopted(&operation), "{operation:?}");
    assert_eq!(scene.cloud.accepted("os-start"), 1);
}

#[tokio::test]
async fn a_record_of_which_no_answer_came_in_time_is_not_carried_out() {
    let scene = Scene::new("SHUTOFF").await;
    let (service, bus) = patient(&scene).await;
    let (context, id) = keyed(Duration::from_secs(1), Verb::Start, VM, "k");
    let asking = frozen_while_the_record_is_made(&scene, &service, &bus, context).await;
    assert_eq!(asking.await.unwrap(), Err(FaultKind::Timeout));
    scene.world.nats.server.resume();
    let operation = scene.world.ended(&id).await;
    assert_eq!(operation.state, OperationState::TimedOut, "{operation:?}");
    assert_eq!(scene.cloud.commands(), []);
}

#[tokio::test]
async fn a_start_that_waits_while_the_bus_goes_away_does_not_run_once_it_is_late() {
    let scene = Scene::new("SHUTOFF").await;
    let _service = scene.replica("lifecycle").await;
    let (context, id) = keyed(Duration::from_secs(1), Verb::Start, VM, "k");
    scene.cloud.hold(At::Look);
    let asking = scene.start_in_background(context.clone());
    scene.cloud.one_more_held(At::Look, 0).await;
    scene.world.nats.server.kill9();
    scene.cloud.release(At::Look);
    asking.abort();
    eventually("the deadline passes", PATIENCE, async || {
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
async fn what_ended_while_the_bus_was_away_is_on_record_once_it_is_back() {
    let scene = Scene::new("SHUTOFF").await;
    scene.cloud.obey(Obedience::Later);
    let _service = scene.replica("lifecycle").await;
    let (context, id) = keyed(PATIENCE, Verb::Start, VM, "k");
    let asking = scene.start_in_background(context);
    scene.cloud.has_accepted("os-start", 1).await;
    scene.world.nats.server.kill9();
    asking.abort();
    scene.cloud.settle(VM, "ACTIVE");
    scene.world.nats.restart().await;
    let operation: Operation = scene.world.ended(&id).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert_eq!(scene.cloud.accepted("os-start"), 1);
}
