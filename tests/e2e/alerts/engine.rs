//! Tests the evaluation of rules by alert-svc: on evaluation records, states of VMs, operations and silence.

use async_nats::HeaderMap;
use futures::StreamExt;
use mongodb::bson::doc;
use testkit::{PATIENCE, Program, eventually};
use vmwatch_api::{
    alerts::evaluation::{
        EvaluationRecord, FilesystemUse, WATCHED_BUCKET, WATCHED_KEY, WatchedNames, WatchedProcesses,
    },
    events::LiveEvent,
    lifecycle::MachineState,
    processes::ProcessName,
    time::unix_millis,
};

use super::engine_support::{
    CPU, add_rule, alerts, arrived, builder, cpu, evaluated, has_alerts, list_operations, operation, publish,
    record, set_state, start, store_rule, succeeded,
};

#[tokio::test]
async fn condition_fires_one_alert_although_alert_svc_is_killed_at_each_step() {
    let stack = start(builder()).await;
    let rule = add_rule(&stack, "busy", CPU, 1).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    let now = unix_millis();
    // The condition begins, its duration passes, it continues, and it ends.
    for (offset_ms, value, state) in [
        (0, 95.0, "pending"),
        (2000, 96.0, "firing"),
        (3000, 97.0, "firing"),
        (4000, 10.0, "resolved"),
    ] {
        let wanted = [("vm-1", "", state)];
        publish(&stack, &cpu("vm-1", now + offset_ms, value)).await;
        // Killed before or while it evaluates the record.
        alert_svc.process.kill9();
        alert_svc.restart().await;
        has_alerts(&stack, &rule, &wanted).await;
        // Killed when the change is written, and the record is perhaps not acknowledged.
        alert_svc.process.kill9();
        alert_svc.restart().await;
        evaluated(&stack).await;
        has_alerts(&stack, &rule, &wanted).await;
    }
    let all = alerts(&stack, &rule).await;
    assert_eq!(all.len(), 1, "{all:?}");
    let times = (all[0].since_ms, all[0].fired_ms, all[0].resolved_ms);
    assert_eq!(times, (now, Some(now + 2000), Some(now + 4000)));
}

#[tokio::test]
async fn other_replica_continues_after_the_holder_of_the_lease_is_killed() {
    // The lease is long enough that a busy machine does not delay its renewal until it ends.
    let builder = builder().set(Program::Alert, "VMWATCH_ALERT_LEASE", "5s");
    let stack = start(builder.replicas(Program::Alert, 2)).await;
    let rule = store_rule(&stack, "busy", CPU, 0).await;
    // The first samples arrive before the rule is known.
    let now = eventually("an alert fires", PATIENCE, async || {
        let now = unix_millis();
        publish(&stack, &cpu("vm-1", now, 95.0)).await;
        let fires = !alerts(&stack, &rule).await.is_empty();
        if fires {
            Ok(now)
        } else {
            Err("no alert".to_owned())
        }
    })
    .await;
    has_alerts(&stack, &rule, &[("vm-1", "", "firing")]).await;
    let replicas = [0, 1].map(|index| stack.replica(Program::Alert, index));
    let log = "took the lease on evaluating rules";
    let holder = replicas
        .iter()
        .position(|replica| replica.process.log().contains(log))
        .unwrap();
    assert!(!replicas[1 - holder].process.log().contains(log));
    // Frozen while it holds records that it has not acknowledged, then continued when another replica has the lease.
    replicas[holder].process.pause();
    publish(&stack, &cpu("vm-1", now + 1000, 10.0)).await;
    publish(&stack, &cpu("vm-2", now + 1000, 95.0)).await;
    has_alerts(&stack, &rule, &[("vm-1", "", "resolved"), ("vm-2", "", "firing")]).await;
    replicas[holder].process.resume();
    eventually("the lease is lost", PATIENCE, async || {
        let log = replicas[holder].process.log();
        let lost = log.contains("another replica took the lease");
        if lost { Ok(()) } else { Err(log) }
    })
    .await;
    replicas[1 - holder].process.kill9();
    publish(&stack, &cpu("vm-2", now + 2000, 10.0)).await;
    has_alerts(
        &stack,
        &rule,
        &[("vm-1", "", "resolved"), ("vm-2", "", "resolved")],
    )
    .await;
}

#[tokio::test]
async fn alert_has_the_names_and_labels_of_its_vm_and_is_a_live_event() {
    let stack = start(builder()).await;
    set_state(&stack, "vm-1", MachineState::Running).await;
    let subject = "vmwatch.v1.events.alert.*";
    let mut events = stack.bus.client_for_tests().subscribe(subject).await.unwrap();
    stack.bus.settled().await;
    let condition = r#"{"kind":"filesystem","threshold":{"direction":"above","limit":90}}"#;
    let rule = add_rule(&stack, "full", condition, 0).await;
    let used = |at_ms, root, var| {
        let filesystems = [("/", root), ("/var", var)].map(|(mount_point, used)| FilesystemUse {
            mount_point: mount_point.to_owned(),
            used,
        });
        EvaluationRecord {
            filesystems: filesystems.into(),
            ..record("vm-1", at_ms)
        }
    };
    let now = unix_millis();
    publish(&stack, &used(now, 95.0, 96.0)).await;
    let both = [("vm-1", "/", "firing"), ("vm-1", "/var", "firing")];
    let mut all = has_alerts(&stack, &rule, &both).await;
    let first = all.remove(0);
    assert_eq!(first.vm_name.as_deref(), Some("name-of-vm-1"));
    assert_eq!(first.hypervisor.as_deref(), Some("lab"));
    assert_eq!(first.labels.get("hv/os").map(String::as_str), Some("debian"));
    // A starter rule is about filesystems as well.
    let event = tokio::time::timeout(PATIENCE, async {
        loop {
            let event = events.next().await.unwrap();
            let Ok(Some(LiveEvent::Alert(event))) = LiveEvent::read(&event.payload) else {
                panic!("{event:?}");
            };
            if (&event.alert.rule_id, event.alert.subject.as_str()) == (&rule, "/") {
                return event;
            }
        }
    });
    let event = event.await.expect("the alert is published");
    assert_eq!((&event.alert.id, event.alert.value), (&first.id, Some(95.0)));
    publish(&stack, &used(now + 1000, 10.0, 96.0)).await;
    has_alerts(
        &stack,
        &rule,
        &[("vm-1", "/", "resolved"), ("vm-1", "/var", "firing")],
    )
    .await;
}

#[tokio::test]
async fn process_that_is_missing_in_all_parts_of_a_sample_fires() {
    let stack = start(builder()).await;
    let condition =
        r#"{"kind":"process_count","name":"postgres","threshold":{"direction":"below","limit":1}}"#;
    let rule = add_rule(&stack, "postgres is gone", condition, 0).await;
    let revision = eventually("the name is watched", PATIENCE, async || {
        let bucket = stack
            .bus
            .jetstream_for_tests()
            .get_key_value(WATCHED_BUCKET)
            .await;
        let entry = bucket
            .map_err(|error| error.to_string())?
            .entry(WATCHED_KEY)
            .await;
        let entry = entry
            .map_err(|error| error.to_string())?
            .ok_or("there is no list")?;
        let names: WatchedNames = serde_json::from_slice(&entry.value).unwrap();
        let is_watched = names.names.iter().any(|name| name.as_str() == "postgres");
        if is_watched {
            Ok(entry.revision)
        } else {
            Err(format!("{names:?}"))
        }
    })
    .await;
    let part = |at_ms, part, processes: u32| {
        let watched = WatchedProcesses {
            name: ProcessName::new("postgres").unwrap(),
            processes,
            cpu_util: 1.0,
            mem: 1.0,
        };
        EvaluationRecord {
            part,
            has_processes: true,
            processes: if processes == 0 { Vec::new() } else { vec![watched] },
            watched_revision: revision,
            ..record("vm-1", at_ms)
        }
    };
    let now = unix_millis();
    for (offset_ms, in_second_part) in [(0, 1), (1000, 0), (2000, 1)] {
        publish(&stack, &part(now + offset_ms, 0, 0)).await;
        publish(&stack, &part(now + offset_ms, 1, in_second_part)).await;
    }
    let all = has_alerts(&stack, &rule, &[("vm-1", "postgres", "firing")]).await;
    assert_eq!(all[0].since_ms, now + 1000);
    publish(&stack, &record("vm-1", now + 3000)).await;
    has_alerts(&stack, &rule, &[("vm-1", "postgres", "resolved")]).await;
}

#[tokio::test]
async fn samples_from_a_spool_fire_nothing_about_the_past() {
    let stack = start(builder()).await;
    let rule = add_rule(&stack, "busy", CPU, 0).await;
    let now = unix_millis();
    for second in 0..60 {
        let spooled = EvaluationRecord {
            arrived_ms: now,
            ..cpu("vm-1", now - 600_000 + second * 1000, 95.0)
        };
        publish(&stack, &spooled).await;
    }
    publish(&stack, &cpu("vm-2", now, 95.0)).await;
    has_alerts(&stack, &rule, &[("vm-2", "", "firing")]).await;
    evaluated(&stack).await;
    assert_eq!(alerts(&stack, &rule).await.len(), 1);
}

#[tokio::test]
async fn change_and_removal_of_a_rule_end_its_alerts() {
    let stack = start(builder()).await;
    let rule = add_rule(&stack, "busy", CPU, 0).await;
    let now = unix_millis();
    publish(&stack, &cpu("vm-1", now, 95.0)).await;
    has_alerts(&stack, &rule, &[("vm-1", "", "firing")]).await;
    let rules = stack
        .database
        .handle()
        .collection::<mongodb::bson::Document>("alert_rules");
    let own = doc! { "_id": rule.as_str() };
    let longer = doc! { "$set": { "spec.for_seconds": 1, "revision": 2_i64 } };
    rules.update_one(own.clone(), longer).await.unwrap();
    let all = has_alerts(&stack, &rule, &[("vm-1", "", "resolved")]).await;
    assert_eq!(all[0].ended_by, None);
    for offset_ms in [1000, 2000] {
        publish(&stack, &cpu("vm-1", now + offset_ms, 95.0)).await;
    }
    has_alerts(&stack, &rule, &[("vm-1", "", "resolved"), ("vm-1", "", "firing")]).await;
    rules.delete_one(own).await.unwrap();
    has_alerts(
        &stack,
        &rule,
        &[("vm-1", "", "resolved"), ("vm-1", "", "resolved")],
    )
    .await;
}

#[tokio::test]
async fn state_of_a_vm_fires_and_names_the_operation_that_ended_it() {
    let stack = start(builder()).await;
    let operations = list_operations(&stack).await;
    let rule = add_rule(&stack, "off", r#"{"kind":"vm_state","states":["shut_off"]}"#, 0).await;
    set_state(&stack, "vm-1", MachineState::ShutOff).await;
    set_state(&stack, "vm-2", MachineState::Running).await;
    has_alerts(&stack, &rule, &[("vm-1", "lab", "firing")]).await;
    operations
        .lock()
        .await
        .push(succeeded("vm-1", "start", "running"));
    set_state(&stack, "vm-1", MachineState::Running).await;
    let all = has_alerts(&stack, &rule, &[("vm-1", "lab", "resolved")]).await;
    let ended_by = all[0].ended_by.clone().unwrap();
    assert_eq!(
        (ended_by.action.as_str(), ended_by.user.as_str()),
        ("start", "ann")
    );
}

#[tokio::test]
async fn failed_operation_fires_until_a_later_one_succeeds() {
    let stack = start(builder()).await;
    let operations = list_operations(&stack).await;
    let rule = add_rule(&stack, "failed", r#"{"kind":"operation_failed"}"#, 0).await;
    let failed =
        ["timed_out", "failed"].map(|state| operation("vm-1", "start", state, &serde_json::Value::Null));
    operations.lock().await.extend(failed);
    // A VM has one alert, however many operations on it failed.
    has_alerts(&stack, &rule, &[("vm-1", "", "firing")]).await;
    operations
        .lock()
        .await
        .push(succeeded("vm-1", "start", "running"));
    let all = has_alerts(&stack, &rule, &[("vm-1", "", "resolved")]).await;
    assert!(all[0].ended_by.is_some());
}

#[tokio::test]
async fn silence_fires_except_for_a_vm_that_an_operation_stopped() {
    let stack = start(builder()).await;
    let operations = list_operations(&stack).await;
    let silent = add_rule(&stack, "silent", r#"{"kind":"agent_silent"}"#, 300).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    alert_svc.process.kill9();
    for (vm, state) in [
        ("vm-1", MachineState::Running),
        ("vm-2", MachineState::ShutOff),
        ("vm-3", MachineState::ShutOff),
    ] {
        set_state(&stack, vm, state).await;
    }
    operations
        .lock()
        .await
        .push(succeeded("vm-2", "stop", "shut_off"));
    let vms: Vec<_> = ["vm-1", "vm-2", "vm-3"].map(str::to_owned).into();
    let since = unix_millis() - 400_000;
    arrived(&stack, &vms, since).await;
    alert_svc.restart().await;
    let all = has_alerts(&stack, &silent, &[("vm-1", "", "firing"), ("vm-3", "", "firing")]).await;
    assert!(all.iter().all(|alert| alert.since_ms == since));
    publish(&stack, &record("vm-1", unix_millis())).await;
    has_alerts(
        &stack,
        &silent,
        &[("vm-1", "", "resolved"), ("vm-3", "", "firing")],
    )
    .await;
}

#[tokio::test]
async fn record_that_cannot_be_decoded_blocks_nothing() {
    let stack = start(builder()).await;
    let rule = add_rule(&stack, "busy", CPU, 0).await;
    let subject = "vmwatch.v1.evaluation.vm-1";
    let broken = stack
        .bus
        .publish_stored(subject, HeaderMap::new(), "{".into(), PATIENCE);
    broken.await.unwrap();
    publish(&stack, &cpu("vm-1", unix_millis(), 95.0)).await;
    has_alerts(&stack, &rule, &[("vm-1", "", "firing")]).await;
    evaluated(&stack).await;
}
