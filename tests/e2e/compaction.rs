//! Tests compaction: the blocks of closed hours are merged without a change of any answer, whatever interrupts it.

use std::ops::{Range, RangeInclusive};

use futures::TryStreamExt;
use mongodb::bson::{Binary, Document, doc, spec::BinarySubtype};
use testkit::{MongoProxy, PATIENCE, Program, Stack, StackBuilder, eventually};
use vmwatch_api::{
    Method, Principal, Role, Scope,
    filesystems::{Filesystems, FilesystemsAt, FilesystemsAtQuery},
    history::{Points, TimeRange, VmHistory, VmHistoryQuery},
    lifecycle::Target,
    metrics::{Latest, LatestByName, Limit, ProcessByName, ProcessLatest, Sample, VmLatest},
    processes::{
        ProcessHistory, ProcessHistoryQuery, ProcessName, ProcessSelector, ProcessSort, ProcessesAt,
        ProcessesAtQuery,
    },
    removal::HistoryRemove,
    time::unix_millis,
    wire::FaultKind,
};
use vmwatch_bus::Context;
use vmwatch_store::MONGODB_URI;

use crate::{
    history_support::{self, HOUR, MINUTE, SECOND, call_in, filesystem, followed, process, publish, sample},
    rows::{blocks, stored_rows},
};

const INTERVAL: &str = "VMWATCH_COMPACTION_INTERVAL";
/// An interval at which a replica compacts at once, and one at which it does not compact during a test.
const OFTEN: &str = "100ms";
const NEVER: &str = "1h";

/// Builds a test environment whose replicas of metrics-svc do not compact yet.
fn stack() -> StackBuilder {
    history_support::stack()
        .set(Program::Metrics, "VMWATCH_NEWEST_ROWS_KEPT", "0s")
        .set(Program::Metrics, "VMWATCH_COMPACTION_DELETE_AFTER", "3s")
        .set(
            Program::Metrics,
            "VMWATCH_LOG",
            "info,metrics_svc::compaction=debug",
        )
        .set(Program::Metrics, INTERVAL, NEVER)
}

/// Start of an hour that is closed.
fn closed_hour() -> u64 {
    (unix_millis() / HOUR - 2) * HOUR
}

/// The sample of a minute of the hour, with four processes.
fn of_minute(instance: &str, hour: u64, minute: u32) -> Sample {
    let at_ms = hour + u64::from(minute) * MINUTE + SECOND;
    let mut sample = sample(instance, at_ms, "+00:00", f64::from(minute));
    sample.processes = (1..=4)
        .map(|pid| process(&format!("worker-{}", pid % 2), pid, f64::from(minute * pid) / 8.0))
        .collect();
    sample
}

async fn publish_hour(stack: &Stack, instance: &str, hour: u64, minutes: Range<u32>) {
    for minute in minutes {
        publish(stack, &of_minute(instance, hour, minute)).await;
    }
    followed(stack).await;
}

/// Restarts a replica of metrics-svc with another interval of compaction.
async fn restart(stack: &Stack, replica: usize, interval: &str) {
    let metrics = stack.replica(Program::Metrics, replica);
    metrics.process.set(INTERVAL, interval);
    metrics.process.kill9();
    metrics.restart().await;
}

/// Calls a bus method until it is answered within the short time that the tests leave to reads.
async fn call<M: Method>(stack: &Stack, params: &M::Params) -> M::Reply {
    eventually("a read ends in time", PATIENCE, async || {
        match call_in::<M>(stack, Scope::All, params).await {
            Err(fault) if fault.kind == FaultKind::Timeout => Err(fault.to_string()),
            answer => Ok(answer.unwrap_or_else(|fault| panic!("{}: {fault}", M::INFO.subject))),
        }
    })
    .await
}

/// The answers about a VM and its hour, as the services send them.
async fn answers(stack: &Stack, instance: &str, hour: u64) -> Vec<String> {
    let instance_id = || instance.parse().unwrap();
    let text = |answer: Result<String, serde_json::Error>| answer.unwrap();
    let mut all = Vec::new();
    let mut before = None;
    // Pages end within the merged blocks.
    for _ in 0..4 {
        let page = Latest {
            instance_id: instance_id(),
            limit: Limit::new(7).unwrap(),
            before: before.take(),
        };
        let rows = call::<VmLatest>(stack, &page).await;
        before = rows.next.as_ref().map(|next| next.before.clone());
        all.push(text(serde_json::to_string(&rows)));
    }
    let newest = Latest {
        instance_id: instance_id(),
        limit: Limit::new(1000).unwrap(),
        before: None,
    };
    all.push(text(serde_json::to_string(
        &call::<ProcessLatest>(stack, &newest).await,
    )));
    let named = LatestByName {
        instance_id: instance_id(),
        limit: Limit::new(50).unwrap(),
        proc_name: Some("worker-1".to_owned()),
        before: None,
    };
    all.push(text(serde_json::to_string(
        &call::<ProcessByName>(stack, &named).await,
    )));
    for at_ms in [hour + 30 * MINUTE, hour + 90 * MINUTE] {
        let table = ProcessesAtQuery {
            instance_id: instance_id(),
            at_ms: Some(at_ms),
            sort: ProcessSort::Cpu,
            order: None,
            name: None,
            limit: Limit::new(1000).unwrap(),
            after: None,
        };
        all.push(text(serde_json::to_string(
            &call::<ProcessesAt>(stack, &table).await,
        )));
    }
    for points in [1, 60] {
        let series = call::<ProcessHistory>(stack, &series(instance, hour, points)).await;
        all.push(text(serde_json::to_string(&series)));
        let history = VmHistoryQuery {
            instance_id: instance_id(),
            range: TimeRange::new(hour, hour + HOUR).unwrap(),
            points: Points::new(points).unwrap(),
            after_ms: None,
        };
        all.push(text(serde_json::to_string(
            &call::<VmHistory>(stack, &history).await,
        )));
    }
    all
}

/// The filesystems of a VM in the hour, and after it.
async fn filesystems_of(stack: &Stack, instance: &str, hour: u64) -> Vec<Filesystems> {
    let mut all = Vec::new();
    for at_ms in [hour + 2 * MINUTE, hour + 90 * MINUTE] {
        let query = FilesystemsAtQuery {
            instance_id: instance.parse().unwrap(),
            at_ms: Some(at_ms),
        };
        all.push(call::<FilesystemsAt>(stack, &query).await);
    }
    all
}

/// The query for all process rows of the hour with a name.
fn series(instance: &str, hour: u64, points: u64) -> ProcessHistoryQuery {
    ProcessHistoryQuery {
        instance_id: instance.parse().unwrap(),
        process: ProcessSelector::new(ProcessName::new("worker-1"), None).unwrap(),
        range: TimeRange::new(hour, hour + HOUR).unwrap(),
        points: Points::new(points).unwrap(),
        after_ms: None,
    }
}

/// The documents of a VM's blocks, without their rows.
async fn documents(stack: &Stack, instance: &str) -> Vec<Document> {
    let blocks = blocks(&stack.database);
    let found = blocks
        .find(doc! { "instance_id": instance })
        .projection(doc! { "data": 0 });
    found.await.unwrap().try_collect().await.unwrap()
}

/// Waits until a VM has one confirmed block of level 1 of each kind, with this many rows in total, and no others.
async fn compacted(stack: &Stack, instance: &str, generations: RangeInclusive<i64>, rows: i32) {
    eventually("the hour is compacted", PATIENCE, async || {
        let documents = documents(stack, instance).await;
        let is_right = |document: &Document| {
            let generation = document.get_i64("generation");
            generation.is_ok_and(|generation| generations.contains(&generation))
                && !document.contains_key("unconfirmed")
        };
        let counts = documents.iter().map(|document| document.get_i32("rows").unwrap());
        (documents.len() == 2 && documents.iter().all(is_right) && counts.sum::<i32>() == rows)
            .then_some(())
            .ok_or_else(|| format!("{documents:#?}"))
    })
    .await;
}

/// Waits until the queue of hours is empty.
async fn queue_is_empty(stack: &Stack) {
    let queue = stack.database.handle().collection::<Document>("blocks_hours");
    eventually("the queue of hours is empty", PATIENCE, async || {
        let entries = queue
            .count_documents(doc! {})
            .await
            .map_err(|error| error.to_string())?;
        (entries == 0).then_some(()).ok_or(format!("{entries} entries"))
    })
    .await;
}

/// The second of the day of the first log line with a message.
fn logged_at(log: &str, message: &str) -> f64 {
    let line = log.lines().find(|line| line.contains(message)).unwrap();
    let time = line.split_once('T').unwrap().1.split_once('Z').unwrap().0;
    time.split(':')
        .fold(0.0, |sum, part| sum * 60.0 + part.parse::<f64>().unwrap())
}

/// The CRC-32 of a block.
fn checksum(block: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for byte in block[..4].iter().chain(&block[8..]) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    (!crc).to_le_bytes()
}

/// Damages one block of process rows, and gives another one a newer version of the format. Returns both documents.
async fn damage(stack: &Stack, instance: &str, hour: u64) -> Vec<Document> {
    let blocks = blocks(&stack.database);
    let mut damaged = Vec::new();
    for (minute, newer) in [(3_u32, true), (5, false)] {
        let from = (hour + u64::from(minute) * MINUTE + SECOND).cast_signed();
        let from = mongodb::bson::DateTime::from_millis(from);
        let filter = doc! { "instance_id": instance, "kind": "process", "from": from };
        let mut block = blocks.find_one(filter.clone()).await.unwrap().unwrap();
        let mut bytes = block.get_binary_generic("data").unwrap().clone();
        if newer {
            bytes[3] = 9;
            let sum = checksum(&bytes);
            bytes[4..8].copy_from_slice(&sum);
        } else {
            bytes.truncate(30);
        }
        let subtype = BinarySubtype::Generic;
        block.insert("data", Binary { subtype, bytes });
        blocks.replace_one(filter, &block).await.unwrap();
        damaged.push(block);
    }
    damaged
}

/// A program that was killed between inserting blocks and queueing their hours leaves blocks that compaction does not know,
/// and rows that rollups and names lack.
#[tokio::test]
async fn blocks_whose_hour_was_never_queued_are_found_at_start() {
    let stack = stack().start().await;
    let hour = closed_hour();
    publish_hour(&stack, "vm-1", hour, 0..10).await;
    let before = answers(&stack, "vm-1", hour).await;
    let derived = ["vm_samples_process_names", "vm_samples_5m", "vm_samples_1h"];
    for collection in ["blocks_hours"].iter().chain(&derived) {
        let documents = stack.database.handle().collection::<Document>(collection);
        assert!(
            documents.delete_many(doc! {}).await.unwrap().deleted_count > 0,
            "{collection}"
        );
    }
    restart(&stack, 0, OFTEN).await;
    compacted(&stack, "vm-1", 1..=1, 50).await;
    queue_is_empty(&stack).await;
    for collection in derived {
        let documents = stack.database.handle().collection::<Document>(collection);
        assert!(
            documents.count_documents(doc! {}).await.unwrap() > 0,
            "{collection}"
        );
    }
    assert_eq!(answers(&stack, "vm-1", hour).await, before);
}

#[tokio::test]
async fn answers_stay_the_same_when_an_hour_is_compacted() {
    let stack = stack().start().await;
    let hour = closed_hour();
    publish_hour(&stack, "vm-1", hour, 0..40).await;
    publish_hour(&stack, "vm-2", hour, 0..10).await;
    let damaged = damage(&stack, "vm-2", hour).await;
    for minute in 0..5 {
        let mut sample = of_minute("vm-3", hour, minute);
        sample.filesystems = vec![
            filesystem("/", 1 << 30),
            filesystem("/data", u64::from(minute) << 40),
        ];
        publish(&stack, &sample).await;
    }
    followed(&stack).await;
    let filesystems = filesystems_of(&stack, "vm-3", hour).await;
    assert_eq!(filesystems[0].filesystems.len(), 2);
    let before = [
        answers(&stack, "vm-1", hour).await,
        answers(&stack, "vm-2", hour).await,
    ];

    restart(&stack, 0, OFTEN).await;
    compacted(&stack, "vm-1", 1..=1, 200).await;
    queue_is_empty(&stack).await;
    assert_eq!(answers(&stack, "vm-1", hour).await, before[0]);
    assert_eq!(documents(&stack, "vm-1").await.len(), 2);
    let log = stack.replica(Program::Metrics, 0).process.log();
    let kept = logged_at(&log, "merged blocks deleted") - logged_at(&log, "blocks merged");
    assert!(
        kept.rem_euclid(86_400.0) >= 2.9,
        "blocks were deleted after {kept} s"
    );
    assert_eq!(
        stored_rows(&stack.database, doc! { "instance_id": "vm-1" })
            .await
            .unwrap()
            .len(),
        200
    );

    assert_eq!(filesystems_of(&stack, "vm-3", hour).await, filesystems);
    let of_filesystems = |documents: Vec<Document>| {
        let is_kind = |document: &Document| document.get_str("kind").is_ok_and(|kind| kind == "filesystem");
        let rows = documents
            .into_iter()
            .filter(is_kind)
            .map(|document| document.get_i32("rows").unwrap());
        rows.collect::<Vec<_>>()
    };
    assert_eq!(of_filesystems(documents(&stack, "vm-3").await), [10]);

    // Unreadable blocks are left as they are, and the others of their hour are merged.
    assert_eq!(answers(&stack, "vm-2", hour).await, before[1]);
    for block in damaged {
        let id = block.get("_id").unwrap();
        let left = blocks(&stack.database)
            .find_one(doc! { "_id": id })
            .await
            .unwrap();
        assert_eq!(left, Some(block));
    }
    let metrics = stack.replica(Program::Metrics, 0);
    let unreadable = metrics.metric("vmwatch_compaction_blocks_unreadable_total").await;
    assert!(unreadable >= Some(2.0), "{unreadable:?}");
    assert_eq!(documents(&stack, "vm-2").await.len(), 4);

    // A sample that arrives again, whole and in parts, adds nothing.
    publish_hour(&stack, "vm-1", hour, 0..40).await;
    let mut half = of_minute("vm-1", hour, 7);
    half.processes.truncate(2);
    publish(&stack, &half).await;
    followed(&stack).await;
    assert_eq!(answers(&stack, "vm-1", hour).await, before[0]);
    compacted(&stack, "vm-1", 1..=1, 200).await;
    queue_is_empty(&stack).await;
    assert_eq!(answers(&stack, "vm-1", hour).await, before[0]);

    // Late rows are answered at once, and merged later.
    publish_hour(&stack, "vm-1", hour, 40..45).await;
    let with_late = answers(&stack, "vm-1", hour).await;
    assert_ne!(with_late, before[0]);
    compacted(&stack, "vm-1", 2..=6, 225).await;
    queue_is_empty(&stack).await;
    assert_eq!(answers(&stack, "vm-1", hour).await, with_late);
    assert_eq!(documents(&stack, "vm-1").await.len(), 2);
    assert_eq!(
        stored_rows(&stack.database, doc! { "instance_id": "vm-1" })
            .await
            .unwrap()
            .len(),
        225
    );
}

/// Lets a replica of metrics-svc reach the database through a proxy from its next start on.
async fn behind_a_proxy(stack: &Stack) -> MongoProxy {
    let proxy = MongoProxy::start(stack.database.uri(), "blocks").await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.set(MONGODB_URI.name, proxy.uri());
    proxy
}

/// Kills metrics-svc before each command with which compaction changes blocks, and after a part of its commands.
#[tokio::test]
async fn compaction_continues_after_a_kill_at_each_step() {
    let stack = stack().start().await;
    let proxy = behind_a_proxy(&stack).await;
    let metrics = stack.replica(Program::Metrics, 0);
    let hour = closed_hour();
    publish_hour(&stack, "vm-1", hour, 0..20).await;
    // More rows than one part holds.
    for step in 0..95 {
        let mut sample = sample("vm-2", hour + step * 36 * SECOND, "+00:00", 5.0);
        sample.processes = (1..=190).map(|pid| process("worker-1", pid, 1.0)).collect();
        publish(&stack, &sample).await;
    }
    followed(&stack).await;
    let before = [
        answers(&stack, "vm-1", hour).await,
        answers(&stack, "vm-2", hour).await,
    ];
    let steps = [
        ("insert", 0),
        // Between the two parts of a generation.
        ("insert", 4),
        // Before a generation is confirmed.
        ("update", 0),
        ("delete", 0),
        // Between older generations and level 0.
        ("delete", 1),
    ];
    for (command, after) in steps {
        proxy.hold(command, after);
        restart(&stack, 0, OFTEN).await;
        proxy.holds().await;
        metrics.process.kill9();
        proxy.drop_held();
        restart(&stack, 0, NEVER).await;
        assert_eq!(
            answers(&stack, "vm-1", hour).await,
            before[0],
            "{command} {after}"
        );
        assert_eq!(
            answers(&stack, "vm-2", hour).await,
            before[1],
            "{command} {after}"
        );
    }
    proxy.release();
    restart(&stack, 0, OFTEN).await;
    queue_is_empty(&stack).await;
    assert_eq!(answers(&stack, "vm-1", hour).await, before[0]);
    assert_eq!(answers(&stack, "vm-2", hour).await, before[1]);
    for (instance, rows, most) in [("vm-1", 100, 2), ("vm-2", 18_145, 3)] {
        let stored = stored_rows(&stack.database, doc! { "instance_id": instance, "level": 1 });
        assert_eq!(stored.await.unwrap().len(), rows);
        let documents = documents(&stack, instance).await;
        assert_eq!(documents.len(), most, "{documents:#?}");
    }
}

/// The state of a test with two replicas: the first one reaches the database through the proxy.
async fn two_replicas() -> (Stack, MongoProxy) {
    let stack = stack().replicas(Program::Metrics, 2).start().await;
    let proxy = behind_a_proxy(&stack).await;
    (stack, proxy)
}

#[tokio::test]
async fn delayed_compactor_adds_nothing_after_another_one_has_compacted_the_hour_twice() {
    let (stack, proxy) = two_replicas().await;
    let hour = closed_hour();
    publish_hour(&stack, "vm-1", hour, 0..10).await;
    publish_hour(&stack, "vm-2", hour, 0..10).await;
    proxy.hold("insert", 0);
    restart(&stack, 0, OFTEN).await;
    eventually("both hours are held", PATIENCE, async || {
        let held = proxy.held();
        (held == 2).then_some(()).ok_or_else(|| held.to_string())
    })
    .await;
    proxy.hold_no_more();
    let first = stack.replica(Program::Metrics, 0);
    restart(&stack, 1, OFTEN).await;
    compacted(&stack, "vm-1", 1..=1, 50).await;
    publish_hour(&stack, "vm-1", hour, 10..15).await;
    compacted(&stack, "vm-1", 2..=6, 75).await;
    compacted(&stack, "vm-2", 1..=1, 50).await;
    queue_is_empty(&stack).await;

    let remove = Context::new(PATIENCE).as_principal(Principal {
        user: "test".to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    });
    let target = Target {
        instance_id: "vm-2".parse().unwrap(),
    };
    stack.bus.call::<HistoryRemove>(&remove, &target).await.unwrap();
    let before = answers(&stack, "vm-1", hour).await;
    proxy.release();
    eventually("the first replica has continued", PATIENCE, async || {
        let log = first.process.log();
        log.contains("no longer exist").then_some(()).ok_or(log)
    })
    .await;
    queue_is_empty(&stack).await;
    assert_eq!(answers(&stack, "vm-1", hour).await, before);
    compacted(&stack, "vm-1", 2..=6, 75).await;
    assert_eq!(documents(&stack, "vm-2").await, [], "the removed VM returned");
}

#[tokio::test]
async fn read_that_was_stopped_across_a_compaction_returns_all_rows_or_fails() {
    let (stack, proxy) = two_replicas().await;
    restart(&stack, 0, NEVER).await;
    let hour = closed_hour();
    publish_hour(&stack, "vm-1", hour, 0..50).await;
    let query = series("vm-1", hour, 60);
    let before = call::<ProcessHistory>(&stack, &query).await;
    proxy.hold("getMore", 0);
    let stopped = async {
        loop {
            let answer = call_in::<ProcessHistory>(&stack, Scope::All, &query).await;
            // The other replica may have answered.
            if proxy.held() > 0 {
                return answer;
            }
            assert!(
                answer.as_ref().map_or(true, |answer| *answer == before),
                "{answer:?}"
            );
        }
    };
    let compacting = async {
        proxy.holds().await;
        let reader = stack.replica(Program::Metrics, 0);
        reader.process.pause();
        restart(&stack, 1, OFTEN).await;
        compacted(&stack, "vm-1", 1..=1, 250).await;
        reader.process.resume();
        proxy.release();
    };
    let (answer, ()) = tokio::join!(stopped, compacting);
    match answer {
        Ok(answer) => assert_eq!(answer, before),
        // The database driver may have closed the connection.
        Err(fault) => assert!(
            matches!(fault.kind, FaultKind::Timeout | FaultKind::Backend),
            "{fault:?}"
        ),
    }
    assert_eq!(call::<ProcessHistory>(&stack, &query).await, before);
}
