//! Tests an outage of metrics-svc with 200 agents. It lasts until vmwatch notices that samples wait, which takes a
//! little more than a minute. The unit tests of alert-svc simulate outages of ten minutes.

use std::time::Duration;

use testkit::{PATIENCE, Program, Stack, eventually};
use tokio::time::MissedTickBehavior;
use vmwatch_api::{alerts::AlertState, lifecycle::MachineState, time::unix_millis};

use super::engine_support::{add_rule, alerts, builder, has_alerts, make_lifecycle_buckets, set_state};
use crate::rest::client::{publish, sample};

const AGENTS: u32 = 200;
/// Interval of the samples of each agent.
const INTERVAL: Duration = Duration::from_secs(5);

fn vm(agent: u32) -> String {
    format!("vm-{agent}")
}

/// Publishes the samples of all agents, one after the other.
async fn report(stack: &Stack) {
    let mut ticks = tokio::time::interval(INTERVAL / AGENTS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut agents = (0..AGENTS).cycle();
    loop {
        ticks.tick().await;
        if let Some(agent) = agents.next() {
            publish(stack, &sample(&vm(agent), unix_millis(), 10.0)).await;
        }
    }
}

async fn outage(stack: &Stack) {
    let silent = add_rule(stack, "silent", r#"{"kind":"agent_silent"}"#, 60).await;
    let not_receiving = add_rule(stack, "not receiving", r#"{"kind":"not_receiving"}"#, 0).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    eventually("two samples of each agent are evaluated", PATIENCE, async || {
        let records = alert_svc.metric("vmwatch_alert_records_total").await;
        let enough = records.is_some_and(|records| records >= f64::from(2 * AGENTS));
        enough.then_some(()).ok_or_else(|| format!("{records:?}"))
    })
    .await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.kill9();
    eventually("an alert says that samples wait", 4 * PATIENCE, async || {
        let all = alerts(stack, &not_receiving).await;
        let fires = all.iter().any(|alert| alert.state == AlertState::Firing);
        fires.then_some(()).ok_or_else(|| format!("{all:?}"))
    })
    .await;
    metrics.restart().await;
    has_alerts(stack, &not_receiving, &[("", "", "resolved")]).await;
    assert_eq!(alerts(stack, &silent).await, []);
}

#[tokio::test]
async fn outage_of_metrics_svc_is_one_alert_and_no_silence() {
    let stack = builder().replicas(Program::Metrics, 1).without_rates();
    let stack = stack.start().await;
    make_lifecycle_buckets(&stack).await;
    for agent in 0..AGENTS {
        set_state(&stack, &vm(agent), MachineState::Running).await;
    }
    tokio::select! {
        () = outage(&stack) => {}
        () = report(&stack) => {}
    }
}
