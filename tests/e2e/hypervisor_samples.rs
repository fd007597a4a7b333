//! Tests the samples that hypervisors measure: their rows, rollups, limits and removal are separate from those of agents.

use std::collections::BTreeSet;

use mongodb::bson::{Document, doc};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    Principal, Role, Scope,
    history::{Points, Resolution, TimeRange, VmHistory, VmHistoryQuery, VmHypervisorHistory, VmSeries},
    hypervisor_samples::{
        HYPERVISOR_SAMPLE_BYTES, HYPERVISOR_SAMPLE_SUBJECT_PREFIX, HypervisorSample,
        hypervisor_sample_subject,
    },
    lifecycle::Target,
    metrics::{CONTENT_TYPE, DEAD_LETTER_STREAM, SAMPLE_SUBJECT_PREFIX},
    removal::HistoryRemove,
    time::{CreateDate, UtcOffset, unix_millis},
};
use vmwatch_blocks::{Encoder, SAMPLE_CONTENT_TYPE, encode_sample};
use vmwatch_bus::Context;

use crate::{
    history_support::{
        DAY, HOUR, MINUTE, SECOND, call, dirty_buckets, followed, publish, recent_bucket, sample, stack,
        stored,
    },
    ingest_support::waiting,
    rows::{blocks, stored_rows},
};

/// The collections that are derived from the rows of hypervisors.
const DERIVED: [&str; 5] = ["dirty_buckets", "5m", "1h", "1d", "instances"];

/// Returns what a hypervisor measured of a VM without statistics of its balloon driver. All values are derived from the CPU
/// usage.
pub(crate) fn measured(instance: &str, at_ms: u64, cpu_util: f64) -> HypervisorSample {
    HypervisorSample {
        instance_id: instance.parse().unwrap(),
        create_date: CreateDate::at_millis(at_ms, UtcOffset::UTC),
        hypervisor: "lab".to_owned(),
        cpu_util: Some(cpu_util),
        mem: None,
        disk_read: Some(cpu_util / 2.0),
        disk_write: Some(cpu_util * 7.0),
        net_incoming: Some(cpu_util * 3.0),
        net_outgoing: Some(cpu_util * 5.0),
        cores: Some(4),
        steal: Some(cpu_util / 10.0),
    }
}

/// Publishes a sample, as lifecycle-svc does.
pub(crate) async fn publish_measured(stack: &Stack, sample: &HypervisorSample) {
    let subject = hypervisor_sample_subject(&sample.instance_id);
    send(stack, subject, serde_json::to_vec(sample).unwrap()).await;
}

async fn send(stack: &Stack, subject: String, body: Vec<u8>) {
    let jetstream = stack.bus.jetstream_for_tests();
    let published = jetstream.publish(subject, body.into()).await.unwrap();
    published.await.expect("the stream stores the message");
}

/// The documents of a VM in a collection that is derived from the rows of hypervisors.
async fn derived(stack: &Stack, suffix: &str, instance: &str) -> u64 {
    let name = format!("vm_samples_hypervisor_{suffix}");
    let documents = stack.database.handle().collection::<Document>(&name);
    // The id of a rollup begins with that of the VM.
    let of_vm = doc! { "$or": [
        { "instance_id": instance }, { "_id": instance },
        { "_id": { "$gte": format!("{instance}/"), "$lt": format!("{instance}0") } },
    ] };
    documents.count_documents(of_vm).await.unwrap()
}

/// Waits until all samples are stored, and contained in the rollups.
pub(crate) async fn rolled_up(stack: &Stack) {
    followed(stack).await;
    eventually("the rows of hypervisors are rolled up", PATIENCE, async || {
        let name = "vm_samples_hypervisor_dirty_buckets";
        let documents = stack.database.handle().collection::<Document>(name);
        match documents.count_documents(doc! {}).await {
            Ok(0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

pub(crate) async fn measured_rows(stack: &Stack) -> Vec<Document> {
    stored_rows(&stack.database, doc! { "kind": "hypervisor" })
        .await
        .unwrap()
}

fn query(instance: &str, from_ms: u64, to_ms: u64, points: u64) -> VmHistoryQuery {
    VmHistoryQuery {
        instance_id: instance.parse().unwrap(),
        range: TimeRange::new(from_ms, to_ms).unwrap(),
        points: Points::new(points).unwrap(),
        after_ms: None,
    }
}

/// The number of samples, and the average CPU usage, memory usage and number of processes in the first bucket of a
/// history.
fn first(series: &VmSeries) -> (u64, Option<f64>, Option<f64>, Option<f64>) {
    let bucket = &series.buckets[0];
    let of = |stat: Option<vmwatch_api::history::Stat>| stat.map(|stat| stat.avg);
    let stats = &bucket.stats;
    (bucket.count, of(stats.cpu_util), of(stats.mem), of(stats.proc))
}

#[tokio::test]
async fn rows_of_a_hypervisor_are_stored_once_and_rolled_up_apart_from_those_of_the_agent() {
    let stack = stack().start().await;
    let from_ms = recent_bucket();
    for second in 0..30 {
        let at_ms = from_ms + second * SECOND;
        let of_hypervisor = measured("vm-1", at_ms, 40.0);
        publish_measured(&stack, &of_hypervisor).await;
        // The same sample is delivered again, and the agent reports at the same time.
        publish_measured(&stack, &of_hypervisor).await;
        publish(&stack, &sample("vm-1", at_ms, "+00:00", 10.0)).await;
    }
    rolled_up(&stack).await;
    let rows = measured_rows(&stack).await;
    let all = stored_rows(&stack.database, doc! {}).await.unwrap();
    let ids = |rows: &[Document]| -> BTreeSet<_> {
        rows.iter().map(|row| row.get_object_id("_id").unwrap()).collect()
    };
    assert_eq!((rows.len(), ids(&rows).len()), (30, 30));
    assert_eq!(
        (all.len(), ids(&all).len()),
        (60, 60),
        "the source is part of the id"
    );
    let row = &rows[0];
    assert_eq!(
        (
            row.get_str("hypervisor").unwrap(),
            row.get_f64("steal").unwrap(),
            row.get_i32("cores").unwrap()
        ),
        ("lab", 4.0, 4)
    );
    assert!(!row.contains_key("mem") && !row.contains_key("proc"), "{row}");
    for (resolution, length, points) in [
        (Resolution::Raw, MINUTE, 1),
        (Resolution::FiveMinutes, DAY, 288),
        (Resolution::Hour, DAY, 24),
        (Resolution::Day, DAY, 1),
    ] {
        let day = from_ms / DAY * DAY;
        let from_ms = if resolution == Resolution::Raw {
            from_ms
        } else {
            day
        };
        let query = query("vm-1", from_ms, from_ms + length, points);
        let of_agent = call::<VmHistory>(&stack, &query).await;
        let of_hypervisor = call::<VmHypervisorHistory>(&stack, &query).await;
        assert_eq!(
            (of_agent.resolution, of_hypervisor.resolution),
            (resolution, resolution)
        );
        assert_eq!(
            first(&of_agent),
            (30, Some(10.0), Some(90.0), Some(95.0)),
            "{resolution:?}"
        );
        assert_eq!(
            first(&of_hypervisor),
            (30, Some(40.0), None, None),
            "{resolution:?}"
        );
    }

    // The rebuilt rollups are the same.
    for suffix in ["5m", "1h", "1d", "instances"] {
        let name = format!("vm_samples_hypervisor_{suffix}");
        stack
            .database
            .handle()
            .collection::<Document>(&name)
            .drop()
            .await
            .unwrap();
    }
    stack.command(Program::Metrics, &["rebuild"], "");
    let day = query("vm-1", from_ms / DAY * DAY, from_ms / DAY * DAY + DAY, 1);
    let rebuilt = call::<VmHypervisorHistory>(&stack, &day).await;
    assert_eq!(first(&rebuilt), (30, Some(40.0), None, None));
    assert_eq!(derived(&stack, "instances", "vm-1").await, 1);
}

#[tokio::test]
async fn rows_of_a_hypervisor_are_compacted() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_COMPACTION_INTERVAL", "100ms")
        .set(Program::Metrics, "VMWATCH_COMPACTION_DELETE_AFTER", "3s")
        .start()
        .await;
    let hour = (unix_millis() / HOUR - 2) * HOUR;
    for minute in 0..20_u32 {
        let at_ms = hour + u64::from(minute) * MINUTE;
        publish_measured(&stack, &measured("vm-1", at_ms, f64::from(minute))).await;
    }
    stored(&stack).await;
    let merged = async || {
        let found = blocks(&stack.database)
            .count_documents(doc! { "kind": "hypervisor" })
            .await;
        let level_1 =
            doc! { "kind": "hypervisor", "level": 1, "rows": 20, "unconfirmed": { "$exists": false } };
        let whole = blocks(&stack.database).count_documents(level_1).await;
        (found.as_ref().ok() == Some(&1) && whole.as_ref().ok() == Some(&1))
            .then_some(())
            .ok_or_else(|| format!("{found:?} {whole:?}"))
    };
    eventually("the hour is one block", 2 * PATIENCE, merged).await;
    let history = call::<VmHypervisorHistory>(&stack, &query("vm-1", hour, hour + HOUR, 60)).await;
    let shown: Vec<_> = history
        .buckets
        .iter()
        .filter_map(|bucket| bucket.stats.cpu_util)
        .collect();
    let expected: Vec<_> = (0..20_u32).map(f64::from).collect();
    assert_eq!(shown.iter().map(|stat| stat.avg).collect::<Vec<_>>(), expected);
}

/// Returns the original subjects and the reasons of all dead letters.
async fn dead_letters(stack: &Stack) -> Vec<(String, String)> {
    let jetstream = stack.bus.jetstream_for_tests();
    let stream = jetstream.get_stream(DEAD_LETTER_STREAM).await.unwrap();
    let mut letters = Vec::new();
    for sequence in 1..=stream.cached_info().state.last_sequence {
        let letter = stream.get_raw_message(sequence).await.unwrap();
        let header = |name| letter.headers.get(name).unwrap().to_string();
        letters.push((header("Vmwatch-Subject"), header("Vmwatch-Reason")));
    }
    letters
}

/// An encoded sample whose row of the VM is one of a hypervisor.
fn forged(instance: &str) -> Vec<u8> {
    let sample = sample(instance, unix_millis(), "+00:00", 5.0);
    let mut bytes = encode_sample(&sample, &mut Encoder::new().unwrap()).unwrap();
    // After the block of the VM, a zero byte says that there is no block of processes.
    let start = bytes.windows(3).position(|bytes| bytes == b"VMB").unwrap();
    let end = bytes.len() - 1;
    bytes[start + 8] = 4;
    seal(&mut bytes[start..end]);
    seal(&mut bytes);
    bytes
}

/// Writes the checksum of a block or an encoded sample.
fn seal(bytes: &mut [u8]) {
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&bytes[..4]);
    checksum.update(&bytes[8..]);
    bytes[4..8].copy_from_slice(&checksum.finalize().to_le_bytes());
}

#[tokio::test]
async fn message_of_an_agent_never_becomes_a_row_of_a_hypervisor() {
    let stack = stack().start().await;
    let now = unix_millis();
    let of_agent = |instance: &str| format!("{SAMPLE_SUBJECT_PREFIX}{instance}");
    let of_hypervisor = |instance: &str| format!("{HYPERVISOR_SAMPLE_SUBJECT_PREFIX}{instance}");
    let body = serde_json::to_vec(&measured("a", now, 5.0)).unwrap();
    send(&stack, of_agent("a"), body.clone()).await;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert(CONTENT_TYPE, SAMPLE_CONTENT_TYPE);
    let jetstream = stack.bus.jetstream_for_tests();
    let published = jetstream.publish_with_headers(of_agent("b"), headers, forged("b").into());
    published.await.unwrap().await.unwrap();
    // Wrong messages of lifecycle-svc are dead letters, too.
    send(&stack, of_hypervisor("c"), body.clone()).await;
    let mut long = body;
    long.resize(HYPERVISOR_SAMPLE_BYTES + 1, b' ');
    send(&stack, of_hypervisor("d"), long).await;
    let agents = serde_json::to_vec(&sample("e", now, "+00:00", 5.0)).unwrap();
    send(&stack, of_hypervisor("e"), agents).await;
    let mut impossible = measured("f", now, 5.0);
    impossible.steal = Some(100.1);
    publish_measured(&stack, &impossible).await;
    publish_measured(&stack, &measured("g", now, 5.0)).await;
    stored(&stack).await;
    let letters = eventually("the messages are dead letters", PATIENCE, async || {
        let letters = dead_letters(&stack).await;
        (letters.len() == 6)
            .then_some(letters.clone())
            .ok_or(format!("{letters:?}"))
    })
    .await;
    for (subject, reason) in [
        (
            of_agent("a"),
            "the sample has neither a row of the VM nor rows of processes",
        ),
        (
            of_agent("b"),
            "the message is not a sample: the block is corrupt: it has rows of another kind",
        ),
        (of_hypervisor("c"), "instance_id differs"),
        (of_hypervisor("d"), "the message is larger than 4096 bytes"),
        (
            of_hypervisor("e"),
            "the message is not a sample of a hypervisor: missing field",
        ),
        (of_hypervisor("f"), "`steal` is out of range"),
    ] {
        let letter = letters.iter().find(|(of, _)| *of == subject);
        assert!(
            letter.is_some_and(|(_, found)| found.starts_with(reason)),
            "{subject}: {letters:?}"
        );
    }
    let rows = measured_rows(&stack).await;
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert_eq!(rows[0].get_str("instance_id").unwrap(), "g");
}

#[tokio::test]
async fn agent_above_its_rate_does_not_delay_the_samples_of_the_hypervisor() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_VM_MESSAGES_PER_SECOND", "1")
        .start()
        .await;
    let from_ms = recent_bucket();
    for second in 0..60 {
        publish(&stack, &sample("vm-1", from_ms + second * SECOND, "+00:00", 5.0)).await;
    }
    for second in 0..5 {
        publish_measured(&stack, &measured("vm-1", from_ms + second * SECOND, 5.0)).await;
    }
    eventually("the rows of the hypervisor are stored", PATIENCE, async || {
        let rows = measured_rows(&stack).await.len();
        (rows == 5).then_some(()).ok_or(format!("{rows}"))
    })
    .await;
    assert!(
        waiting(&stack.bus).await.unwrap() > 0,
        "samples of the agent wait"
    );
}

#[tokio::test]
async fn removal_of_a_vm_deletes_what_its_hypervisor_measured() {
    let stack = stack().start().await;
    let from_ms = recent_bucket();
    for vm in ["removed", "kept"] {
        publish_measured(&stack, &measured(vm, from_ms, 5.0)).await;
    }
    rolled_up(&stack).await;
    assert_eq!(dirty_buckets(&stack).await, 0);
    let remove = Context::new(PATIENCE).as_principal(Principal {
        user: "test".to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    });
    let target = Target {
        instance_id: "removed".parse().unwrap(),
    };
    let removed = stack.bus.call::<HistoryRemove>(&remove, &target).await.unwrap();
    // A block, three rollups and the entry in the list of VMs.
    assert_eq!(removed.records, 5);
    let rows = measured_rows(&stack).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].get_str("instance_id").unwrap(), "kept");
    for suffix in DERIVED {
        assert_eq!(derived(&stack, suffix, "removed").await, 0, "{suffix}");
        let kept = derived(&stack, suffix, "kept").await;
        assert_eq!(kept, u64::from(suffix != "dirty_buckets"), "{suffix}");
    }
}
