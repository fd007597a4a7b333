//! Tests the evaluation of rules while NATS or the database is down, and while most agents are silent.

use async_nats::HeaderMap;
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    alerts::{AlertState, RecordId},
    metrics::SAMPLE_SUBJECT_PREFIX,
    time::unix_millis,
};

use super::engine_support::{
    CPU, add_rule, alerts, arrived, builder, cpu, evaluated, has_alerts, has_unacknowledged, publish, record,
    start,
};

const SILENT: &str = r#"{"kind":"agent_silent"}"#;
const NOT_RECEIVING: &str = r#"{"kind":"not_receiving"}"#;

async fn rules(stack: &Stack) -> (RecordId, RecordId) {
    let silent = add_rule(stack, "silent", SILENT, 300).await;
    (silent, add_rule(stack, "not receiving", NOT_RECEIVING, 0).await)
}

fn ids(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("vm-{index}")).collect()
}

#[tokio::test]
async fn change_is_written_after_an_outage_of_the_database_before_its_record_is_acknowledged() {
    let stack = start(builder()).await;
    let rule = add_rule(&stack, "busy", CPU, 0).await;
    let now = unix_millis();
    publish(&stack, &cpu("vm-1", now, 10.0)).await;
    evaluated(&stack).await;
    stack.database.server.kill9();
    publish(&stack, &cpu("vm-1", now + 1000, 95.0)).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    eventually("the write has failed", PATIENCE, async || {
        let log = alert_svc.process.log();
        let failed = log.contains("writing an alert failed; retrying");
        if failed { Ok(()) } else { Err(log) }
    })
    .await;
    assert!(has_unacknowledged(&stack).await);
    stack.database.restart().await;
    has_alerts(&stack, &rule, &[("vm-1", "", "firing")]).await;
    evaluated(&stack).await;
    publish(&stack, &cpu("vm-1", now + 2000, 10.0)).await;
    has_alerts(&stack, &rule, &[("vm-1", "", "resolved")]).await;
}

#[tokio::test]
async fn outage_of_nats_is_one_alert_without_a_vm_and_no_silence() {
    let stack = start(builder()).await;
    let (silent, not_receiving) = rules(&stack).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    alert_svc.process.kill9();
    // The agents have been silent for nearly the duration of the rule when the outage begins. They are too few for a
    // mass silence.
    arrived(&stack, &ids(4), unix_millis() - 280_000).await;
    alert_svc.restart().await;
    eventually("rules are evaluated", PATIENCE, async || {
        let rules = alert_svc.metric("vmwatch_alert_rules").await;
        rules.ok_or_else(|| "no rules".to_owned())
    })
    .await;
    stack.nats.server.kill9();
    let firing = has_alerts(&stack, &not_receiving, &[("", "", "firing")]).await;
    assert_eq!(firing[0].instance_id, None);
    stack.nats.restart().await;
    has_alerts(&stack, &not_receiving, &[("", "", "resolved")]).await;
    assert_eq!(alerts(&stack, &silent).await, []);
}

#[tokio::test]
async fn silence_of_most_agents_at_once_is_one_alert_until_they_are_back() {
    let stack = start(builder()).await;
    let (silent, not_receiving) = rules(&stack).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    alert_svc.process.kill9();
    let vms = ids(6);
    arrived(&stack, &vms, unix_millis() - 400_000).await;
    alert_svc.restart().await;
    has_alerts(&stack, &not_receiving, &[("", "", "firing")]).await;
    for vm in &vms {
        publish(&stack, &record(vm, unix_millis())).await;
    }
    has_alerts(&stack, &not_receiving, &[("", "", "resolved")]).await;
    assert_eq!(alerts(&stack, &silent).await, []);
}

#[tokio::test]
async fn restart_of_alert_svc_after_an_outage_of_its_own_is_no_alert() {
    let stack = start(builder()).await;
    let (silent, not_receiving) = rules(&stack).await;
    let busy = add_rule(&stack, "busy", CPU, 0).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    alert_svc.process.kill9();
    let vms = ids(6);
    let now = unix_millis();
    arrived(&stack, &vms, now - 600_000).await;
    let stale = serde_json::json!({ "intervals": [], "checked_ms": now - 590_000 }).to_string();
    let states = stack
        .database
        .handle()
        .collection::<mongodb::bson::Document>("alert_state");
    let set = mongodb::bson::doc! { "$set": { "standstills": stale } };
    states.update_one(mongodb::bson::doc! {}, set).await.unwrap();
    // What metrics-svc has published meanwhile, and a sample that it is storing at the moment.
    for vm in &vms {
        publish(&stack, &cpu(vm, now - 5000, 95.0)).await;
    }
    let subject = format!("{SAMPLE_SUBJECT_PREFIX}vm-0");
    let stored = stack
        .bus
        .publish_stored(subject, HeaderMap::new(), "{}".into(), PATIENCE);
    stored.await.unwrap();
    alert_svc.restart().await;
    eventually("all VMs have an alert", PATIENCE, async || {
        let all = alerts(&stack, &busy).await;
        let firing = all
            .iter()
            .filter(|alert| alert.state == AlertState::Firing)
            .count();
        if firing == vms.len() {
            Ok(())
        } else {
            Err(format!("{all:?}"))
        }
    })
    .await;
    evaluated(&stack).await;
    assert_eq!(alerts(&stack, &silent).await, []);
    assert_eq!(alerts(&stack, &not_receiving).await, []);
}

#[tokio::test]
async fn stored_state_that_cannot_be_decoded_is_counted_and_ignored() {
    let stack = start(builder()).await;
    let busy = add_rule(&stack, "busy", CPU, 0).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    alert_svc.process.kill9();
    arrived(&stack, &["an/invalid id".to_owned()], unix_millis()).await;
    let states = stack
        .database
        .handle()
        .collection::<mongodb::bson::Document>("alert_state");
    let set = mongodb::bson::doc! { "$set": { "standstills": "{" } };
    states.update_one(mongodb::bson::doc! {}, set).await.unwrap();
    alert_svc.restart().await;
    publish(&stack, &cpu("vm-1", unix_millis(), 95.0)).await;
    has_alerts(&stack, &busy, &[("vm-1", "", "firing")]).await;
    let metrics = alert_svc.metrics().await;
    for collection in ["alert_state", "alert_progress"] {
        let count = format!("vmwatch_broken_records_total{{collection=\"{collection}\"}} 1");
        assert!(metrics.contains(&count), "{metrics}");
    }
}
