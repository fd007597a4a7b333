//! A database that refuses or stalls writes: only a row's own fault, or three crashes, make a dead letter.

use async_nats::jetstream::{AckKind, consumer::PullConsumer};
use futures::StreamExt;
use metrics_svc::ingest::dead_letter;
use mongodb::bson::{Document, doc};
use testkit::{Inserts, MongoProxy, PATIENCE, Program, Replica, Stack, eventually};
use vmwatch_api::metrics::{DEAD_LETTER_STREAM, SAMPLE_STREAM};
use vmwatch_store::MONGODB_URI;

use crate::ingest_support::{Publisher, metric, stack};

/// A stack whose metrics-svc reaches the database through a proxy.
async fn behind_a_proxy() -> (Stack, MongoProxy) {
    let stack = stack().start().await;
    let proxy = MongoProxy::start(stack.database.uri(), "process_samples").await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.set(MONGODB_URI.name, proxy.uri());
    metrics.process.kill9();
    metrics.restart().await;
    (stack, proxy)
}

/// The reasons of all dead letters.
async fn dead_letters(stack: &Stack) -> Vec<String> {
    let stream = stack
        .bus
        .jetstream()
        .get_stream(DEAD_LETTER_STREAM)
        .await
        .unwrap();
    let mut reasons = Vec::new();
    for sequence in 1..=stream.cached_info().state.last_sequence {
        let letter = stream.get_raw_message(sequence).await.unwrap();
        reasons.push(letter.headers.get(dead_letter::REASON).unwrap().to_string());
    }
    reasons
}

async fn caught(proxy: &MongoProxy, inserts: u64) {
    eventually("inserts are caught", PATIENCE, async || {
        let caught = proxy.caught();
        (caught >= inserts)
            .then_some(())
            .ok_or(format!("{caught} of {inserts}"))
    })
    .await;
}

/// The number of messages that are recorded as suspects.
async fn suspects(stack: &Stack) -> u64 {
    let records = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_suspects");
    records.count_documents(doc! {}).await.unwrap()
}

/// Delivers the stream's only message this many times without storing it, as crashes would.
async fn deliver(stack: &Stack, times: usize) {
    let stream = stack.bus.jetstream().get_stream(SAMPLE_STREAM).await.unwrap();
    let consumer: PullConsumer = stream.get_consumer("store").await.unwrap();
    for _ in 0..times {
        // The message that was delivered to the killed program is delivered again after the ack wait.
        let batch = consumer.batch().max_messages(1).expires(PATIENCE);
        let mut messages = batch.messages().await.unwrap();
        let message = messages.next().await.unwrap().unwrap();
        message.ack_with(AckKind::Nak(None)).await.unwrap();
    }
}

/// Temporary refusals of any kind never make a dead letter.
#[tokio::test]
async fn keeps_samples_while_the_server_blocks_writes() {
    const USER_WRITES_BLOCKED: i32 = 371;
    let (stack, proxy) = behind_a_proxy().await;
    proxy.set(Inserts::Refuse(USER_WRITES_BLOCKED));
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publisher.publish_many(20).await;
    caught(&proxy, 7).await;
    assert_eq!(dead_letters(&stack).await, [""; 0]);
    proxy.set(Inserts::Pass);
    publisher
        .rows
        .settle("a server that blocks writes for a while", &stack)
        .await;
    assert_eq!(dead_letters(&stack).await, [""; 0]);
    let metrics = stack.replica(Program::Metrics, 0);
    assert!(metric(metrics, "vmwatch_ingest_retries_total").await >= 6.0);
}

/// A message that was delivered often for other reasons is stored like any other.
#[tokio::test]
async fn writes_a_message_alone_that_was_delivered_five_times() {
    let stack = stack().start().await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.kill9();
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publisher.publish_many(1).await;
    // One delivery more than the former limit.
    deliver(&stack, 21).await;
    metrics.restart().await;
    publisher
        .rows
        .settle("a message that was delivered often", &stack)
        .await;
    assert!((metric(metrics, "vmwatch_samples_written_alone_total").await - 1.0).abs() < f64::EPSILON);
    assert_eq!(suspects(&stack).await, 0);
    assert_eq!(dead_letters(&stack).await, [""; 0]);
}

async fn crash_while_writing(metrics: &Replica, proxy: &MongoProxy) {
    let before = proxy.caught();
    metrics.restart().await;
    caught(proxy, before + 1).await;
    metrics.process.kill9();
}

/// Only crashes while the message is written count, and only the third makes it a dead letter.
#[tokio::test]
async fn dead_letters_a_message_after_three_crashes_with_it() {
    let (stack, proxy) = behind_a_proxy().await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.kill9();
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    let poison = publisher.sample();
    publisher.send(&poison).await.unwrap();
    deliver(&stack, 5).await;
    proxy.set(Inserts::Hold);
    for _ in 0..3 {
        crash_while_writing(metrics, &proxy).await;
        assert_eq!(dead_letters(&stack).await, [""; 0]);
    }
    metrics.restart().await;
    eventually("the message is a dead letter", PATIENCE, async || {
        let letters = dead_letters(&stack).await;
        let whole = letters.len() == 1 && letters[0].contains("crashed 3 times");
        whole.then_some(()).ok_or_else(|| format!("{letters:?}"))
    })
    .await;
    // Later messages are stored, and no suspect remains on record.
    proxy.set(Inserts::Pass);
    let mut others = Publisher::new(&stack, "vm-2", 10);
    others.publish_many(5).await;
    // The VM's own row was stored at once, in its own collection.
    let mut of_vm = poison;
    of_vm.processes.clear();
    others.rows.add(&of_vm);
    others
        .rows
        .settle("samples behind a poison message", &stack)
        .await;
    assert_eq!(suspects(&stack).await, 0);
}
