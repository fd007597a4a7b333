//! Simulates that a part of vmwatch is down for ten minutes, with 200 agents. The engine is the real one, on a
//! simulated clock.
//!
//! The servers of the test stay up, because the engine reads rules, VMs and its own state from them. The outage is
//! simulated: samples, evaluation records and changes of alerts wait where they would wait in a deployment.

mod setup;
mod world;

use vmwatch_api::{
    InstanceId,
    alerts::rules::{Condition, RuleSpec},
};

use self::{
    setup::{SHORT, vm},
    world::{Part, Seen, World},
};

/// The simulated time before, during and after the outage, in seconds.
const BEFORE: u64 = 120;
const OUTAGE: u64 = 600;
const AFTER: u64 = 420;

/// The alerts during and after an outage of ten minutes, at whose beginning one VM fails for good.
struct Outcome {
    not_receiving: Vec<Seen>,
    /// Of the starter rule and of the short rule.
    silent: [Vec<Seen>; 2],
}

async fn outage(part: Part) -> Outcome {
    let mut world = World::new().await;
    world.pass(BEFORE).await;
    let began_ms = world.now_ms;
    (world.down, world.has_failed) = (Some(part), true);
    if part == Part::Alert {
        world.stop_engine().await;
    }
    world.pass(OUTAGE).await;
    world.down = None;
    if part == Part::Alert {
        world.start_engine().await;
    }
    world.pass(AFTER).await;
    let is_silence = |spec: &RuleSpec| matches!(spec.condition, Condition::AgentSilent {});
    let silent = [false, true].map(|is_short| {
        let is_about = |spec: &RuleSpec| is_silence(spec) && (spec.for_seconds == SHORT) == is_short;
        world.changes(is_about, began_ms)
    });
    let is_not_receiving = |spec: &RuleSpec| matches!(spec.condition, Condition::NotReceiving {});
    Outcome {
        not_receiving: world.changes(is_not_receiving, began_ms),
        silent,
    }
}

/// Asserts that only the VM that failed is silent, and that the time of the outage does not count.
fn assert_silence(outcome: &Outcome) {
    let failed: InstanceId = vm(0).parse().unwrap();
    for (silent, earliest) in outcome.silent.iter().zip([280, 60]) {
        let [Seen { vm, change, second }] = silent.as_slice() else {
            panic!("{silent:?}");
        };
        assert_eq!((vm.as_ref(), *change), (Some(&failed), "fires"));
        let since_outage = second.saturating_sub(OUTAGE);
        assert!(
            (earliest..earliest + 70).contains(&since_outage),
            "{earliest}: {since_outage}"
        );
    }
}

/// Asserts that one alert says that no samples are received, which fires within this time.
fn assert_one_alert(outcome: &Outcome, within: u64) {
    let [fires, resolved] = outcome.not_receiving.as_slice() else {
        panic!("{:?}", outcome.not_receiving);
    };
    assert_eq!((fires.change, resolved.change), ("fires", "is resolved"));
    assert_eq!(fires.vm, None);
    assert!(fires.second <= within, "{fires:?}");
    assert!((OUTAGE..OUTAGE + 30).contains(&resolved.second), "{resolved:?}");
}

#[tokio::test]
async fn ten_minutes_without_nats_are_one_alert_and_no_silence() {
    let outcome = Box::pin(outage(Part::Nats)).await;
    assert_silence(&outcome);
    assert_one_alert(&outcome, 20);
}

#[tokio::test]
async fn ten_minutes_without_the_database_are_one_alert_and_no_silence() {
    let outcome = Box::pin(outage(Part::Database)).await;
    assert_silence(&outcome);
    assert_one_alert(&outcome, 65);
}

#[tokio::test]
async fn ten_minutes_without_metrics_svc_are_one_alert_and_no_silence() {
    let outcome = Box::pin(outage(Part::Metrics)).await;
    assert_silence(&outcome);
    assert_one_alert(&outcome, 65);
}

#[tokio::test]
async fn ten_minutes_without_alert_svc_are_no_alert_and_no_silence() {
    let outcome = Box::pin(outage(Part::Alert)).await;
    assert_silence(&outcome);
    assert_eq!(outcome.not_receiving, []);
}
