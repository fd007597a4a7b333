//! Tests the commands for rows of older databases: `load`, `compact-flat` and `usage`.

use std::fs;

use futures::TryStreamExt;
use mongodb::{
    Collection,
    bson::{Binary, DateTime, Document, doc, spec::BinarySubtype},
};
use serde_json::Value;
use testkit::{Inserts, MongoProxy, PATIENCE, Process, Program, Stack, eventually};
use vmwatch_api::{
    history::{Points, TimeRange, VmHistory, VmHistoryQuery},
    metrics::{Latest, Limit, ProcessLatest, VmLatest},
    time::{CreateDate, UtcOffset, unix_millis},
};

use crate::{
    history_support::{DAY, HOUR, call, stack},
    rows::{blocks, process_row, store_processes, store_vms, vm_row},
};

/// 2017-01-01T00:00:00Z.
const START: u64 = 1_483_228_800_000;

fn date(at_ms: u64) -> String {
    let offset: UtcOffset = "+00:00".parse().unwrap();
    CreateDate::at_millis(at_ms, offset).as_str().to_owned()
}

/// What vmwatch answers about a VM: its newest VM rows and process rows, and the number of its VM rows in the rollup of the
/// first day of 2017.
async fn answers(stack: &Stack, instance: &str) -> (String, String, Vec<u64>) {
    let latest = Latest {
        instance_id: instance.parse().unwrap(),
        limit: Limit::new(1000).unwrap(),
        before: None,
    };
    let day = VmHistoryQuery {
        instance_id: instance.parse().unwrap(),
        range: TimeRange::new(START, START + DAY).unwrap(),
        points: Points::new(1).unwrap(),
        after_ms: None,
    };
    let series = call::<VmHistory>(stack, &day).await;
    (
        call::<VmLatest>(stack, &latest).await.rows.as_json().to_owned(),
        call::<ProcessLatest>(stack, &latest)
            .await
            .rows
            .as_json()
            .to_owned(),
        series.buckets.iter().map(|bucket| bucket.count).collect(),
    )
}

/// Lines with one row of a VM and three of its processes, every ten minutes for three hours.
fn export() -> Vec<String> {
    let row = |at_ms: u64, own: &str| {
        let common = r#""net_incoming":0.6,"net_outgoing":5.7,"disk_read":0.0,"disk_write":128.8,"mem":8.6,"cpu_util":1.5"#;
        format!(
            r#"{{"instance_id":"vm-1","create_date":"{}",{own},{common}}}"#,
            date(at_ms)
        )
    };
    let mut lines = Vec::new();
    for at_ms in (START..START + 3 * HOUR).step_by(600_000) {
        lines.push(row(at_ms, r#""proc":95"#));
        for pid in 1..=3 {
            let own =
                format!(r#""cmd":"worker","pid":{pid},"running_time":1482236516.07,"shutdown_time":null"#);
            lines.push(row(at_ms, &own));
        }
    }
    lines
}

fn usage(stack: &Stack, arguments: &[&str]) -> Value {
    let mut all = vec!["usage", "--json"];
    all.extend(arguments);
    serde_json::from_str(&stack.command(Program::Metrics, &all, "")).unwrap()
}

/// JSON Lines and an array with the same rows give the same answers, also if they are loaded again. Any other input is
/// refused with a message that says what is needed.
#[tokio::test]
async fn load_takes_lines_and_arrays_and_refuses_other_input_with_advice() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_NEWEST_ROWS_KEPT", "0s")
        .start()
        .await;
    let lines = export();
    let load = |input: &str| stack.command(Program::Metrics, &["load", "-"], input);
    let loaded = load(&lines.join("\n"));
    assert!(
        loaded.contains("loaded 72 rows, skipped 0 invalid ones"),
        "{loaded}"
    );
    let first = answers(&stack, "vm-1").await;
    assert_eq!(first.2, [18]);
    let stored = level_0(&stack).await;
    // The rows of an hour are in one block of each kind.
    assert_eq!(stored, 6);

    load(&format!("[{}]\n", lines.join(",\n")));
    load(&lines.join("\n"));
    assert_eq!(answers(&stack, "vm-1").await, first);
    let again = level_0(&stack).await;
    assert_eq!(again, stored);
    // Other groups of the same rows make other blocks, but no other answers.
    load(&lines[5..].join("\n"));
    assert_eq!(answers(&stack, "vm-1").await, first);

    let folder = tempfile::tempdir().unwrap();
    for (name, content, advice) in [
        ("rows.json.gz", &[0x1f, 0x8b, 8, 0][..], "gunzip"),
        ("rows.bson", &[0x16, 0, 0, 0, 2, b'a', 0], "BSON"),
        ("rows.csv", b"instance_id,create_date\nvm-1,2017\n", "CSV"),
        (
            "rows.pretty.json",
            b"{\n  \"instance_id\": \"vm-1\"\n}\n",
            "--pretty",
        ),
        (
            "none.jsonl",
            b"{\"name\":\"no row\"}\n",
            "line 1: `instance_id` is missing",
        ),
        (
            "cut.json",
            b"[{\"instance_id\":\"vm-1\",\"create_date\":\"2017-01-01T00:00:00\",\"proc\":1}",
            "incomplete",
        ),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        let arguments = ["load", path.to_str().unwrap()];
        let refused = stack.try_command("vmwatch-metrics", Program::Metrics, &arguments, "", &[]);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(
            !refused.status.success() && said.contains(advice),
            "{name}: {said}"
        );
    }

    let usage = usage(&stack, &["--disk", "1GiB"]);
    assert_eq!(usage["vms"], 1);
    assert_eq!(usage["largest_vms"][0]["instance_id"], "vm-1");
    let process = usage["blocks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|kind| kind["kind"] == "process");
    let process = process.unwrap();
    assert_eq!(process["level"], 0);
    assert!(process["bytes_per_row"].as_f64().unwrap() > 1.0, "{usage}");
    let (blocks, bytes) = size(&blocks(&stack.database)).await;
    let names = stack.database.handle().collection("vm_samples_process_names");
    let (names, bytes_of_names) = size(&names).await;
    assert_eq!(names, 1, "the rows are of one day");
    assert_eq!(usage["process_names"]["bytes"], bytes_of_names);
    assert_eq!(usage["bytes"], bytes + bytes_of_names);
    assert_eq!(usage["unreadable"]["blocks"], 0);
    assert_eq!(usage["undated_blocks"]["documents"], blocks);
    assert_eq!(usage["disk"]["days_left"], Value::Null);
    let text = stack.command(Program::Metrics, &["usage", "--no-check"], "");
    assert!(
        text.contains("unreadable blocks: not checked") && !text.contains('\u{1b}'),
        "{text}"
    );
    println!("{text}");
}

/// Number and total size of the documents in a collection.
async fn size(collection: &Collection<Document>) -> (usize, usize) {
    let documents: Vec<Document> = collection
        .find(doc! {})
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    let sizes = documents.iter().map(|document| document.to_vec().unwrap().len());
    (documents.len(), sizes.sum())
}

/// Waits until the TTL monitor of the database has run twice.
pub(crate) async fn expire_twice(stack: &Stack) {
    let database = stack.database.handle();
    // By default, MongoDB deletes expired documents once a minute; with this parameter, it deletes them once a second.
    let once_a_second = doc! { "setParameter": 1, "ttlMonitorSleepSecs": 1 };
    let admin = database.client().database("admin");
    admin.run_command(once_a_second).await.unwrap();
    for _ in 0..2 {
        let expired = doc! { "_id": "expired", "expires": DateTime::from_millis(0) };
        blocks(&stack.database).insert_one(expired).await.unwrap();
        eventually("an expired document is deleted", 3 * PATIENCE, async || {
            let left = blocks(&stack.database)
                .count_documents(doc! { "_id": "expired" })
                .await;
            matches!(left, Ok(0))
                .then_some(())
                .ok_or_else(|| "it is still there".to_owned())
        })
        .await;
    }
}

/// Number of blocks that have not been compacted.
async fn level_0(stack: &Stack) -> u64 {
    let blocks = blocks(&stack.database);
    blocks.count_documents(doc! { "level": 0 }).await.unwrap()
}

/// Number of rows in the two flat collections.
async fn flat(stack: &Stack) -> u64 {
    let mut rows = 0;
    for name in ["vm_samples", "process_samples"] {
        let flat = stack.database.handle().collection::<Document>(name);
        rows += flat.count_documents(doc! {}).await.unwrap();
    }
    rows
}

/// Stores flat rows of two VMs, of which one no block can hold, and of a third VM two that have an internal date and one
/// that has none.
async fn store_flat(stack: &Stack) {
    let (mut vms, mut processes) = (Vec::new(), Vec::new());
    for instance in ["vm-1", "vm-2"] {
        for (place, at_ms) in (0..).zip((START..START + 3 * HOUR).step_by(600_000)) {
            vms.push(vm_row(instance, &date(at_ms), place));
            processes.extend((1..=3).map(|pid| process_row(instance, &date(at_ms), "worker", pid)));
        }
    }
    let mut unfit = process_row("vm-1", &date(START), "worker", 4);
    unfit.insert("more", doc! { "nested": 1 });
    processes.push(unfit);
    let recent = unix_millis() / HOUR * HOUR - 2 * HOUR;
    for minute in 0..3_u64 {
        let at_ms = recent + minute * 60_000;
        let mut row = vm_row("vm-3", &date(at_ms), 1);
        if minute > 0 {
            row.insert("sampled_at", DateTime::from_millis(at_ms.cast_signed()));
        }
        vms.push(row);
    }
    store_vms(stack, vms).await;
    store_processes(stack, processes).await;
}

async fn all_answers(stack: &Stack) -> Vec<(String, String, Vec<u64>)> {
    let mut all = Vec::new();
    for instance in ["vm-1", "vm-2", "vm-3"] {
        all.push(answers(stack, instance).await);
    }
    all
}

fn start(stack: &Stack, proxy: &MongoProxy, delete_after: &str) -> Process {
    let through_proxy = [("VMWATCH_MONGODB_URI".to_owned(), proxy.uri().to_owned())];
    let arguments = ["compact-flat", "--delete-after", delete_after];
    stack.start_command(Program::Metrics, &arguments, &through_proxy)
}

async fn caught(proxy: &MongoProxy, what: &str) {
    eventually(what, PATIENCE, async || {
        (proxy.caught() > 0)
            .then_some(())
            .ok_or_else(|| "nothing was caught".to_owned())
    })
    .await;
}

/// `compact-flat` is killed before it writes a block, before it deletes a flat row, and while it deletes; then two run at
/// once. The answers are the same all the time. The row that no block can hold stays flat.
#[tokio::test]
async fn compact_flat_moves_each_row_once_despite_kills() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_NEWEST_ROWS_KEPT", "0s")
        .set(Program::Metrics, "VMWATCH_FLAT_CHECK_INTERVAL", "0s")
        .start()
        .await;
    store_flat(&stack).await;
    let stored = flat(&stack).await;
    assert_eq!(stored, 36 + 108 + 1 + 3);
    stack.command(Program::Metrics, &["rebuild"], "");
    let expected = all_answers(&stack).await;
    assert_eq!(expected[0].2, [18]);

    let proxy = MongoProxy::start(stack.database.uri(), "blocks").await;
    proxy.set(Inserts::Hold);
    let before_writing = start(&stack, &proxy, "0s");
    caught(&proxy, "an insert is held").await;
    before_writing.kill9();
    assert_eq!(flat(&stack).await, stored);
    assert_eq!(all_answers(&stack).await, expected);

    let proxy = MongoProxy::start(stack.database.uri(), "blocks").await;
    let waiting = start(&stack, &proxy, "1h");
    eventually("all blocks are written", PATIENCE, async || {
        let log = waiting.log();
        log.contains("all blocks are written").then_some(()).ok_or(log)
    })
    .await;
    waiting.kill9();
    assert_eq!(flat(&stack).await, stored);
    assert_eq!(all_answers(&stack).await, expected);
    let written = level_0(&stack).await;

    proxy.hold_deletions();
    let deleting = start(&stack, &proxy, "0s");
    caught(&proxy, "a deletion is held").await;
    deleting.kill9();
    assert_eq!(all_answers(&stack).await, expected);

    let dry_run = stack.command(Program::Metrics, &["compact-flat", "--dry-run"], "");
    assert!(
        dry_run.contains("147 rows would be moved; 1 rows would stay flat"),
        "{dry_run}"
    );
    let proxy = MongoProxy::start(stack.database.uri(), "blocks").await;
    let both = [start(&stack, &proxy, "0s"), start(&stack, &proxy, "0s")];
    let mut moved = 0;
    for process in &both {
        let status = eventually("compact-flat ends", PATIENCE, async || {
            process.ended().ok_or_else(|| "it runs".to_owned())
        })
        .await;
        let log = process.log();
        assert!(status.success(), "{log}");
        let (_, after) = log.split_once("moved ").unwrap();
        moved += after.split_once(' ').unwrap().0.parse::<u64>().unwrap();
    }
    assert_eq!((moved, flat(&stack).await), (stored - 1, 1));
    assert_eq!(all_answers(&stack).await, expected);
    stack.command(Program::Metrics, &["rebuild"], "");
    assert_eq!(all_answers(&stack).await, expected);
    // The same rows made the same blocks each time: one per VM, kind and hour, and two for rows with and without a date.
    let now = level_0(&stack).await;
    assert_eq!((written, now), (14, 14));
    let usage = usage(&stack, &[]);
    assert_eq!(usage["flat_rows"], serde_json::json!({ "vm": 0, "process": 1 }));

    dates_are_set(&stack).await;
    assert_eq!(all_answers(&stack).await, expected);
}

/// `backfill-dates` sets when the blocks of undated rows expire, by the `_id`s of their rows.
async fn dates_are_set(stack: &Stack) {
    let undated = doc! { "level": 0, "expires": { "$exists": false } };
    let of_vm_3 = doc! { "level": 0, "instance_id": "vm-3", "expires": { "$exists": false } };
    let count = async |filter: &Document| {
        blocks(&stack.database)
            .count_documents(filter.clone())
            .await
            .unwrap()
    };
    assert_eq!((count(&undated).await, count(&of_vm_3).await), (13, 1));
    stack.command(Program::Metrics, &["backfill-dates"], "");
    assert_eq!(count(&undated).await, 0);
    // The ids of the test's rows were made just now.
    let kept = i64::try_from(unix_millis() + 30 * DAY).unwrap();
    let of_vm_1 = blocks(&stack.database)
        .find_one(doc! { "instance_id": "vm-1" })
        .await;
    let expires = of_vm_1
        .unwrap()
        .unwrap()
        .get_datetime("expires")
        .unwrap()
        .timestamp_millis();
    assert!((kept - 600_000..=kept).contains(&expires), "{expires}, {kept}");
}

/// Flat rows whose block exists but is unreadable are not deleted.
#[tokio::test]
async fn compact_flat_keeps_rows_that_it_cannot_read_from_blocks() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_NEWEST_ROWS_KEPT", "0s")
        .set(Program::Metrics, "VMWATCH_FLAT_CHECK_INTERVAL", "0s")
        .start()
        .await;
    store_vms(&stack, [vm_row("vm-1", &date(START), 7)]).await;
    let before = answers(&stack, "vm-1").await;
    let proxy = MongoProxy::start(stack.database.uri(), "blocks").await;
    let waiting = start(&stack, &proxy, "1h");
    eventually("the block is written", PATIENCE, async || {
        let written = blocks(&stack.database).count_documents(doc! {}).await;
        matches!(written, Ok(1))
            .then_some(())
            .ok_or_else(|| waiting.log())
    })
    .await;
    waiting.kill9();
    let flip = doc! { "$set": { "data": Binary { subtype: BinarySubtype::Generic, bytes: b"VMB damaged".to_vec() } } };
    blocks(&stack.database).update_one(doc! {}, flip).await.unwrap();
    let refused = stack.try_command(
        "vmwatch-metrics",
        Program::Metrics,
        &["compact-flat", "--delete-after", "0s"],
        "",
        &[],
    );
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("1 rows stay flat"),
        "{said}"
    );
    assert_eq!(flat(&stack).await, 1);
    assert_eq!(answers(&stack, "vm-1").await, before);
}
