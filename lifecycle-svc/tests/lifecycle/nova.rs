//! Tests how the Nova driver interprets the answers of Nova, including invalid and missing answers.

use std::time::{Duration, Instant};

use axum::body::Bytes;
use testkit::{
    PATIENCE,
    cloud::{At, Cloud, Obedience, PASSWORD},
    eventually,
};
use vmwatch_api::{
    actions::{Refusal, VmAction},
    lifecycle::{Event, ForceStop, MachineState, OperationState, Reboot, RebootTarget, Start, Stop},
    vms::VmQuery,
    wire::FaultKind,
};

use crate::support::{Replica, World, instance_id, keyed, operator, target, within};

const OFF: &str = "aaaaaaaa-1111-4111-8111-111111111111";
const ACTIVE: &str = "bbbbbbbb-2222-4222-8222-222222222222";
const PAUSED: &str = "cccccccc-3333-4333-8333-333333333333";
const NOWHERE: &str = "dddddddd-9999-4999-8999-999999999999";

async fn cloud() -> Cloud {
    Cloud::start(&[(OFF, "SHUTOFF"), (ACTIVE, "ACTIVE"), (PAUSED, "PAUSED")]).await
}

async fn service(world: &World, cloud: &Cloud, settings: &[(&str, &str)]) -> Replica {
    let entry = cloud.entry(world.path(), "cloud");
    let hypervisors = [("VMWATCH_HYPERVISORS", entry.as_str())];
    let settings: Vec<_> = hypervisors.into_iter().chain(settings.iter().copied()).collect();
    world.replica("lifecycle", &settings).await
}

#[tokio::test]
async fn vm_actions_become_the_right_nova_calls() {
    let (world, cloud) = (World::new().await, cloud().await);
    let service = service(&world, &cloud, &[]).await;
    let reboot = |hard| RebootTarget {
        instance_id: instance_id(ACTIVE),
        hard,
        hypervisor: None,
    };
    let bus = &world.bus;

    assert_eq!(
        world.start(&operator(), OFF).await.unwrap(),
        MachineState::Running
    );
    assert_eq!(
        world.start(&operator(), PAUSED).await.unwrap(),
        MachineState::Running
    );
    // The VM runs already, so no action is sent.
    assert_eq!(
        world.start(&operator(), ACTIVE).await.unwrap(),
        MachineState::Running
    );
    bus.call::<Reboot>(&operator(), &reboot(true)).await.unwrap();
    assert_eq!(
        bus.call::<Stop>(&operator(), &target(OFF)).await.unwrap().state,
        MachineState::ShutOff
    );
    assert_eq!(
        bus.call::<ForceStop>(&operator(), &target(ACTIVE))
            .await
            .unwrap()
            .state,
        MachineState::ShutOff
    );

    let called: Vec<_> = cloud
        .commands()
        .into_iter()
        .map(|(id, command, _)| (id, command))
        .collect();
    let expected = [
        (OFF, "os-start"),
        (PAUSED, "unpause"),
        (ACTIVE, "reboot"),
        (OFF, "os-stop"),
        (ACTIVE, "os-stop"),
    ];
    assert_eq!(
        called,
        expected.map(|(id, command)| (id.to_owned(), command.to_owned()))
    );
    assert_eq!(cloud.logins(), 1);

    let fault = world.start(&operator(), NOWHERE).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::NotFound);
    assert!(!service.0.log().contains(PASSWORD));
}

#[tokio::test]
async fn vm_start_waits_until_the_nova_server_is_active() {
    let (world, cloud) = (World::new().await, cloud().await);
    let _service = service(&world, &cloud, &[]).await;
    cloud.obey(Obedience::Later);
    let (context, id) = keyed::<Start>(PATIENCE, OFF, "k");
    let starting = world.start(&context, OFF);
    let settling = async {
        eventually("Nova receives the action", PATIENCE, async || {
            match cloud.accepted("os-start") {
                1 => Ok(()),
                other => Err(format!("Nova received {other} start actions")),
            }
        })
        .await;
        assert_eq!(world.state(OFF).await.unwrap(), MachineState::Starting);
        assert_eq!(world.operation(&id).await.unwrap().state, OperationState::Running);
        cloud.settle(OFF, "ACTIVE");
    };
    let (started, ()) = tokio::join!(starting, settling);
    assert_eq!(started.unwrap(), MachineState::Running);
    assert_eq!(cloud.accepted("os-start"), 1);
}

#[tokio::test]
async fn nova_conflict_counts_as_success_only_if_server_reaches_wanted_state() {
    let (world, cloud) = (World::new().await, cloud().await);
    let _service = service(&world, &cloud, &[]).await;

    // Another client starts the server between the driver's read of the state and its action. The driver recognises
    // that the wanted state is reached.
    for (task, status) in [(Some("powering-on"), "SHUTOFF"), (None, "ACTIVE")] {
        cloud.settle(OFF, "SHUTOFF");
        cloud.hold(At::Arrived);
        let held = cloud.held(At::Arrived);
        let started = operator();
        let starting = world.start(&started, OFF);
        let meddling = async {
            cloud.wait_held(At::Arrived, held).await;
            cloud.settle(OFF, status);
            if let Some(task) = task {
                cloud.task(OFF, task);
            }
            cloud.release(At::Arrived);
            eventually("Nova refuses the action", PATIENCE, async || {
                let commands = cloud.commands();
                let refused = commands.last().is_some_and(|(_, _, status)| *status == 409);
                refused.then_some(()).ok_or_else(|| format!("{commands:?}"))
            })
            .await;
            cloud.settle(OFF, "ACTIVE");
        };
        let (started, ()) = tokio::join!(starting, meddling);
        assert_eq!(started.unwrap(), MachineState::Running);
    }

    // If the server becomes busy with a different task, Nova's refusal is final, and its message is returned.
    cloud.settle(OFF, "SHUTOFF");
    cloud.hold(At::Arrived);
    let held = cloud.held(At::Arrived);
    let started = operator();
    let starting = world.start(&started, OFF);
    let meddling = async {
        cloud.wait_held(At::Arrived, held).await;
        cloud.task(OFF, "image_snapshot");
        cloud.release(At::Arrived);
    };
    let (started, ()) = tokio::join!(starting, meddling);
    let fault = started.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Conflict);
    assert!(
        fault
            .message
            .contains("the hypervisor refused: Cannot 'os-start' instance"),
        "{fault}"
    );
}

#[tokio::test]
async fn failed_vm_start_reports_novas_reason() {
    let (world, cloud) = (World::new().await, cloud().await);
    let _service = service(&world, &cloud, &[]).await;
    cloud.obey(Obedience::Fails);
    let fault = world.start(&operator(), OFF).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Backend);
    assert!(fault.message.contains("shut off immediately"), "{fault}");
    assert!(
        fault.message.contains("start: No valid host: the disk is gone"),
        "{fault}"
    );
    assert_eq!(
        cloud.accepted("os-start"),
        1,
        "the failed action must not be repeated"
    );

    cloud.obey(Obedience::Later);
    let starting_of = operator();
    let starting = world.start(&starting_of, OFF);
    let breaking = async {
        cloud.wait_accepted("os-start", 2).await;
        cloud.break_down(OFF, "Build of instance aborted");
    };
    let (started, ()) = tokio::join!(starting, breaking);
    let fault = started.unwrap_err();
    assert!(fault.message.contains("Build of instance aborted"), "{fault}");
}

#[tokio::test]
async fn nova_driver_renews_refused_and_expiring_tokens() {
    let (world, cloud) = (World::new().await, cloud().await);
    let _service = service(&world, &cloud, &[]).await;
    world.state(OFF).await.unwrap();
    assert_eq!(cloud.logins(), 1);
    cloud.revoke();
    assert_eq!(
        world.start(&operator(), OFF).await.unwrap(),
        MachineState::Running
    );
    assert_eq!(cloud.logins(), 2);

    // A token with a lifetime of two seconds is renewed after one and a half, so that Nova never receives an expired
    // token.
    cloud.token_life(Duration::from_secs(2));
    cloud.revoke();
    world.state(OFF).await.unwrap();
    let logins = cloud.logins();
    eventually("the driver gets a new token", PATIENCE, async || {
        world.state(OFF).await.map_err(|fault| fault.to_string())?;
        (cloud.logins() > logins)
            .then_some(())
            .ok_or_else(|| "the driver uses the former token".to_owned())
    })
    .await;
}

#[tokio::test]
async fn nova_driver_survives_invalid_answers() {
    let (world, cloud) = (World::new().await, cloud().await);
    let _service = service(&world, &cloud, &[]).await;
    let large = Bytes::from(vec![b'x'; 9 << 20]);
    let cases = [
        (200, Bytes::from_static(b"<html>a proxy's page</html>")),
        (200, Bytes::from_static(b"{\"server\": {\"id\": 1}}")),
        (200, large),
        (204, Bytes::new()),
        (302, Bytes::new()),
        (500, Bytes::from_static(b"\xff\xfe")),
        (
            503,
            Bytes::from_static(b"{\"error\": {\"message\": \"down\\nfor a while\"}}"),
        ),
    ];
    for (status, body) in cases {
        cloud.answer_instead(Some((status, body)));
        let fault = world.start(&operator(), OFF).await.unwrap_err();
        assert_eq!(fault.kind, FaultKind::Backend, "{status}: {fault}");
    }
    cloud.answer_instead(None);
    assert_eq!(cloud.commands(), []);
    assert_eq!(
        world.start(&operator(), OFF).await.unwrap(),
        MachineState::Running
    );
}

#[tokio::test]
async fn hanging_cloud_does_not_delay_other_clouds() {
    let (world, hangs, works) = (
        World::new().await,
        cloud().await,
        Cloud::start(&[(NOWHERE, "SHUTOFF")]).await,
    );
    let hypervisors = [
        hangs.entry(world.path(), "hangs"),
        works.entry(world.path(), "works"),
    ]
    .join(",");
    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_HYPERVISOR_TIMEOUT", "2s"),
    ];
    let _service = world.replica("lifecycle", &settings).await;
    hangs.hold(At::Read);

    // The number of requests exceeds the limit of concurrent calls.
    let waiting = async {
        let of = within(Duration::from_secs(20));
        futures::future::join_all((0..30).map(|_| world.start(&of, OFF))).await
    };
    let other = async {
        hangs.wait_held(At::Read, 7).await;
        let began = Instant::now();
        assert_eq!(
            world.start(&operator(), NOWHERE).await.unwrap(),
            MachineState::Running
        );
        began.elapsed()
    };
    let (answers, took) = tokio::join!(waiting, other);
    assert!(took < Duration::from_secs(2), "{took:?}");
    for answer in answers {
        let fault = answer.unwrap_err();
        assert_eq!(fault.kind, FaultKind::Backend);
        assert!(fault.message.contains("does not answer"), "{fault}");
    }
    // While one cloud does not answer, an unknown VM may be in that cloud. The answer must not be "there is no such
    // VM".
    let fault = world
        .state("eeeeeeee-9999-4999-8999-999999999999")
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Backend, "{fault}");
    hangs.release(At::Read);
    assert_eq!(
        world.start(&operator(), OFF).await.unwrap(),
        MachineState::Running
    );
}

#[tokio::test]
async fn nova_driver_lists_all_pages_with_an_application_credential() {
    let world = World::new().await;
    let ids: Vec<_> = (0..7)
        .map(|index| format!("aaaaaaaa-0000-4000-8000-00000000000{index}"))
        .collect();
    let servers: Vec<_> = ids.iter().map(|id| (id.as_str(), "ACTIVE")).collect();
    let cloud = Cloud::start(&servers).await;
    cloud.page_size(3);
    let entry = cloud.credential_entry(world.path(), "cloud");
    let _service = world
        .replica("lifecycle", &[("VMWATCH_HYPERVISORS", &entry)])
        .await;
    let list = world.vms(&operator(), &VmQuery::default()).await;
    let listed: Vec<_> = list.vms.iter().map(|vm| vm.instance_id.to_string()).collect();
    assert_eq!(listed, ids);
    assert_eq!(list.vms[0].name, Some(format!("name of {}", ids[0])));
}

/// An action that gets its permit after its deadline is not sent.
#[tokio::test]
async fn nova_driver_sends_no_action_after_the_deadline() {
    let (world, cloud) = (World::new().await, cloud().await);
    let _service = service(&world, &cloud, &[("VMWATCH_HYPERVISOR_CALLS", "1")]).await;
    let deadline = Duration::from_secs(3);
    cloud.hold(At::Read);
    let (late, id) = keyed::<Start>(deadline, OFF, "late");
    let starting = world.start(&late, OFF);
    let slow = async {
        // The cloud answers the first read of the state. It answers the second, immediately before the action, only
        // after the deadline.
        cloud.wait_held(At::Read, 0).await;
        cloud.let_one_pass(At::Read);
        cloud.wait_held(At::Read, 1).await;
    };
    let (answer, ()) = tokio::join!(starting, slow);
    assert_eq!(answer.unwrap_err().kind, FaultKind::Timeout);
    cloud.release(At::Read);
    let ended = world.ended(&id).await;
    assert_eq!(ended.state, OperationState::TimedOut, "{ended:?}");
    let not_sent = |event: &Event| event.text == "not sent to cloud: the deadline has passed";
    assert!(ended.history.iter().any(not_sent), "{ended:?}");
    assert_eq!(cloud.commands(), []);
}

/// After the keep time the VM can be started elsewhere, although its former host is still unreachable.
#[tokio::test]
async fn vm_starts_elsewhere_once_the_record_of_its_former_hypervisor_has_expired() {
    let world = World::new().await;
    let (old, new) = (Cloud::start(&[(OFF, "ACTIVE")]).await, Cloud::start(&[]).await);
    let hypervisors = [old.entry(world.path(), "old"), new.entry(world.path(), "new")].join(",");
    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_STATE_INTERVAL", "200ms"),
        ("VMWATCH_HYPERVISOR_TIMEOUT", "1s"),
        ("VMWATCH_LAST_HYPERVISOR_KEEP", "6s"),
    ];
    let _service = world.replica("lifecycle", &settings).await;
    old.hold(At::Read);
    old.hold(At::List);
    let gone = Instant::now();
    new.add(OFF, "SHUTOFF");
    let fault = world.start(&operator(), OFF).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Conflict, "{fault}");
    // The list gives the reason for which a start would be refused.
    let refused = async || {
        let page = world.vms(&operator(), &VmQuery::default()).await;
        let copies = page.vms.first().map(|vm| vm.copies.clone()).unwrap_or_default();
        let new = copies.iter().find(|copy| copy.hypervisor == "new");
        new.and_then(|copy| copy.refused.get(&VmAction::Start).copied())
    };
    let unreachable = Some(Refusal::FormerHypervisorUnreachable);
    eventually("the list refuses the start", PATIENCE, async || {
        let reason = refused().await;
        (reason == unreachable)
            .then_some(())
            .ok_or_else(|| format!("{reason:?}"))
    })
    .await;
    eventually("the list allows the start", PATIENCE, async || {
        refused()
            .await
            .map_or(Ok(()), |reason| Err(format!("{reason:?}")))
    })
    .await;
    eventually("the start succeeds", PATIENCE, async || {
        let started = world.start(&operator(), OFF).await;
        started.map_err(|fault| fault.to_string())
    })
    .await;
    // The time counts from the last list, which was up to an interval before.
    assert!(gone.elapsed() >= Duration::from_secs(5), "{:?}", gone.elapsed());
    assert_eq!((old.commands().len(), new.accepted("os-start")), (0, 1));
}

/// An unreachable host may still run a VM that was evacuated to another host.
#[tokio::test]
async fn vm_start_is_refused_while_the_former_hypervisor_is_unreachable() {
    let world = World::new().await;
    let (old, new) = (Cloud::start(&[(OFF, "ACTIVE")]).await, Cloud::start(&[]).await);
    let hypervisors = [old.entry(world.path(), "old"), new.entry(world.path(), "new")].join(",");
    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_STATE_INTERVAL", "200ms"),
    ];
    let _service = world.replica("lifecycle", &settings).await;
    assert_eq!(world.state(OFF).await.unwrap(), MachineState::Running);

    old.hold(At::Read);
    new.add(OFF, "SHUTOFF");
    let fault = world.start(&operator(), OFF).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Conflict, "{fault}");
    let said = "old is unreachable and had this VM when it last answered";
    assert!(fault.message.contains(said), "{fault}");
    assert_eq!(new.commands(), []);

    // The former host answers again and no longer has the VM.
    old.remove(OFF);
    old.release(At::Read);
    eventually("the start succeeds", PATIENCE, async || {
        let started = world.start(&operator(), OFF).await;
        started.map_err(|fault| fault.to_string())
    })
    .await;
    assert_eq!((old.commands().len(), new.accepted("os-start")), (0, 1));
}
