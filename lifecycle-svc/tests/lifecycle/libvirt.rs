//! Tests with libvirt's test driver, which simulates VMs in different states. Their state lives in the connection of
//! lifecycle-svc.

use std::{fmt::Write as _, fs, path::Path, time::Duration};

use async_nats::jetstream::stream::{Config, DiscardPolicy};
use futures::future::join_all;
use testkit::{PATIENCE, eventually};
use vmwatch_api::{
    Role, Scope,
    audit::AuditResult,
    lifecycle::{
        ForceStop, MachineState, Operation, OperationState, Reboot, RebootTarget, Start, State, Stop,
    },
    metrics::Limit,
    vms::{VmPage, VmQuery},
    wire::FaultKind,
};
use vmwatch_bus::audit;

use crate::support::{Replica, USER, World, context, instance_id, keyed, operator, states, target, within};

const OFF: &str = "11111111-1111-4111-8111-111111111111";
const RUNNING: &str = "22222222-2222-4222-8222-222222222222";
const PAUSED: &str = "33333333-3333-4333-8333-333333333333";
const ELSEWHERE: &str = "44444444-4444-4444-8444-444444444444";
const NOWHERE: &str = "99999999-9999-4999-8999-999999999999";

/// Writes a file for libvirt's test driver that defines VMs. A state is a virDomainState: 1 (running), 3 (paused) or 5
/// (shut off).
fn node(folder: &Path, name: &str, machines: &[(&str, u8)]) -> String {
    let mut node = String::from("<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>\n");
    for (index, (uuid, state)) in machines.iter().enumerate() {
        let _ = writeln!(
            node,
            "<domain type='test'><name>{name}-{index}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>\
             <os><type>hvm</type></os><test:runstate>{state}</test:runstate></domain>"
        );
    }
    node.push_str("</node>\n");
    let path = folder.join(format!("{name}.xml"));
    fs::write(&path, node).unwrap();
    format!("{name}=test://{}", path.display())
}

/// Starts lifecycle-svc with two hypervisors.
async fn service(world: &World) -> Replica {
    let hypervisors = [
        node(world.path(), "one", &[(OFF, 5), (RUNNING, 1), (PAUSED, 3)]),
        node(world.path(), "two", &[(ELSEWHERE, 5)]),
    ];
    world
        .replica("lifecycle", &[("VMWATCH_HYPERVISORS", &hypervisors.join(","))])
        .await
}

#[tokio::test]
async fn vm_start_succeeds_only_when_the_vm_runs() {
    let world = World::new().await;
    let _service = service(&world).await;
    for id in [OFF, RUNNING, PAUSED, ELSEWHERE] {
        let before = world.state(id).await.unwrap();
        assert_eq!(before == MachineState::Running, id == RUNNING);
        assert_eq!(
            world.start(&operator(), id).await.unwrap(),
            MachineState::Running,
            "{id}"
        );
        assert_eq!(world.state(id).await.unwrap(), MachineState::Running, "{id}");
    }
    for id in [NOWHERE, "vm-1", "22222222222242228222222222222222"] {
        let fault = world.start(&operator(), id).await.unwrap_err();
        assert_eq!(fault.kind, FaultKind::NotFound, "{fault}");
        assert_eq!(fault.message, "there is no VM with this instance_id");
    }
}

#[tokio::test]
async fn vm_actions_reach_the_wanted_state_or_explain_the_failure() {
    let world = World::new().await;
    let _service = service(&world).await;
    let bus = &world.bus;
    let reboot = |id: &str, hard| RebootTarget {
        instance_id: instance_id(id),
        hard,
        hypervisor: None,
    };

    let machine = bus
        .call::<Reboot>(&operator(), &reboot(RUNNING, false))
        .await
        .unwrap();
    assert_eq!(machine.state, MachineState::Running);
    let machine = bus.call::<Stop>(&operator(), &target(RUNNING)).await.unwrap();
    assert_eq!(machine.state, MachineState::ShutOff);
    assert_eq!(world.state(RUNNING).await.unwrap(), MachineState::ShutOff);
    // The VM is already off, so a second stop succeeds.
    bus.call::<Stop>(&operator(), &target(RUNNING)).await.unwrap();

    for (what, fault) in [
        (
            "the VM is off; start it",
            bus.call::<Reboot>(&operator(), &reboot(OFF, false))
                .await
                .unwrap_err(),
        ),
        (
            "start it first, or force it off",
            bus.call::<Stop>(&operator(), &target(PAUSED)).await.unwrap_err(),
        ),
    ] {
        assert_eq!(fault.kind, FaultKind::Conflict, "{fault}");
        assert!(fault.message.contains(what), "{fault}");
    }
    assert_eq!(world.state(PAUSED).await.unwrap(), MachineState::Paused);
    let machine = bus.call::<ForceStop>(&operator(), &target(PAUSED)).await.unwrap();
    assert_eq!(machine.state, MachineState::ShutOff);
}

#[tokio::test]
async fn operation_is_recorded_with_history_and_audit() {
    let world = World::new().await;
    let _service = service(&world).await;
    let (context, id) = keyed::<Start>(Duration::from_secs(30), OFF, "the key");
    world.start(&context, OFF).await.unwrap();

    let operation = world.operation(&id).await.unwrap();
    assert_eq!(operation.user, USER);
    assert_eq!(operation.source.as_deref(), Some("192.0.2.7"));
    assert_eq!(operation.hypervisor.as_deref(), Some("one"));
    assert_eq!(operation.request_id, context.request_id);
    assert_eq!(
        states(&operation),
        [
            OperationState::Requested,
            OperationState::Running,
            OperationState::Running,
            OperationState::Succeeded
        ]
    );
    assert_eq!(operation.history[1].text, "sending to one: start the VM");
    assert!(operation.finished_at_ms.unwrap() >= operation.requested_at_ms);

    let audited = world.audit_of(&id).await;
    let results: Vec<_> = audited.iter().map(|record| record.result).collect();
    assert_eq!(results, [AuditResult::Requested, AuditResult::Succeeded]);
    for record in &audited {
        assert_eq!(record.action, "lifecycle.start");
        assert_eq!(
            (record.user.as_str(), record.source.as_deref()),
            (USER, Some("192.0.2.7"))
        );
        assert_eq!(record.target.as_deref(), Some(OFF));
    }

    let fault = world.start(&operator(), NOWHERE).await.unwrap_err();
    let failed = &world.listed(&operator(), Some(NOWHERE), 1).await[0];
    assert_eq!(failed.state, OperationState::Failed);
    assert_eq!(failed.fault.as_ref().unwrap().message, fault.message);
}

#[tokio::test]
async fn forbidden_action_is_audited_and_creates_no_operation() {
    let world = World::new().await;
    let _service = service(&world).await;
    let viewer = context("eve", Role::Viewer, Scope::All);
    let fault = world.start(&viewer, OFF).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Forbidden);
    let limited = context("mallory", Role::Operator, Scope::Only(vec![instance_id(RUNNING)]));
    let fault = world.start(&limited, OFF).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::NotFound);
    // Refused reads are not audited.
    world.bus.call::<State>(&limited, &target(OFF)).await.unwrap_err();

    let audited = audit::newest(&world.bus, 10).await.unwrap();
    let lines: Vec<_> = audited
        .iter()
        .map(|record| {
            (
                record.user.as_str(),
                record.action.as_str(),
                record.target.as_deref(),
                record.result,
            )
        })
        .collect();
    assert_eq!(
        lines,
        [
            ("eve", "lifecycle.start", Some(OFF), AuditResult::Refused),
            ("mallory", "lifecycle.start", Some(OFF), AuditResult::Refused),
        ]
    );
    assert_eq!(world.operations(&operator(), None).await, []);
    assert_eq!(world.state(OFF).await.unwrap(), MachineState::ShutOff);
}

#[tokio::test]
async fn refused_batch_of_actions_is_audited_per_vm() {
    let world = World::new().await;
    let _service = service(&world).await;
    // All these requests have the same request id, like those of one POST /actions.
    let viewer = context("eve", Role::Viewer, Scope::All);
    let ids: Vec<_> = (0..100)
        .map(|index| format!("55555555-5555-4555-8555-{index:012}"))
        .collect();
    let refused = join_all(ids.iter().map(|id| world.start(&viewer, id))).await;
    assert!(refused.iter().all(Result::is_err));
    let mut targets: Vec<_> = audit::newest(&world.bus, 1000)
        .await
        .unwrap()
        .into_iter()
        .filter_map(|record| record.target)
        .collect();
    targets.sort();
    assert_eq!(targets, ids);
}

#[tokio::test]
async fn action_is_refused_if_it_cannot_be_audited() {
    let world = World::new().await;
    let hypervisors = node(world.path(), "one", &[(OFF, 5)]);
    let strict = world
        .replica("strict", &[("VMWATCH_HYPERVISORS", &hypervisors)])
        .await;
    let jetstream = world.bus.jetstream_for_tests();
    let stream = jetstream.get_stream("VMWATCH_AUDIT").await.unwrap();
    let full = Config {
        max_bytes: 1,
        discard: DiscardPolicy::New,
        ..stream.cached_info().config.clone()
    };
    jetstream.update_stream(&full).await.unwrap();
    let fault = world.start(&operator(), OFF).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Unavailable);
    assert!(fault.message.contains("audit"), "{fault}");
    assert_eq!(world.state(OFF).await.unwrap(), MachineState::ShutOff);
    drop(strict);

    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_AUDIT_REQUIRED", "false"),
    ];
    let _lenient = world.replica("lenient", &settings).await;
    assert_eq!(
        world.start(&operator(), OFF).await.unwrap(),
        MachineState::Running
    );
}

#[tokio::test]
async fn audit_records_cannot_be_deleted() {
    let world = World::new().await;
    let _service = service(&world).await;
    world.start(&operator(), OFF).await.unwrap();
    let mut stream = world
        .bus
        .jetstream_for_tests()
        .get_stream("VMWATCH_AUDIT")
        .await
        .unwrap();
    let state = stream.info().await.unwrap().state.clone();
    assert!(stream.delete_message(state.first_sequence).await.is_err());
    assert!(stream.purge().await.is_err());
    assert_eq!(stream.info().await.unwrap().state.messages, state.messages);
}

/// A migration can leave the definition of a VM on its former hypervisor. A start there would boot a second VM that
/// writes to the same disk.
#[tokio::test]
async fn actions_on_a_vm_defined_on_two_hypervisors_are_refused() {
    let world = World::new().await;
    let hypervisors = [
        node(world.path(), "a", &[(RUNNING, 1)]),
        node(world.path(), "b", &[(RUNNING, 5), (OFF, 5)]),
    ]
    .join(",");
    let settings = [("VMWATCH_HYPERVISORS", hypervisors.as_str())];
    for round in 0..3 {
        let replicas = join_all((0..2).map(|index| {
            let name = format!("lifecycle-{round}-{index}");
            let world = &world;
            async move { world.replica(&name, &settings).await }
        }));
        let _replicas = replicas.await;
        // Reads succeed, and fill the cache of where VMs are.
        world.state(RUNNING).await.unwrap();
        let (bus, context, both) = (&world.bus, operator(), target(RUNNING));
        let reboot = RebootTarget {
            instance_id: instance_id(RUNNING),
            hard: true,
            hypervisor: None,
        };
        for _ in 0..2 {
            let faults = [
                bus.call::<Start>(&context, &both).await.unwrap_err(),
                bus.call::<Stop>(&context, &both).await.unwrap_err(),
                bus.call::<ForceStop>(&context, &both).await.unwrap_err(),
                bus.call::<Reboot>(&context, &reboot).await.unwrap_err(),
            ];
            for fault in faults {
                assert_eq!(fault.kind, FaultKind::Conflict, "{fault}");
                assert_eq!(
                    fault.message,
                    "the VM is defined on a and b; remove it from all but one of these hypervisors, or name the one \
                     that shall act; nothing was done"
                );
            }
        }
        let listed = world.vms(&context, &VmQuery::default()).await.vms;
        let vm = listed.iter().find(|vm| vm.instance_id.as_str() == RUNNING);
        let vm = vm.expect("the VM is listed once");
        assert_eq!(
            (vm.hypervisor.as_deref(), vm.also_on.as_slice(), vm.state),
            (Some("a"), &["b".to_owned()][..], Some(MachineState::Running))
        );
        let records = world.operations(&context, Some(RUNNING)).await;
        let acted = |operation: &Operation| {
            let texts = operation.history.iter().map(|event| event.text.as_str());
            texts.into_iter().any(|text| text.starts_with("sending to"))
        };
        assert!(!records.is_empty() && !records.iter().any(acted), "{records:?}");
    }
}

#[tokio::test]
async fn only_setup_changes_the_existing_operation_bucket() {
    let world = World::new().await;
    drop(service(&world).await);
    let keep = async || {
        let bucket = world
            .bus
            .jetstream_for_tests()
            .get_stream("KV_vmwatch_operations")
            .await;
        bucket.unwrap().cached_info().config.max_age
    };
    let week = Duration::from_hours(7 * 24);
    assert_eq!(keep().await, week);

    let hypervisors = node(world.path(), "one", &[(OFF, 5)]);
    let longer = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_OPERATIONS_KEEP", "8d"),
    ];
    let replica = world.replica("longer", &longer).await;
    let log = replica.0.log();
    assert!(
        log.contains("run `vmwatch-lifecycle setup` to change it"),
        "{log}"
    );
    assert_eq!(keep().await, week, "a running service must not change the bucket");

    let (well, printed, errors) = world.command_with(&["setup"], &longer);
    assert!(well, "{errors}");
    assert!(
        printed.contains("KV_vmwatch_operations: changed: max_age"),
        "{printed}"
    );
    assert_eq!(keep().await, week + Duration::from_hours(24));
}

#[tokio::test]
async fn lists_of_vms_and_operations_respect_scope() {
    let world = World::new().await;
    let _service = service(&world).await;
    world.start(&operator(), OFF).await.unwrap();
    world.start(&operator(), ELSEWHERE).await.unwrap();
    let scoped = context(
        "eve",
        Role::Viewer,
        Scope::Only(vec![instance_id(ELSEWHERE), instance_id(PAUSED)]),
    );

    let mut query = VmQuery {
        limit: Limit::new(3).unwrap(),
        ..VmQuery::default()
    };
    let ids = |page: &VmPage| {
        let ids = page.vms.iter().map(|vm| vm.instance_id.to_string());
        ids.collect::<Vec<_>>()
    };
    eventually("the list shows the started VM", PATIENCE, async || {
        let list = world.vms(&operator(), &VmQuery::default()).await;
        let mut found = list.vms.iter();
        let vm = found.find(|vm| vm.instance_id.as_str() == ELSEWHERE).unwrap();
        (vm.state == Some(MachineState::Running))
            .then_some(())
            .ok_or_else(|| format!("{vm:?}"))
    })
    .await;
    let all = world.vms(&operator(), &query).await;
    assert_eq!(ids(&all), [OFF, RUNNING, PAUSED]);
    assert!(all.hypervisors.iter().all(|part| part.reachable && !part.late));
    query.cursor = all.next;
    let rest = world.vms(&operator(), &query).await;
    assert_eq!((ids(&rest).len(), rest.total, &rest.next), (1, 4, &None));
    let last = &rest.vms[0];
    assert_eq!(
        (last.name.as_deref(), last.hypervisor.as_deref(), last.state),
        (Some("two-0"), Some("two"), Some(MachineState::Running))
    );
    let mine = world.vms(&scoped, &VmQuery::default()).await;
    assert_eq!(ids(&mine), [PAUSED, ELSEWHERE]);

    let theirs = world.listed(&operator(), None, 2).await;
    assert_eq!(
        theirs[0].instance_id.as_str(),
        ELSEWHERE,
        "operations are listed newest first"
    );
    let mine = world.operations(&scoped, None).await;
    assert_eq!(
        mine.iter()
            .map(|one| one.instance_id.as_str())
            .collect::<Vec<_>>(),
        [ELSEWHERE]
    );
    assert_eq!(world.operations(&scoped, Some(OFF)).await, []);

    let hidden = theirs[1].id.clone();
    let which = vmwatch_api::lifecycle::OperationRef { operation_id: hidden };
    let fault = world
        .bus
        .call::<vmwatch_api::lifecycle::OperationsGet>(&scoped, &which)
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::NotFound);
    let fault = world
        .bus
        .call::<Stop>(&scoped, &target(ELSEWHERE))
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Forbidden);
}

#[tokio::test]
async fn reused_idempotency_key_with_other_parameters_conflicts() {
    let world = World::new().await;
    let _service = service(&world).await;
    let deadline = Duration::from_secs(30);
    let (context, id) = keyed::<Reboot>(deadline, RUNNING, "k");
    let reboot = |hard| RebootTarget {
        instance_id: instance_id(RUNNING),
        hard,
        hypervisor: None,
    };
    let answers =
        join_all((0..20).map(|_| async { world.bus.call::<Reboot>(&context, &reboot(false)).await })).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    let operation = world.operation(&id).await.unwrap();
    let sent = operation
        .history
        .iter()
        .filter(|event| event.text.starts_with("sending to"))
        .count();
    assert_eq!(sent, 1, "{operation:?}");

    let fault = world
        .bus
        .call::<Reboot>(&context, &reboot(true))
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Conflict);
    assert!(fault.message.contains("idempotency key"), "{fault}");

    let mut long = within(deadline);
    long.idempotency_key = Some("k".repeat(129));
    assert_eq!(
        world.start(&long, OFF).await.unwrap_err().kind,
        FaultKind::Invalid
    );
}

#[tokio::test]
async fn command_line_prints_vm_state_and_operations_and_audit_records() {
    let world = World::new().await;
    let _service = service(&world).await;
    let (context, id) = keyed::<Start>(Duration::from_secs(30), OFF, "k");
    world.start(&context, OFF).await.unwrap();
    world.start(&operator(), NOWHERE).await.unwrap_err();

    let (well, text, _) = world.command(&["state", OFF]);
    assert!(well);
    assert_eq!(text, format!("{OFF}  running\n"));
    let (well, text, errors) = world.command(&["state", NOWHERE, "--json"]);
    assert!(!well && text.is_empty());
    assert_eq!(
        errors,
        "vmwatch-lifecycle: there is no VM with this instance_id\n"
    );

    world.listed(&operator(), Some(OFF), 1).await;
    let (_, text, _) = world.command(&["operations", "--instance", OFF]);
    let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().skip(1).collect();
    assert_eq!(
        row,
        [id.as_str(), "start", OFF, "one", USER, "192.0.2.7", "succeeded"]
    );
    let (_, text, _) = world.command(&["operations", id.as_str()]);
    assert!(text.contains("sending to one: start the VM"), "{text}");
    let (_, json, _) = world.command(&["operations", id.as_str(), "--json"]);
    let operation: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(operation["state"], "succeeded");

    let (_, text, _) = world.command(&["audit", "--limit", "2"]);
    assert_eq!(text.lines().count(), 3, "{text}");
    let last = text.lines().last().unwrap();
    for part in [
        USER,
        "192.0.2.7",
        "lifecycle.start",
        NOWHERE,
        "failed",
        "there is no VM",
    ] {
        assert!(last.contains(part), "{part}: {last}");
    }
    let (_, json, _) = world.command(&["audit", "--json"]);
    let records: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(records.len(), 4);
    assert_eq!(records[1]["result"], "succeeded");
}
