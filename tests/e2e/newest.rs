//! Tests the cache of newest rows in metrics-svc: equal reads share one database query, and a cached answer is used at
//! most for the time that `VMWATCH_NEWEST_ROWS_KEPT` sets.

use std::time::{Duration, Instant, SystemTime};

use futures::future::join_all;
use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, codes};
use vmwatch_api::{Role, Scope, time::CreateDate};
use vmwatch_service::config::UTC_OFFSET;

use crate::rows::{store_vms, vm_row};

const VM: &str = "vm-1";
const SETTING: &str = "VMWATCH_NEWEST_ROWS_KEPT";

async fn stack(kept: &str) -> Stack {
    let builder = Stack::builder().replicas(Program::Lifecycle, 0);
    builder.set(Program::Metrics, SETTING, kept).start().await
}

/// Stores a row that is newer than all previous rows.
async fn store_row(stack: &Stack, number: i32) {
    let now = CreateDate::at(SystemTime::now(), UTC_OFFSET.default.parse().unwrap());
    store_vms(stack, [vm_row(VM, now.as_str(), number)]).await;
}

async fn read(stack: &Stack, session: &str, limit: u32) -> Vec<Value> {
    let data = json!({ "instance_id": VM });
    stack.gateway(0).rows(session, codes::VM, limit, data).await
}

/// Returns the number of database queries for newest rows.
async fn queries(stack: &Stack) -> u64 {
    let metrics = stack.replica(Program::Metrics, 0).metrics().await;
    let counted = metrics
        .lines()
        .find_map(|line| line.strip_prefix("vmwatch_newest_rows_queries_total "));
    counted.map_or(0, |count| count.parse().unwrap())
}

#[tokio::test]
async fn cached_rows_are_not_older_than_the_setting_allows() {
    let kept = Duration::from_millis(500);
    let stack = stack("500ms").await;
    let session = stack.session(Role::Viewer, Scope::All).await;
    // The time at which each row was stored; a row's number is its index.
    let mut stored = Vec::new();
    let (mut given_again, end) = (0, Instant::now() + Duration::from_secs(4));
    while Instant::now() < end {
        store_row(&stack, i32::try_from(stored.len()).unwrap()).await;
        stored.push(Instant::now());
        let asked = Instant::now();
        let rows = read(&stack, &session, 1).await;
        let newest = rows.first().map(|row| row["proc"].as_u64().unwrap());
        let newest = usize::try_from(newest.expect("a row was stored")).unwrap();
        let missing = stored.get(newest + 1).map(|since| asked.duration_since(*since));
        assert!(
            missing.is_none_or(|since| since <= kept),
            "the answer does not contain a row that was stored {missing:?} before the request"
        );
        given_again += u32::from(missing.is_some());
    }
    assert!(given_again > 0, "some answers must come from the cache");
    testkit::eventually("the row that was stored last is returned", PATIENCE, async || {
        let rows = read(&stack, &session, 1).await;
        let newest = rows.first().and_then(|row| row["proc"].as_u64());
        let newest = newest.and_then(|newest| usize::try_from(newest).ok());
        (newest == Some(stored.len() - 1))
            .then_some(())
            .ok_or(format!("{newest:?}"))
    })
    .await;
}

#[tokio::test]
async fn only_equal_reads_share_a_database_query() {
    let stack = stack("1s").await;
    store_row(&stack, 1).await;
    let session = stack.session(Role::Viewer, Scope::All).await;
    let before = queries(&stack).await;
    let started = Instant::now();
    join_all((0..60).map(|_| read(&stack, &session, 3))).await;
    let seconds = started.elapsed().as_secs();
    let asked = queries(&stack).await - before;
    assert!(
        (1..=1 + seconds).contains(&asked),
        "60 equal reads made {asked} queries in {seconds} s"
    );
    let before = queries(&stack).await;
    read(&stack, &session, 2).await;
    assert_eq!(queries(&stack).await, before + 1);
}

#[tokio::test]
async fn each_read_queries_the_database_if_the_cache_is_off() {
    let stack = stack("0s").await;
    let session = stack.session(Role::Viewer, Scope::All).await;
    let before = queries(&stack).await;
    for number in 0..20 {
        store_row(&stack, number).await;
        let rows = read(&stack, &session, 1).await;
        assert_eq!(rows[0]["proc"], number);
    }
    assert_eq!(queries(&stack).await, before + 20);
}

#[tokio::test]
async fn cached_rows_are_not_shown_outside_the_scope() {
    let stack = stack("1s").await;
    store_row(&stack, 1).await;
    let admin = stack.session(Role::Admin, Scope::All).await;
    let elsewhere = Scope::Only(vec!["vm-2".parse().unwrap()]);
    let other = stack.session(Role::Operator, elsewhere).await;
    for _ in 0..3 {
        assert_eq!(read(&stack, &admin, 1).await.len(), 1);
        assert_eq!(read(&stack, &other, 1).await.len(), 0);
    }
}
