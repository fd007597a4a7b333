//! Tests rows that are stored in several blocks, and blocks that cannot be read: each row is answered and counted once,
//! and an unreadable block makes only its own rows unavailable.

use mongodb::bson::{Binary, Document, doc, spec::BinarySubtype};
use serde_json::Value;
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    history::{Points, TimeRange, VmHistory, VmHistoryQuery},
    metrics::{Latest, Limit, ProcessLatest, Sample, VmLatest},
    processes::{
        ProcessHistory, ProcessHistoryQuery, ProcessName, ProcessSelector, ProcessSort, ProcessTable,
        ProcessesAt, ProcessesAtQuery,
    },
    time::unix_millis,
};

use crate::{
    history_support::{HOUR, MINUTE, SECOND, call, followed, process, publish, recent_bucket, sample, stack},
    rows::{blocks, stored_processes, stored_vms},
};

fn latest(instance: &str, limit: u64) -> Latest {
    Latest {
        instance_id: instance.parse().unwrap(),
        limit: Limit::new(limit).unwrap(),
        before: None,
    }
}

/// The values of one field of the newest VM rows, newest first.
async fn vm_rows(stack: &Stack, instance: &str, field: &str) -> Vec<Value> {
    let page = call::<VmLatest>(stack, &latest(instance, 100)).await;
    let rows: Vec<Value> = serde_json::from_str(page.rows.as_json()).unwrap();
    rows.into_iter().map(|mut row| row[field].take()).collect()
}

async fn process_count(stack: &Stack, instance: &str) -> usize {
    let page = call::<ProcessLatest>(stack, &latest(instance, 100)).await;
    let rows: Vec<Value> = serde_json::from_str(page.rows.as_json()).unwrap();
    rows.len()
}

async fn table(stack: &Stack, instance: &str) -> ProcessTable {
    let query = ProcessesAtQuery {
        instance_id: instance.parse().unwrap(),
        at_ms: None,
        sort: ProcessSort::Cpu,
        order: None,
        name: None,
        limit: Limit::new(1000).unwrap(),
        after: None,
    };
    call::<ProcessesAt>(stack, &query).await
}

/// Number of VM rows in the history of a VM.
async fn counted(stack: &Stack, instance: &str, from_ms: u64) -> u64 {
    let query = VmHistoryQuery {
        instance_id: instance.parse().unwrap(),
        range: TimeRange::new(from_ms, from_ms + 5 * MINUTE).unwrap(),
        points: Points::new(1).unwrap(),
        after_ms: None,
    };
    let series = call::<VmHistory>(stack, &query).await;
    series.buckets.iter().map(|bucket| bucket.count).sum()
}

/// A sample of one VM row and four processes, and the same rows as two sample parts.
fn whole_and_halves(instance: &str, at_ms: u64) -> [Sample; 3] {
    let mut whole = sample(instance, at_ms, "+00:00", 20.0);
    whole.processes = (1..=4).map(|pid| process("worker", pid, 5.0)).collect();
    let mut first = whole.clone();
    first.processes.truncate(2);
    let mut second = whole.clone();
    second.vm = None;
    second.part = 1;
    second.processes.drain(..2);
    [whole, first, second]
}

/// A sample that arrives whole and again in two parts, as after a change of the limits of a part, is in more blocks, but
/// each of its rows is answered and counted once.
#[tokio::test]
async fn rows_in_several_blocks_are_answered_and_counted_once() {
    let stack = stack().replicas(Program::Metrics, 2).start().await;
    let at_ms = recent_bucket() + MINUTE;
    let [whole, first, second] = whole_and_halves("vm-1", at_ms);
    for part in [&whole, &whole, &first, &second, &second, &whole] {
        publish(&stack, part).await;
    }
    followed(&stack).await;

    // The same rows make the same block, so the repeated parts added none.
    let blocks = blocks(&stack.database);
    let of_processes = blocks.count_documents(doc! { "kind": "process" }).await.unwrap();
    assert_eq!(of_processes, 3);
    assert_eq!(stored_processes(&stack.database).await.len(), 8);
    assert_eq!(stored_vms(&stack.database).await.len(), 1);

    assert_eq!(process_count(&stack, "vm-1").await, 4);
    assert_eq!(table(&stack, "vm-1").await.total, 4);
    assert_eq!(counted(&stack, "vm-1", at_ms - MINUTE).await, 1);
    let query = ProcessHistoryQuery {
        instance_id: "vm-1".parse().unwrap(),
        process: ProcessSelector::new(ProcessName::new("worker"), None).unwrap(),
        range: TimeRange::new(at_ms - MINUTE, at_ms + MINUTE).unwrap(),
        points: Points::new(1).unwrap(),
        after_ms: None,
    };
    let history = call::<ProcessHistory>(&stack, &query).await;
    let sums: Vec<_> = history.buckets.iter().map(|bucket| bucket.cpu_util.max).collect();
    assert_eq!(sums, [20.0], "four processes with 5 % each");
}

/// The effective date of a row is never later than its arrival. A guest whose clock is ahead therefore does not freeze
/// its newest row, and its sample is stored once even if it arrives twice.
#[tokio::test]
async fn row_of_a_clock_that_is_ahead_is_ordered_by_its_first_arrival() {
    let stack = stack().start().await;
    let ahead = sample("vm-1", unix_millis() + 8 * HOUR, "+00:00", 80.0);
    publish(&stack, &ahead).await;
    followed(&stack).await;
    let correct = sample("vm-1", unix_millis(), "+00:00", 10.0);
    publish(&stack, &correct).await;
    followed(&stack).await;
    publish(&stack, &ahead).await;
    followed(&stack).await;

    assert_eq!(vm_rows(&stack, "vm-1", "cpu_util").await, [10.0, 80.0]);
    let dates = vm_rows(&stack, "vm-1", "create_date").await;
    assert_eq!(
        dates[1],
        ahead.create_date.as_str(),
        "the answered date is unchanged"
    );
    assert_eq!(stored_vms(&stack.database).await.len(), 2);
    // Its rows are also found if they arrive again in other parts.
    let [whole, first, second] = whole_and_halves("vm-2", unix_millis() + 8 * HOUR);
    for part in [whole, first, second] {
        publish(&stack, &part).await;
        followed(&stack).await;
    }
    assert_eq!(stored_processes(&stack.database).await.len(), 4);
    assert_eq!(stored_vms(&stack.database).await.len(), 3);

    let now = unix_millis();
    for row in stored_vms(&stack.database).await {
        let effective = row.get_datetime("sampled_at").unwrap().timestamp_millis();
        assert!(u64::try_from(effective).unwrap() <= now, "{row}");
    }
}

/// The bytes of a block with a flipped bit, without their end, and as a newer version of vmwatch would write them, each
/// with the reason why it is unreadable.
fn damaged(bytes: &[u8]) -> [(Vec<u8>, &'static str); 3] {
    let mut flipped = bytes.to_vec();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let mut newer = bytes.to_vec();
    newer[3] += 1;
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&newer[..4]);
    checksum.update(&newer[8..]);
    newer[4..8].copy_from_slice(&checksum.finalize().to_le_bytes());
    let cut = bytes[..bytes.len() - 3].to_vec();
    [(flipped, "corrupt"), (cut, "corrupt"), (newer, "newer version")]
}

#[tokio::test]
async fn unreadable_block_makes_only_its_rows_unavailable() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_NEWEST_ROWS_KEPT", "0s")
        .start()
        .await;
    let now = unix_millis();
    for step in 0..4_u32 {
        let at_ms = now - 4 * MINUTE + u64::from(step) * MINUTE + SECOND;
        publish(&stack, &sample("vm-1", at_ms, "+00:00", 10.0 + f64::from(step))).await;
    }
    followed(&stack).await;
    assert_eq!(
        vm_rows(&stack, "vm-1", "cpu_util").await,
        [13.0, 12.0, 11.0, 10.0]
    );

    let blocks = blocks(&stack.database);
    let newest = blocks.find_one(doc! { "kind": "vm" }).sort(doc! { "from": -1 });
    let newest: Document = newest.await.unwrap().unwrap();
    let id = newest.get("_id").unwrap();
    let bytes = newest.get_binary_generic("data").unwrap();
    let metrics = stack.replica(Program::Metrics, 0);
    for (bytes, reason) in damaged(bytes) {
        let before = metrics.metric("vmwatch_blocks_unreadable_total").await;
        let subtype = BinarySubtype::Generic;
        let update = doc! { "$set": { "data": Binary { subtype, bytes } } };
        blocks.update_one(doc! { "_id": id }, update).await.unwrap();
        assert_eq!(vm_rows(&stack, "vm-1", "cpu_util").await, [12.0, 11.0, 10.0]);
        eventually("the unreadable block is counted", PATIENCE, async || {
            let count = metrics.metric("vmwatch_blocks_unreadable_total").await;
            (count > before).then_some(()).ok_or_else(|| format!("{count:?}"))
        })
        .await;
        let usage = stack.command(Program::Metrics, &["usage", "--json"], "");
        let usage: Value = serde_json::from_str(&usage).unwrap();
        let unreadable = &usage["unreadable"];
        assert_eq!(unreadable["by_reason"][reason], 1, "{usage}");
        assert_eq!(
            (&unreadable["blocks"], &unreadable["first"][0]["instance_id"]),
            (&1.into(), &"vm-1".into())
        );
    }
    let all = metrics.metrics().await;
    assert!(
        all.contains(r#"vmwatch_blocks_unreadable_total{reason="newer version"}"#),
        "{all}"
    );
    let log = metrics.process.log();
    assert!(log.contains("a block of stored rows is unreadable"), "{log}");
}
