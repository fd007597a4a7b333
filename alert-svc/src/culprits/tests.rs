//! Tests the culprits of alerts with a real metrics-svc and database.

use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    alerts::{AlertState, RecordId, culprits::TopMeasure},
    metrics::SAMPLE_SUBJECT_PREFIX,
    time::{CreateDate, UtcOffset, unix_millis},
};

use super::{search::tests::alert, *};
use crate::definitions;

const SECOND: u64 = 1000;

/// Starts NATS, the database and metrics-svc.
async fn start() -> Stack {
    let others = [Program::Gateway, Program::Auth, Program::Lifecycle];
    let builder = others
        .into_iter()
        .fold(Stack::builder(), |builder, program| builder.replicas(program, 0));
    builder.start().await
}

/// Publishes a sample in which `pg_restore` uses 81 % of the VM's CPU time, and waits until it is stored.
async fn publish(stack: &Stack, at_ms: u64) {
    let sample = json!({
        "instance_id": "vm-1", "create_date": CreateDate::at_millis(at_ms, UtcOffset::UTC),
        "net_incoming": 0.0, "net_outgoing": 0.0,
        "vm_cpu": { "user": 9.0, "nice": 0.0, "system": 1.0 },
        "processes": [
            {
                "cmd": "pg_restore", "pid": 4121, "cpu_util": 81.0, "mem": 0.1, "disk_read": 0.0, "disk_write": 0.0,
                "running_time": 1_482_236_515.0, "cpu_seconds": 8.1, "owner": { "user": "postgres" },
            },
            {
                "cmd": "nginx", "pid": 20, "cpu_util": 1.0, "mem": 0.1, "disk_read": 0.0, "disk_write": 0.0,
                "running_time": 1_482_236_515.0, "cpu_seconds": 0.1, "shutdown_time": 1_482_236_600.0, "exit_code": 137,
            },
        ],
    });
    let jetstream = stack.bus.jetstream_for_tests();
    let subject = format!("{SAMPLE_SUBJECT_PREFIX}vm-1");
    let published = jetstream.publish(subject, sample.to_string().into()).await;
    published.unwrap().await.unwrap();
    eventually("the sample is stored", PATIENCE, async || {
        let stored = stack
            .replica(Program::Metrics, 0)
            .metric("vmwatch_rows_stored_total");
        let stored = stored.await.unwrap_or(0.0);
        (stored >= 2.0).then_some(()).ok_or(format!("{stored}"))
    })
    .await;
}

/// An alert of this condition and state, which fired at this time.
fn stored(condition: &Value, state: AlertState, fired_ms: u64) -> StoredAlert {
    let id = RecordId::from_parts(&[&condition.to_string(), state.as_str()]);
    StoredAlert {
        id: id.to_string(),
        alert: Alert {
            id,
            state,
            since_ms: fired_ms - 10 * SECOND,
            fired_ms: Some(fired_ms),
            ..alert(condition, "")
        },
        open: state != AlertState::Resolved,
        unnotified: true,
    }
}

async fn read(store: &Store, id: &RecordId) -> StoredAlert {
    let found = store.alerts.find_one(doc! { "_id": id.as_str() }).await;
    found.unwrap().unwrap()
}

/// Waits until an alert has culprits.
async fn explained(store: &Store, id: &RecordId) -> Culprits {
    eventually("the alert has culprits", PATIENCE, async || {
        let stored = read(store, id).await;
        let revision = stored.alert.revision;
        let culprits = stored.alert.culprits.ok_or("it has none")?;
        assert_eq!((revision, stored.unnotified), (5, true));
        Ok(culprits)
    })
    .await
}

#[tokio::test]
async fn each_firing_alert_gets_its_culprits() {
    let stack = start().await;
    let store = Store::new(&stack.database.handle());
    let fired_ms = unix_millis() / SECOND * SECOND - 30 * SECOND;
    publish(&stack, fired_ms).await;
    let above = json!({ "direction": "above", "limit": 90.0 });
    let cpu = json!({ "kind": "measure", "measure": "cpu_util", "threshold": above });
    let memory = json!({ "kind": "measure", "measure": "mem", "threshold": above });
    let missing = json!({ "kind": "process_count", "name": "nginx", "threshold": { "direction": "below", "limit": 1.0 } });
    let silent = json!({ "kind": "agent_silent" });
    let firing = stored(&cpu, AlertState::Firing, fired_ms);
    let acknowledged = stored(&missing, AlertState::Acknowledged, fired_ms);
    // The VM has been silent for five minutes.
    let late = stored(&silent, AlertState::Firing, fired_ms + 300 * SECOND);
    let untouched = [AlertState::Pending, AlertState::Resolved].map(|state| stored(&cpu, state, fired_ms));
    let all = [&firing, &acknowledged, &late, &untouched[0], &untouched[1]];
    store.alerts.insert_many(all).await.unwrap();

    let (changed, shutdown) = (Arc::new(Notify::new()), CancellationToken::new());
    let definitions = definitions::follow(store.clone(), shutdown.clone());
    let running = tokio::spawn(run(
        stack.bus.clone(),
        store.clone(),
        definitions,
        Arc::clone(&changed),
        shutdown.clone(),
    ));
    let found = explained(&store, &firing.alert.id).await;
    let first = &found.processes[0];
    assert_eq!(
        (first.name.as_str(), first.pid, first.amount, first.share),
        ("pg_restore", 4121, 8.1, Some(0.81))
    );
    assert_eq!(first.owner.user.as_deref(), Some("postgres"));
    assert_eq!(
        (found.measure, found.last_known, found.problem),
        (TopMeasure::Cpu, false, None)
    );

    let found = explained(&store, &acknowledged.alert.id).await;
    let of_nginx: Vec<_> = found
        .processes
        .iter()
        .map(|found| (found.pid, found.exit_code))
        .collect();
    assert_eq!((of_nginx, found.problem), (vec![(20, Some(137))], None));

    let found = explained(&store, &late.alert.id).await;
    assert_eq!((found.last_known, found.from_ms), (true, fired_ms));
    assert_eq!(found.processes[0].name, "pg_restore");
    let problem = found.problem.unwrap();
    assert!(problem.contains("no vmwatch-lifecycle answers"), "{problem}");

    // An alert whose culprits cannot be read gets the reason at once.
    stack.replica(Program::Metrics, 0).process.pause();
    let unread = stored(&memory, AlertState::Firing, fired_ms);
    store.alerts.insert_one(&unread).await.unwrap();
    let began = Instant::now();
    changed.notify_waiters();
    let found = explained(&store, &unread.alert.id).await;
    assert!(found.processes.is_empty() && found.problem.is_some(), "{found:?}");
    assert!(began.elapsed() < LIMIT + INTERVAL, "{:?}", began.elapsed());

    for alert in untouched {
        let now = read(&store, &alert.alert.id).await.alert;
        assert_eq!((now.revision, now.culprits), (4, None));
    }
    shutdown.cancel();
    running.await.unwrap();
}
