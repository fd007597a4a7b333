//! Tests messages that can never be stored: each becomes a dead letter with its reason, and delays no other message.

use std::collections::BTreeMap;

use async_nats::jetstream::stream::Stream;
use metrics_svc::ingest::dead_letter;
use mongodb::bson::doc;
use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::metrics::{
    CONTENT_TYPE, DEAD_LETTER_STREAM, SAMPLE_PART_BYTES, SAMPLE_PART_ROWS, SAMPLE_SUBJECT_PREFIX, Sample,
};
use vmwatch_blocks::{Encoder, SAMPLE_CONTENT_TYPE, encode_sample};

use crate::ingest_support::{Publisher, Rows, drained, stack};

async fn dead_letter_stream(stack: &Stack) -> Stream {
    let jetstream = stack.bus.jetstream_for_tests();
    jetstream.get_stream(DEAD_LETTER_STREAM).await.unwrap()
}

/// Returns the reasons and the bodies of all dead letters.
async fn dead_letters(stack: &Stack) -> Vec<(String, Vec<u8>)> {
    let stream = dead_letter_stream(stack).await;
    let mut letters = Vec::new();
    for sequence in 1..=stream.cached_info().state.last_sequence {
        let letter = stream.get_raw_message(sequence).await.unwrap();
        let header = |name| letter.headers.get(name).unwrap().to_string();
        assert!(header(dead_letter::SUBJECT).starts_with(SAMPLE_SUBJECT_PREFIX));
        letters.push((header(dead_letter::REASON), letter.payload.to_vec()));
    }
    letters
}

/// Returns an invalid body of each kind, with the beginning of the reason for its refusal.
fn malformed(sample: &Sample) -> Vec<(Vec<u8>, &'static str)> {
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut body = serde_json::to_value(sample).unwrap();
        change(&mut body);
        body.to_string().into_bytes()
    };
    let row = json!({
        "cmd": "x", "pid": 1, "cpu_util": 0, "mem": 0, "disk_read": 0, "disk_write": 0, "running_time": 0,
    });
    let mut padded = serde_json::to_vec(sample).unwrap();
    padded.resize(SAMPLE_PART_BYTES + 1, b' ');
    vec![
        (
            b"pid 479 lvmetad".to_vec(),
            "the message is not a sample: expected value",
        ),
        (
            b"\xff\xfe".to_vec(),
            "the message is not a sample: expected value",
        ),
        (
            changed(&|body| body["create_date"] = json!("today")),
            "the message is not a sample: must be a date",
        ),
        (
            changed(&|body| body["instance_id"] = json!("vm-2")),
            "instance_id differs from the VM in the message's subject",
        ),
        (
            changed(&|body| {
                body["processes"] = json!([]);
                body["vm"]["cpu_util"] = json!(100.1);
            }),
            "`cpu_util` is out of range",
        ),
        (
            changed(&|body| body["net_incoming"] = json!(-1)),
            "`net_incoming` is out of range",
        ),
        (
            // More than half of the rows are impossible.
            changed(&|body| {
                for process in body["processes"].as_array_mut().unwrap() {
                    process["pid"] = json!(u32::MAX);
                }
            }),
            "`pid` is out of range",
        ),
        (
            changed(&|body| body["create_date"] = json!("2117-01-01T00:00:00")),
            "create_date is more than a day ahead",
        ),
        (
            changed(&|body| body["processes"] = vec![row.clone(); SAMPLE_PART_ROWS + 1].into()),
            "the sample has more than",
        ),
        (
            changed(&|body| (body["vm"], body["processes"]) = (Value::Null, json!([]))),
            "the sample has neither a row of the VM nor rows of processes",
        ),
        (padded, "the message is larger than"),
    ]
}

#[tokio::test]
async fn malformed_messages_become_dead_letters_and_valid_ones_are_stored() {
    let stack = stack().start().await;
    let mut sent = BTreeMap::new();
    let mut rows = Rows::default();
    // Each body is sent for a different VM, because a VM gets at most one dead letter per minute.
    for kind in 0.. {
        let mut publisher = Publisher::new(&stack, &format!("vm-1-{kind}"), 10);
        let Some((body, reason)) = malformed(&publisher.sample()).into_iter().nth(kind) else {
            break;
        };
        publisher.publish_many(50).await;
        publisher.send_raw(body.clone()).await.unwrap();
        sent.insert(body, reason);
        publisher.publish_many(49).await;
        rows.absorb(publisher.rows);
    }
    // One row is impossible, and the others are stored.
    let mut publisher = Publisher::new(&stack, "vm-2", 10);
    let mut sample = publisher.sample();
    let mut body = serde_json::to_value(&sample).unwrap();
    body["processes"][3]["disk_read"] = json!(-1);
    let body = body.to_string().into_bytes();
    publisher.send_raw(body.clone()).await.unwrap();
    sent.insert(
        body,
        "rows were refused and the others stored: process 1003: `disk_read`",
    );
    sample.processes.remove(3);
    publisher.rows.add(&sample);
    rows.absorb(publisher.rows);
    rows.settle("one malformed message in a hundred", &stack).await;

    let letters = eventually("each dead letter is published", PATIENCE, async || {
        let letters = dead_letters(&stack).await;
        if letters.len() == sent.len() {
            Ok(letters)
        } else {
            Err(format!("{} dead letters", letters.len()))
        }
    })
    .await;
    for (reason, body) in letters {
        let expected = sent.remove(&body).expect("each body once");
        assert!(
            reason.starts_with(expected),
            "the reason is {reason:?}, expected {expected:?}"
        );
    }
}

/// One sample arrives as JSON and encoded, and one only encoded. A damaged one keeps its `Content-Type` as a dead letter.
#[tokio::test]
async fn encoded_sample_is_stored_like_its_json() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    let mut encoder = Encoder::new().unwrap();
    let (both, one) = (publisher.sample(), publisher.sample());
    publisher.send_json(&both).await.unwrap();
    for sample in [&both, &one] {
        let body = encode_sample(sample, &mut encoder).unwrap();
        publisher.send_encoded(body).await.unwrap();
        publisher.rows.add(sample);
    }
    let mut damaged = encode_sample(&one, &mut encoder).unwrap();
    damaged.pop();
    publisher.send_encoded(damaged.clone()).await.unwrap();
    publisher.rows.settle("encoded samples", &stack).await;

    let letters = dead_letters(&stack).await;
    let reason = "the message is not a sample: the block is corrupt: its checksum is wrong".to_owned();
    assert_eq!(letters, [(reason, damaged)]);
    let letter = dead_letter_stream(&stack).await.get_raw_message(1).await.unwrap();
    assert_eq!(
        letter.headers.get(CONTENT_TYPE).unwrap().as_str(),
        SAMPLE_CONTENT_TYPE
    );
}

/// A broken or hostile agent causes at most one dead letter and one log line per minute, and does not delay the samples
/// of other VMs.
#[tokio::test]
async fn flood_of_malformed_messages_leaves_one_dead_letter_per_minute() {
    const FLOOD: u32 = 300;
    let stack = stack().start().await;
    let metrics = stack.replica(Program::Metrics, 0);
    let broken = Publisher::new(&stack, "vm-1", 0);
    let mut other = Publisher::new(&stack, "vm-2", 10);
    for _ in 0..FLOOD {
        broken.send_raw(b"{}".to_vec()).await.unwrap();
        other.publish().await;
    }
    other.rows.settle("a flood of malformed messages", &stack).await;
    assert_eq!(dead_letters(&stack).await.len(), 1);
    let text = metrics.metrics().await;
    let counted = format!(r#"vmwatch_samples_refused_total{{vm="vm-1"}} {FLOOD}"#);
    assert!(text.contains(&counted), "{text}");
    assert_eq!(metrics.process.log().matches("sample refused").count(), 1);
}

/// An operator has set a validator on the collection, so the database itself refuses a block of rows permanently.
#[tokio::test]
async fn row_refused_by_the_database_does_not_delay_other_rows() {
    let stack = stack().start().await;
    let validator = doc! { "collMod": "blocks", "validator": { "rows": { "$ne": 7 } } };
    stack.database.handle().run_command(validator).await.unwrap();
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publisher.publish_many(20).await;
    let mut sample = publisher.sample();
    sample.processes.truncate(7);
    publisher.send(&sample).await.unwrap();
    publisher.publish_many(20).await;

    // The sample's VM row is stored. The whole message can be sent again after the validator is removed.
    let processes = std::mem::take(&mut sample.processes);
    publisher.rows.add(&sample);
    publisher
        .rows
        .settle("a row that the database refuses", &stack)
        .await;
    let letters = dead_letters(&stack).await;
    assert_eq!(letters.len(), 1);
    let (reason, body) = &letters[0];
    assert!(
        reason.starts_with("the database refused rows of the sample: "),
        "{reason}"
    );

    let lifted = doc! { "collMod": "blocks", "validator": {} };
    stack.database.handle().run_command(lifted).await.unwrap();
    publisher.send_encoded(body.clone()).await.unwrap();
    drained(&stack.bus).await;
    sample.processes = processes;
    publisher.rows.add(&sample);
    publisher
        .rows
        .settle("the refused message is sent again", &stack)
        .await;
    assert!(stack.replica(Program::Metrics, 0).process.ended().is_none());
}
