//! Tests that ingestion stores every sample exactly once, whichever program or server between the samples stream and
//! the database is killed, frozen or restarted. Each test counts every row.

use std::time::{Duration, Instant};

use testkit::{PATIENCE, Program, Stack, eventually};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};
use vmwatch_api::metrics::{ProcessSample, SAMPLE_STREAM};

use crate::ingest_support::{
    Publisher, count, drained, metric, outage, process, publish_during, resident, stack, waiting,
};

async fn stores(stack: &Stack, rows: u64) {
    eventually("enough rows are stored", PATIENCE, async || {
        let stored = count(&stack.database).await?;
        (stored >= rows)
            .then_some(())
            .ok_or(format!("{stored} of {rows} rows are stored"))
    })
    .await;
}

/// Waits until `rows` more rows are stored, so that ingestion is in progress.
async fn stores_more(stack: &Stack, rows: u64) {
    let before = count(&stack.database).await.unwrap();
    stores(stack, before + rows).await;
}

async fn waits(stack: &Stack, messages: u64) {
    eventually("messages wait in the stream", PATIENCE, async || {
        let waiting = waiting(&stack.bus).await?;
        (waiting >= messages).then_some(()).ok_or(format!("{waiting}"))
    })
    .await;
}

/// metrics-svc stores rows, but the acknowledgements of their messages are lost: NATS is frozen before metrics-svc
/// sends the acknowledgements, and killed before it reads them. metrics-svc is killed too; otherwise it would send the
/// acknowledgements again.
#[tokio::test]
async fn rows_are_stored_once_if_the_acknowledgements_are_lost() {
    let stack = stack()
        // The ack wait is longer than a busy machine needs to fill the batch. Otherwise NATS would deliver messages
        // twice into the batch, and some of the ten samples would not be in it.
        .set(Program::Metrics, "VMWATCH_ACK_WAIT", "10s")
        .set(Program::Metrics, "VMWATCH_BATCH_ROWS", "110")
        .set(Program::Metrics, "VMWATCH_BATCH_WAIT", "10s")
        .start()
        .await;
    let metrics = stack.replica(Program::Metrics, 0);
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    stack.database.server.pause();
    publisher.publish_many(10).await;
    eventually("metrics-svc has received the batch", PATIENCE, async || {
        let rows = metric(metrics, "vmwatch_ingest_waiting_rows").await;
        (rows > 109.0).then_some(()).ok_or(format!("{rows}"))
    })
    .await;
    stack.nats.server.pause();
    stack.database.server.resume();
    stores(&stack, 110).await;
    metrics.process.kill9();
    stack.nats.server.kill9();
    stack.nats.restart().await;
    waits(&stack, 10).await;
    metrics.restart().await;
    let what = "killed between insert and acknowledgement";
    publisher.rows.settle(what, &stack).await;
}

#[tokio::test]
async fn rows_are_stored_once_after_kill_of_database() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publish_during(&mut publisher, async {
        for _ in 0..2 {
            stores_more(&stack, 500).await;
            stack.database.server.kill9();
            waits(&stack, 100).await;
            stack.database.restart().await;
        }
        stores_more(&stack, 500).await;
    })
    .await;
    publisher.rows.settle("database killed twice", &stack).await;
}

#[tokio::test]
async fn rows_are_stored_once_after_kill_of_nats() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    let outages = async {
        for _ in 0..2 {
            stores_more(&stack, 500).await;
            stack.nats.server.kill9();
            stack.nats.restart().await;
        }
        stores_more(&stack, 500).await;
    };
    publish_during(&mut publisher, Box::pin(outages)).await;
    publisher.rows.settle("NATS killed twice", &stack).await;
}

#[tokio::test]
async fn surviving_replica_stores_samples_of_killed_replica() {
    let stack = stack().replicas(Program::Metrics, 2).start().await;
    let (first, second) = (
        stack.replica(Program::Metrics, 0),
        stack.replica(Program::Metrics, 1),
    );
    let mut one = Publisher::new(&stack, "vm-1", 10);
    let mut other = Publisher::new(&stack, "vm-2", 10);
    let story = async {
        stores_more(&stack, 1000).await;
        for replica in [first, second] {
            assert!(
                metric(replica, "vmwatch_rows_stored_total").await > 0.0,
                "{}",
                replica.process.name()
            );
        }
        first.process.kill9();
        stores_more(&stack, 1000).await;
        first.restart().await;
        stores_more(&stack, 1000).await;
    };
    Box::pin(publish_during(&mut one, publish_during(&mut other, story))).await;
    one.rows.absorb(other.rows);
    one.rows.settle("two replicas, one killed", &stack).await;
}

/// A stopping metrics-svc acknowledges what it has stored. Only the other messages remain in the stream.
#[tokio::test]
async fn shutdown_of_metrics_svc_under_load_loses_no_rows() {
    let stack = stack().start().await;
    let metrics = stack.replica(Program::Metrics, 0);
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publish_during(&mut publisher, async {
        stores_more(&stack, 500).await;
        let status = metrics.process.terminate(PATIENCE).await;
        assert!(status.success(), "{status}");
        waits(&stack, 20).await;
    })
    .await;
    let stored = count(&stack.database).await.unwrap();
    let waiting = waiting(&stack.bus).await.unwrap();
    assert_eq!(stored + 11 * waiting, publisher.rows.len() as u64);
    metrics.restart().await;
    publisher
        .rows
        .settle("metrics-svc stopped under load", &stack)
        .await;
}

/// A message is published ten times within a short time, as after lost acknowledgements, and again after a restart of
/// metrics-svc. After the restart, metrics-svc can recognise the stored rows of the message only by the ids of the
/// rows.
#[tokio::test]
async fn sample_published_ten_times_is_stored_once() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    let sample = publisher.sample();
    for _ in 0..10 {
        publisher.send(&sample).await.unwrap();
    }
    publisher.rows.add(&sample);
    let sample = publisher.sample();
    let body = serde_json::to_vec(&sample).unwrap();
    for _ in 0..10 {
        publisher.send_raw(body.clone()).await.unwrap();
    }
    publisher.rows.add(&sample);
    drained(&stack.bus).await;
    // The message is published again after the restart, so that it is in another batch.
    stack.replica(Program::Metrics, 0).process.kill9();
    stack.replica(Program::Metrics, 0).restart().await;
    publisher.send_raw(body).await.unwrap();
    publisher.rows.add(&sample);
    publisher
        .rows
        .settle("the same messages published ten times", &stack)
        .await;
    assert_eq!(publisher.rows.len(), 22);
}

/// A process ends and a new process gets its pid before the next sample. The rows of both processes are stored.
#[tokio::test]
async fn both_processes_with_a_reused_pid_are_stored() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 0);
    let mut sample = publisher.sample();
    let running = process(1);
    let ended = ProcessSample {
        // The kernel counts start times in hundredths of a second.
        running_time: running.running_time - 0.01,
        shutdown_time: Some(running.running_time),
        ..running.clone()
    };
    sample.processes = vec![ended, running];
    publisher.send(&sample).await.unwrap();
    publisher.rows.add(&sample);
    publisher.rows.settle("a reused pid", &stack).await;
    assert_eq!(publisher.rows.len(), 3);
}

/// Starts a proxy in front of the database. When signalled, it silently drops its connections, like a network that
/// loses packets. Later connections work again.
async fn relay(listener: TcpListener, database: String, cut: watch::Receiver<()>) {
    loop {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut server = TcpStream::connect(&database).await.unwrap();
        let mut cut = cut.clone();
        cut.mark_unchanged();
        tokio::spawn(async move {
            tokio::select! {
                _ = copy_bidirectional(&mut client, &mut server) => {}
                _ = cut.changed() => std::future::pending().await,
            }
        });
    }
}

/// The database host disappears without closing its connections, so the insert in progress is never answered.
#[tokio::test]
async fn ingestion_recovers_after_database_host_disappears() {
    let stack = stack().start().await;
    let metrics = stack.replica(Program::Metrics, 0);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let database = stack
        .database
        .uri()
        .strip_prefix("mongodb://")
        .unwrap()
        .to_owned();
    let (cut, cuts) = watch::channel(());
    let relaying = tokio::spawn(relay(listener, database, cuts));
    metrics
        .process
        .set("VMWATCH_MONGODB_URI", &format!("mongodb://{address}"));
    metrics.process.kill9();
    metrics.restart().await;

    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publish_during(&mut publisher, async {
        stores_more(&stack, 500).await;
        cut.send(()).unwrap();
        stores_more(&stack, 500).await;
    })
    .await;
    publisher
        .rows
        .settle("the database host disappeared", &stack)
        .await;
    relaying.abort();
}

/// The stream of samples is recreated after it is lost, for example because an operator ran `nats stream rm`.
#[tokio::test]
async fn metrics_svc_recreates_deleted_samples_stream() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publisher.publish_many(5).await;
    drained(&stack.bus).await;
    stack
        .bus
        .jetstream_for_tests()
        .delete_stream(SAMPLE_STREAM)
        .await
        .unwrap();
    publisher.publish_many(5).await;
    publisher
        .rows
        .settle("the samples stream was deleted", &stack)
        .await;
}

/// While the database is frozen, a replica of metrics-svc keeps at most three batches and one pull of messages in
/// memory, however long the backlog is. The messages are nearly as large as they may be.
#[tokio::test]
async fn metrics_svc_memory_is_bounded_while_database_is_frozen() {
    const BACKLOG_BYTES: usize = 96 << 20;
    const MOST_KIB: u64 = 32 << 10;
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_ACK_WAIT", "30s")
        .start()
        .await;
    let metrics = &stack.replica(Program::Metrics, 0).process;
    let mut publisher = Publisher::new(&stack, "vm-1", 4000);
    publisher.publish_many(4).await;
    drained(&stack.bus).await;
    let before = resident(metrics);

    stack.database.server.pause();
    let (mut sent, mut most) = (0, 0);
    let template = publisher.sample();
    let body = serde_json::to_string(&template).unwrap();
    while sent < BACKLOG_BYTES {
        let date = publisher.sample().create_date;
        let body = body.replacen(template.create_date.as_str(), date.as_str(), 1);
        sent += body.len();
        publisher.send_raw(body.into()).await.unwrap();
        most = most.max(resident(metrics));
    }
    let end = Instant::now() + outage();
    while Instant::now() < end {
        most = most.max(resident(metrics));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!(
        "metrics-svc memory: {before} KiB after 16,000 rows, at most {most} KiB with a backlog of 96 MiB"
    );
    assert!(
        most < before + MOST_KIB,
        "the memory of metrics-svc grew from {before} KiB to {most} KiB"
    );

    // Only a part of the backlog is stored, because the whole would take long and test nothing more.
    stack.database.server.resume();
    stores(&stack, 8 * 4001).await;
}
