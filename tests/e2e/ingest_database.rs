//! Tests a database that refuses or delays writes. A message becomes a dead letter only if one of its rows is invalid,
//! or if metrics-svc crashed three times while writing it.

use async_nats::jetstream::{AckKind, consumer::PullConsumer};
use futures::StreamExt;
use metrics_svc::ingest::dead_letter;
use mongodb::bson::{Document, doc};
use testkit::{Inserts, MongoProxy, PATIENCE, Program, Replica, Stack, eventually};
use vmwatch_api::metrics::{DEAD_LETTER_STREAM, SAMPLE_STREAM};
use vmwatch_store::MONGODB_URI;

use crate::ingest_support::{Publisher, metric, stack};

/// Builds a test environment whose metrics-svc reaches the database through a proxy.
async fn behind_a_proxy() -> (Stack, MongoProxy) {
    let stack = stack().start().await;
    let proxy = MongoProxy::start(stack.database.uri(), "blocks").await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.set(MONGODB_URI.name, proxy.uri());
    metrics.process.kill9();
    metrics.restart().await;
    (stack, proxy)
}

/// Returns the reasons of all dead letters.
async fn dead_letters(stack: &Stack) -> Vec<String> {
    let stream = stack
        .bus
        .jetstream_for_tests()
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
    eventually("the proxy has stopped the inserts", PATIENCE, async || {
        let caught = proxy.caught();
        (caught >= inserts)
            .then_some(())
            .ok_or(format!("{caught} of {inserts} inserts"))
    })
    .await;
}

/// Waits until no message is recorded as suspected of crashing metrics-svc. A record is deleted after its message was
/// acknowledged.
async fn no_suspects(stack: &Stack) {
    let records = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_suspects");
    eventually("no message is suspected", PATIENCE, async || {
        let suspects = records.count_documents(doc! {}).await.unwrap();
        (suspects == 0)
            .then_some(())
            .ok_or_else(|| format!("{suspects} records"))
    })
    .await;
}

/// Delivers the only message of the stream this many times without storing it, as if metrics-svc had crashed each time.
async fn deliver(stack: &Stack, times: usize) {
    let stream = stack
        .bus
        .jetstream_for_tests()
        .get_stream(SAMPLE_STREAM)
        .await
        .unwrap();
    let consumer: PullConsumer = stream.get_consumer("store").await.unwrap();
    for _ in 0..times {
        // NATS delivers the message again after the ack wait, because the killed program did not acknowledge it.
        let batch = consumer.batch().max_messages(1).expires(PATIENCE);
        let mut messages = batch.messages().await.unwrap();
        let message = messages.next().await.unwrap().unwrap();
        message.ack_with(AckKind::Nak(None)).await.unwrap();
    }
}

/// A temporary refusal by the database never makes a dead letter.
#[tokio::test]
async fn samples_are_kept_while_the_database_blocks_writes() {
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

/// A message that was delivered 21 times is stored like any other if metrics-svc did not crash while it wrote the
/// message. metrics-svc writes such a message alone, without the rows of other messages.
#[tokio::test]
async fn message_that_was_delivered_often_is_written_alone() {
    let stack = stack().start().await;
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.kill9();
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publisher.publish_many(1).await;
    // This is one delivery more than a former limit of 20 deliveries.
    deliver(&stack, 21).await;
    metrics.restart().await;
    publisher
        .rows
        .settle("a message that was delivered often", &stack)
        .await;
    assert!((metric(metrics, "vmwatch_samples_written_alone_total").await - 1.0).abs() < f64::EPSILON);
    no_suspects(&stack).await;
    assert_eq!(dead_letters(&stack).await, [""; 0]);
}

async fn crash_while_writing(metrics: &Replica, proxy: &MongoProxy) {
    let before = proxy.caught();
    metrics.restart().await;
    caught(proxy, before + 1).await;
    metrics.process.kill9();
}

/// Only crashes during the write of a message count. The third crash makes the message a dead letter.
#[tokio::test]
async fn message_becomes_a_dead_letter_after_three_crashes_while_writing_it() {
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
    eventually("the message becomes a dead letter", PATIENCE, async || {
        let letters = dead_letters(&stack).await;
        let whole = letters.len() == 1 && letters[0].contains("crashed 3 times");
        whole.then_some(()).ok_or_else(|| format!("{letters:?}"))
    })
    .await;
    // Later messages are stored, and no message remains recorded as a suspect.
    proxy.set(Inserts::Pass);
    let mut others = Publisher::new(&stack, "vm-2", 10);
    others.publish_many(5).await;
    others
        .rows
        .settle("samples published after a poison message", &stack)
        .await;
    no_suspects(&stack).await;
}
