//! Tests that a sample gives the same rows, rollups and answers in each form in which it may arrive.

use std::collections::BTreeMap;

use mongodb::bson::{Document, doc};
use serde_json::Value;
use testkit::Stack;
use vmwatch_api::{
    filesystems::{FilesystemsAt, FilesystemsAtQuery},
    history::{Points, TimeRange, VmHistory, VmHistoryQuery},
    metrics::{Latest, Limit, ProcessLatest, RowPage, Sample, VmLatest},
    processes::{ProcessSort, ProcessesAt, ProcessesAtQuery},
    time::{UtcOffset, unix_millis},
};
use vmwatch_blocks::{RowIdentity, row_id};

use crate::{
    history_support::{
        MINUTE, call, filesystem, followed, process, publish, publish_encoded, recent_bucket, sample, stack,
    },
    rows::stored_rows,
};

const OFFSET: &str = "+00:00";
const PROCESSES: u32 = 40;
/// The forms of a sample, each under the name of the VM that sends its samples in that form.
const FORMS: [&str; 5] = ["vm-json", "vm-encoded", "vm-halves", "vm-twice", "vm-all"];

/// Two samples. In the second one, some processes have ended, and a pid belongs to another process.
fn samples(instance: &str, at_ms: u64) -> [Sample; 2] {
    let mut first = sample(instance, at_ms, OFFSET, 20.0);
    first.processes = (1..=PROCESSES)
        .map(|pid| process("worker", pid, f64::from(pid) / 10.0))
        .collect();
    let mut second = sample(instance, at_ms + MINUTE, OFFSET, 40.0);
    second.processes.clone_from(&first.processes);
    for ended in &mut second.processes[..5] {
        ended.shutdown_time = Some(1_482_236_600.123_456);
    }
    let mut reused = process("another", 1, 99.9);
    reused.running_time += 500.25;
    second.processes.push(reused);
    first.filesystems = vec![filesystem("/", 40 << 30), filesystem("/data", 8 << 40)];
    second.filesystems = vec![filesystem("/", 41 << 30)];
    [first, second]
}

/// The sample as two parts, as an agent with other limits sends it.
fn halves(whole: &Sample) -> [Sample; 2] {
    let (mut first, mut second) = (whole.clone(), whole.clone());
    second.processes = first.processes.split_off(whole.processes.len() / 2);
    (second.vm, second.part) = (None, 1);
    second.filesystems.clear();
    [first, second]
}

async fn send(stack: &Stack, sample: &Sample) {
    let whole = async || publish_encoded(stack, sample).await;
    let halves = async || {
        for half in halves(sample) {
            publish_encoded(stack, &half).await;
        }
    };
    match sample.instance_id.as_str() {
        "vm-json" => publish(stack, sample).await,
        "vm-encoded" => whole().await,
        "vm-halves" => halves().await,
        "vm-twice" => {
            whole().await;
            whole().await;
        }
        _ => {
            halves().await;
            publish(stack, sample).await;
            whole().await;
        }
    }
}

/// Returns rows without the two fields that depend on the name of the VM.
fn anonymous(page: &RowPage) -> Vec<Value> {
    let mut rows: Vec<Value> = serde_json::from_str(page.rows.as_json()).unwrap();
    for row in &mut rows {
        let fields = row.as_object_mut().unwrap();
        fields.remove("_id").unwrap();
        fields.remove("instance_id").unwrap();
    }
    // Rows of equal dates are answered in the order of their `_id`s.
    rows.sort_by_key(Value::to_string);
    rows
}

/// Everything that is answered about a VM.
async fn answers(stack: &Stack, instance: &str, from_ms: u64) -> Vec<Value> {
    let latest = Latest {
        instance_id: instance.parse().unwrap(),
        limit: Limit::new(1000).unwrap(),
        before: None,
    };
    let vms = call::<VmLatest>(stack, &latest).await;
    let processes = call::<ProcessLatest>(stack, &latest).await;
    let history = VmHistoryQuery {
        instance_id: instance.parse().unwrap(),
        range: TimeRange::new(from_ms, from_ms + 5 * MINUTE).unwrap(),
        points: Points::new(1).unwrap(),
        after_ms: None,
    };
    let table = ProcessesAtQuery {
        instance_id: instance.parse().unwrap(),
        at_ms: None,
        sort: ProcessSort::Cpu,
        order: None,
        name: None,
        limit: Limit::new(1000).unwrap(),
        after: None,
    };
    vec![
        anonymous(&vms).into(),
        anonymous(&processes).into(),
        serde_json::to_value(call::<VmHistory>(stack, &history).await).unwrap(),
        serde_json::to_value(call::<ProcessesAt>(stack, &table).await).unwrap(),
        filesystems(stack, instance, None).await,
        filesystems(stack, instance, Some(from_ms + MINUTE)).await,
    ]
}

async fn filesystems(stack: &Stack, instance: &str, at_ms: Option<u64>) -> Value {
    let query = FilesystemsAtQuery {
        instance_id: instance.parse().unwrap(),
        at_ms,
    };
    serde_json::to_value(call::<FilesystemsAt>(stack, &query).await).unwrap()
}

/// The `_id`s of the stored rows, and for each the row without its effective date, which is that of one of its arrivals.
async fn rows(stack: &Stack, instance: &str) -> BTreeMap<[u8; 12], Document> {
    let stored = stored_rows(&stack.database, doc! { "instance_id": instance }).await;
    let row = |row: Document| (row.get_object_id("_id").unwrap().bytes(), row);
    stored.unwrap().into_iter().map(row).collect()
}

/// The `_id`s that rows of these samples have by the wire contract.
fn ids(samples: &[Sample]) -> Vec<[u8; 12]> {
    let offset: UtcOffset = OFFSET.parse().unwrap();
    let mut ids = Vec::new();
    for sample in samples {
        let (instance, date) = (sample.instance_id.as_str(), sample.create_date.as_str());
        let second = i64::try_from(offset.unix_millis_of(date).unwrap() / 1000).unwrap();
        ids.push(row_id(instance, date, second, RowIdentity::Vm));
        ids.extend(sample.processes.iter().map(|process| {
            let (pid, started) = (process.pid, process.running_time);
            row_id(instance, date, second, RowIdentity::Process { pid, started })
        }));
        ids.extend(sample.filesystems.iter().map(|filesystem| {
            row_id(
                instance,
                date,
                second,
                RowIdentity::filesystem(&filesystem.mount_point),
            )
        }));
    }
    ids.sort_unstable();
    ids
}

#[tokio::test]
async fn sample_gives_the_same_rows_rollups_and_answers_in_each_form() {
    let stack = stack().start().await;
    let from_ms = recent_bucket();
    assert!(from_ms + 2 * MINUTE < unix_millis());
    for instance in FORMS {
        for sample in samples(instance, from_ms + MINUTE) {
            send(&stack, &sample).await;
        }
    }
    followed(&stack).await;

    let rollups = stack.database.handle().collection::<Document>("vm_samples_5m");
    let mut expected = None;
    for instance in FORMS {
        let rows = rows(&stack, instance).await;
        let stored_ids: Vec<_> = rows.keys().copied().collect();
        assert_eq!(
            stored_ids,
            ids(&samples(instance, from_ms + MINUTE)),
            "{instance}"
        );
        let found = rollups
            .find_one(doc! { "_id": { "$regex": format!("^{instance}/") } })
            .await;
        let sums = found
            .unwrap()
            .expect("the VM has a rollup")
            .get_document("sums")
            .unwrap()
            .clone();
        let answers = answers(&stack, instance, from_ms).await;
        let count = answers[1].as_array().unwrap().len();
        assert_eq!(count, 2 * PROCESSES as usize + 1, "{instance}");
        let mount_points = |answer: &Value| answer["filesystems"].as_array().unwrap().len();
        assert_eq!(
            (mount_points(&answers[4]), mount_points(&answers[5])),
            (1, 2),
            "{instance}"
        );
        let (answers_before, sums_before) = expected.get_or_insert_with(|| (answers.clone(), sums.clone()));
        assert_eq!(&answers, answers_before, "{instance}");
        assert_eq!(&sums, sums_before, "{instance}");
    }
}
