//! Tests that reads of the newest rows find them, however old they are and whatever other rows lie between them.

use std::time::{Duration, SystemTime};

use mongodb::bson::{Document, oid::ObjectId};
use serde_json::Value;
use testkit::{PATIENCE, Program, Stack};
use vmwatch_api::{
    Principal, Role, Scope,
    metrics::{Latest, LatestByName, Limit, ProcessByName, VmLatest},
    time::CreateDate,
};
use vmwatch_bus::Context;
use vmwatch_service::config::UTC_OFFSET;

use crate::{
    ingest_support::stack,
    rows::{process_row, store_processes, store_vms, vm_row},
};

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
const YEAR: u64 = 365 * DAY;
/// Ages of rows in seconds, on both sides of every limit of the time ranges that metrics-svc searches.
const AGES: [u64; 14] = [
    5,
    90,
    3 * MINUTE,
    20 * MINUTE,
    40 * MINUTE,
    7 * HOUR,
    10 * HOUR,
    5 * DAY,
    20 * DAY,
    99 * DAY,
    120 * DAY,
    3 * YEAR,
    3 * YEAR + MINUTE,
    9 * YEAR,
];

/// Returns the numbers that identify the expected rows, newest first.
fn expected(rows: &[Document], number: &str) -> Vec<i64> {
    let mut rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let id: ObjectId = row.get_object_id("_id").unwrap();
            (
                row.get_str("create_date").unwrap(),
                id,
                i64::from(row.get_i32(number).unwrap()),
            )
        })
        .collect();
    rows.sort_unstable();
    rows.into_iter().rev().map(|(_, _, number)| number).collect()
}

fn numbers(json: &str, number: &str) -> Vec<i64> {
    let rows: Vec<Value> = serde_json::from_str(json).unwrap();
    rows.iter().map(|row| row[number].as_i64().unwrap()).collect()
}

fn viewer() -> Context {
    Context::new(PATIENCE).as_principal(Principal {
        user: "test".to_owned(),
        role: Role::Viewer,
        scope: Scope::All,
    })
}

/// VMs that stopped reporting at different times. Each has two rows of the same date.
struct Silent(Vec<(String, Vec<Document>)>);

impl Silent {
    async fn store(stack: &Stack) -> Self {
        let now = SystemTime::now();
        let dates = AGES.map(|age| {
            CreateDate::at(
                now - Duration::from_secs(age),
                UTC_OFFSET.default.parse().unwrap(),
            )
        });
        let mut vms = Vec::new();
        for newest in 0..AGES.len() {
            let instance = format!("silent-{newest}");
            let dates = dates[newest..].iter().flat_map(|date| [date, date]);
            let rows: Vec<_> = dates
                .zip(0..)
                .map(|(date, number)| vm_row(&instance, date.as_str(), number))
                .collect();
            store_vms(stack, rows.clone()).await;
            vms.push((instance, rows));
        }
        Self(vms)
    }

    async fn check(&self, stack: &Stack) {
        for (instance, rows) in &self.0 {
            let all = expected(rows, "proc");
            for limit in [1, 2, 3, 10, all.len(), 1000] {
                let latest = Latest {
                    instance_id: instance.parse().unwrap(),
                    limit: Limit::new(limit as u64).unwrap(),
                    before: None,
                };
                let found = stack.bus.call::<VmLatest>(&viewer(), &latest).await.unwrap();
                let found = numbers(found.rows.as_json(), "proc");
                assert_eq!(found, all[..limit.min(all.len())], "{instance}, limit {limit}");
            }
        }
    }
}

#[tokio::test]
async fn newest_rows_of_a_long_silent_vm_are_found() {
    let stack = stack().start().await;
    let silent = Silent::store(&stack).await;
    // The rows were written directly into the database, so metrics-svc does not know when each VM last reported.
    silent.check(&stack).await;
    // After `rebuild`, metrics-svc knows when each VM last reported.
    stack.command(Program::Metrics, &["rebuild"], "");
    silent.check(&stack).await;
}

#[tokio::test]
async fn newest_rows_of_a_long_ended_process_are_found() {
    let stack = stack().start().await;
    let now = SystemTime::now();
    let mut rows = Vec::new();
    for (age, pid) in AGES.into_iter().zip(0..) {
        let date = CreateDate::at(
            now - Duration::from_secs(age),
            UTC_OFFSET.default.parse().unwrap(),
        );
        // The process `always` has a row at each date. The process `once` has rows only at the oldest dates.
        rows.push(process_row("vm-1", date.as_str(), "always", pid));
        if age > HOUR {
            rows.push(process_row("vm-1", date.as_str(), "once", pid));
        }
    }
    store_processes(&stack, rows.clone()).await;
    for name in ["always", "once", "never"] {
        let named = |row: &&Document| row.get_str("cmd").unwrap() == name;
        let all = expected(&rows.iter().filter(named).cloned().collect::<Vec<_>>(), "pid");
        for limit in [1, 2, 4, 9, 1000] {
            let latest = LatestByName {
                instance_id: "vm-1".parse().unwrap(),
                limit: Limit::new(limit as u64).unwrap(),
                proc_name: Some(name.to_owned()),
                before: None,
            };
            let found = stack.bus.call::<ProcessByName>(&viewer(), &latest).await.unwrap();
            assert_eq!(
                numbers(found.rows.as_json(), "pid"),
                all[..limit.min(all.len())],
                "{name}, limit {limit}"
            );
        }
    }
}
