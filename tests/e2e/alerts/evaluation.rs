//! Tests the evaluation records that metrics-svc publishes for stored samples.

use async_nats::jetstream::{kv, stream::Config};
use serde_json::json;
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    alerts::evaluation::{
        EVALUATION_BYTES, EVALUATION_KEEP_SECONDS, EVALUATION_STREAM, EvaluationRecord, FilesystemUse,
        Source, WATCHED_BUCKET, WATCHED_KEY, WatchedProcesses, evaluation_subject,
    },
    metrics::{DEAD_LETTER_STREAM, Sample},
    processes::ProcessName,
    time::unix_millis,
};

use crate::{
    history_support::{SECOND, filesystem, process, publish, sample, stack, stored},
    hypervisor_samples::{measured, publish_measured},
    ingest_support::{self, Publisher, count, drained, metric, waiting},
};

/// Number of messages in a stream; 0 if the stream does not exist.
async fn messages(stack: &Stack, stream: &str) -> u64 {
    let found = stack.bus.jetstream_for_tests().get_stream(stream).await;
    found.map_or(0, |stream| stream.cached_info().state.messages)
}

/// Reads all evaluation records, oldest first.
async fn records(stack: &Stack) -> Vec<EvaluationRecord> {
    let jetstream = stack.bus.jetstream_for_tests();
    let stream = jetstream.get_stream(EVALUATION_STREAM).await.unwrap();
    let state = stream.cached_info().state.clone();
    let mut records = Vec::new();
    for sequence in state.first_sequence.max(1)..=state.last_sequence {
        let message = stream.get_raw_message(sequence).await.unwrap();
        let record: EvaluationRecord = serde_json::from_slice(&message.payload).unwrap();
        assert_eq!(message.subject.as_str(), evaluation_subject(&record.instance_id));
        records.push(record);
    }
    records
}

/// A whole second in the recent past, Unix milliseconds.
fn now() -> u64 {
    unix_millis() / SECOND * SECOND - SECOND
}

fn with_processes(at_ms: u64) -> Sample {
    let mut sample = sample("vm-1", at_ms, "+00:00", 12.5);
    sample.processes = vec![
        process("nginx", 1, 0.5),
        process("nginx", 2, 0.25),
        process("sshd", 3, 1.0),
    ];
    let ended = process("nginx", 4, 3.0);
    sample.processes.push(vmwatch_api::metrics::ProcessSample {
        shutdown_time: Some(1_482_236_600.0),
        ..ended
    });
    sample
}

#[tokio::test]
async fn each_stored_sample_part_makes_one_record_with_its_values() {
    let stack = stack().start().await;
    let at_ms = now();
    let mut first = with_processes(at_ms);
    first.filesystems = vec![filesystem("/", 40 << 30), filesystem("/var", 8 << 40)];
    let mut second = with_processes(at_ms);
    (second.vm, second.part) = (None, 1);
    second.processes = vec![process("cron", 9, 1.0)];
    publish(&stack, &first).await;
    stored(&stack).await;
    publish(&stack, &second).await;
    stored(&stack).await;
    publish_measured(&stack, &measured("vm-2", at_ms, 40.0)).await;
    stored(&stack).await;
    // A sample that is refused has no record.
    let mut refused = sample("vm-3", at_ms, "+00:00", 5.0);
    refused.vm.as_mut().unwrap().cpu_util = Some(-1.0);
    publish(&stack, &refused).await;
    stored(&stack).await;
    eventually("the sample is refused", PATIENCE, async || {
        let letters = messages(&stack, DEAD_LETTER_STREAM).await;
        (letters == 1).then_some(()).ok_or(letters.to_string())
    })
    .await;

    let mut records = records(&stack).await;
    assert_eq!(records.len(), 3, "{records:?}");
    for record in &mut records {
        assert!(
            record.arrived_ms.abs_diff(unix_millis()) < 60 * SECOND,
            "{record:?}"
        );
        record.arrived_ms = 0;
    }
    let half = |mount_point: &str| FilesystemUse {
        mount_point: mount_point.to_owned(),
        used: 50.0,
    };
    let of_agent = EvaluationRecord {
        instance_id: "vm-1".parse().unwrap(),
        source: Source::Agent,
        at_ms,
        arrived_ms: 0,
        part: 0,
        vm: records[0].vm,
        filesystems: vec![half("/"), half("/var")],
        has_processes: true,
        processes: Vec::new(),
        watched_revision: 0,
    };
    let values = records[0].vm.unwrap();
    assert_eq!(
        (
            values.cpu_util,
            values.mem,
            values.disk_write,
            values.proc,
            values.steal
        ),
        (Some(12.5), Some(87.5), Some(87.5), Some(95), None)
    );
    assert_eq!(records[0], of_agent);
    let second = EvaluationRecord {
        part: 1,
        vm: None,
        filesystems: Vec::new(),
        ..of_agent
    };
    assert_eq!(records[1], second);
    let values = records[2].vm.unwrap();
    assert_eq!(
        (
            records[2].source,
            records[2].instance_id.as_str(),
            records[2].has_processes
        ),
        (Source::Hypervisor, "vm-2", false)
    );
    assert_eq!(
        (values.cpu_util, values.steal, values.mem),
        (Some(40.0), Some(4.0), None)
    );

    let stream = stack
        .bus
        .jetstream_for_tests()
        .get_stream(EVALUATION_STREAM)
        .await;
    let config = stream.unwrap().cached_info().config.clone();
    assert_eq!(
        (config.max_age.as_secs(), config.max_bytes),
        (EVALUATION_KEEP_SECONDS, EVALUATION_BYTES)
    );
}

/// The record of a sample is published again if the sample is delivered again, so that none is lost. metrics-svc is killed
/// after it has stored the rows, and could neither publish the record nor acknowledge the sample, because NATS was frozen.
#[tokio::test]
async fn redelivered_sample_makes_its_record_again() {
    let stack = ingest_support::stack()
        .set(Program::Metrics, "VMWATCH_ACK_WAIT", "10s")
        .set(Program::Metrics, "VMWATCH_BATCH_ROWS", "22")
        .set(Program::Metrics, "VMWATCH_BATCH_WAIT", "10s")
        .start()
        .await;
    let metrics = stack.replica(Program::Metrics, 0);
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    stack.database.server.pause();
    publisher.publish_many(2).await;
    eventually("metrics-svc has received the batch", PATIENCE, async || {
        let rows = metric(metrics, "vmwatch_ingest_waiting_rows").await;
        (rows > 21.0).then_some(()).ok_or(format!("{rows}"))
    })
    .await;
    stack.nats.server.pause();
    stack.database.server.resume();
    eventually("the rows are stored", PATIENCE, async || {
        let rows = count(&stack.database).await?;
        (rows == 22).then_some(()).ok_or(format!("{rows}"))
    })
    .await;
    metrics.process.kill9();
    stack.nats.server.kill9();
    stack.nats.restart().await;
    eventually("NATS has the samples again", PATIENCE, async || {
        match waiting(&stack.bus).await? {
            2 => Ok(()),
            messages => Err(format!("{messages} messages")),
        }
    })
    .await;
    assert_eq!(messages(&stack, EVALUATION_STREAM).await, 0);
    metrics.restart().await;
    let what = "killed between insert and publication of the records";
    publisher.rows.settle(what, &stack).await;
    let times = |records: &[EvaluationRecord]| {
        let mut times: Vec<_> = records.iter().map(|record| record.at_ms).collect();
        times.sort_unstable();
        times
    };
    let before = records(&stack).await;
    assert_eq!(before.len(), 2, "{before:?}");

    // A sample that its agent sends again is stored once and has two records, which differ only in their arrival.
    let again = publisher.sample();
    for _ in 0..2 {
        publisher.send(&again).await.unwrap();
    }
    publisher.rows.add(&again);
    publisher.rows.settle("sent twice", &stack).await;
    let all = records(&stack).await;
    let [.., one, other] = all.as_slice() else {
        panic!("{all:?}");
    };
    let arrived = EvaluationRecord {
        arrived_ms: other.arrived_ms,
        ..one.clone()
    };
    assert_eq!((all.len(), &arrived), (4, other));
    assert_eq!(times(&all)[..2], times(&before));
}

#[tokio::test]
async fn record_counts_the_processes_of_watched_names() {
    // The KV bucket does not exist when metrics-svc starts, because alert-svc owns it.
    let stack = stack().start().await;
    publish(&stack, &with_processes(now())).await;
    stored(&stack).await;
    let jetstream = stack.bus.jetstream_for_tests();
    let bucket = kv::Config {
        bucket: WATCHED_BUCKET.to_owned(),
        ..kv::Config::default()
    };
    let bucket = jetstream.create_key_value(bucket).await.unwrap();
    let watch = async |names: &[&str]| {
        let names = serde_json::to_vec(&json!({ "names": names })).unwrap();
        bucket.put(WATCHED_KEY, names.into()).await.unwrap()
    };
    let newest = async |revision: u64| {
        eventually("the names are watched", PATIENCE, async || {
            publish(&stack, &with_processes(now())).await;
            stored(&stack).await;
            let record = records(&stack).await.pop().unwrap();
            let is_newest = record.watched_revision == revision;
            is_newest.then_some(record.processes).ok_or(format!("{revision}"))
        })
        .await
    };
    let found = |name: &str, processes, cpu_util, mem| WatchedProcesses {
        name: ProcessName::new(name).unwrap(),
        processes,
        cpu_util,
        mem,
    };
    // The CPU usage of the ended process counts, but it is not running any more.
    let nginx = found("nginx", 2, 3.75, 0.4);
    let revision = watch(&["nginx", "sshd", "absent"]).await;
    assert_eq!(
        newest(revision).await,
        [nginx.clone(), found("sshd", 1, 1.0, 0.2)]
    );
    let revision = watch(&["nginx"]).await;
    assert_eq!(newest(revision).await, [nginx]);
    let before = &records(&stack).await[0];
    assert_eq!((before.watched_revision, before.processes.len()), (0, 0));
}

/// Something receives the records and never answers, and metrics-svc cannot create the stream, because another one has a
/// subject of it. Samples are stored all the same, and the records are counted as lost.
#[tokio::test]
async fn samples_are_stored_while_the_stream_of_records_does_not_answer() {
    const SAMPLES: u32 = 300;
    let stack = ingest_support::stack().start().await;
    let metrics = stack.replica(Program::Metrics, 0);
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publisher.publish().await;
    drained(&stack.bus).await;
    assert_eq!(records(&stack).await.len(), 1);

    let client = stack.bus.client_for_tests();
    let silent = client.subscribe("vmwatch.v1.evaluation.*").await.unwrap();
    client.flush().await.unwrap();
    let jetstream = stack.bus.jetstream_for_tests();
    jetstream.delete_stream(EVALUATION_STREAM).await.unwrap();
    let obstacle = Config {
        name: "OBSTACLE".to_owned(),
        subjects: vec!["vmwatch.v1.evaluation.obstacle".to_owned()],
        ..Config::default()
    };
    jetstream.create_stream(obstacle).await.unwrap();
    publisher.publish_many(SAMPLES).await;
    publisher
        .rows
        .settle("without the stream of records", &stack)
        .await;
    let lost = metric(metrics, "vmwatch_evaluations_lost_total").await;
    assert!(lost > 0.0 && lost <= f64::from(SAMPLES), "{lost}");
    assert_eq!(messages(&stack, EVALUATION_STREAM).await, 0);

    // Publishing resumes, without a restart, when the stream can be created.
    jetstream.delete_stream("OBSTACLE").await.unwrap();
    drop(silent);
    eventually("records are published again", PATIENCE, async || {
        publisher.publish().await;
        drained(&stack.bus).await;
        let records = messages(&stack, EVALUATION_STREAM).await;
        (records > 0).then_some(()).ok_or("none is".to_owned())
    })
    .await;
    publisher.rows.settle("with the stream again", &stack).await;
}
